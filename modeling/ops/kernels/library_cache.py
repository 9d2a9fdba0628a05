"""Keeps compiled libraries in a folder and checks them before they are loaded.

A library is stored as `<key>-<size>-<SHA-256>.so`: the key says what it was compiled from, size and hash what the file
must contain. A file that differs from its name is not loaded, because a truncated library could crash the process.
"""

import ctypes
import hashlib
import os
import shutil
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

BUILD_PREFIX = "build-"  # folders in which a compilation runs
BUILD_SECONDS = 3600  # older ones are from killed processes, because a compilation takes at most minutes
OTHER_FOLDER = "set XDG_CACHE_HOME to a folder that only you can write to"


def library_folder() -> Path:
    """Return the folder of compiled libraries; create it with its parents, writable by this user only.

    Raises:
        OSError: it cannot be created, or another user can replace its files, which are executed.
        RuntimeError: the home folder is unknown.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base if os.path.isabs(base) else Path.home() / ".cache").absolute() / "dfn_hf" / "kernels"
    try:
        for path in (*reversed(folder.parents), folder):
            path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise OSError(f"The folder {folder} cannot be created ({error.strerror}: {path}): {OTHER_FOLDER}.") from error
    check_ownership(folder)
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError(
            f"{folder} is on a file system mounted with noexec: set XDG_CACHE_HOME to a folder on another file system."
        )
    return folder


def check_ownership(folder: Path) -> None:
    """Check that no other user can replace the files of a folder.

    The folder, its parents and the targets of symbolic links among them must belong to this user, to root or to the
    owner of `/`, who is not root in some containers. A group may write to the parents, and all users may if the sticky
    bit is set.

    Raises:
        PermissionError: another user owns one of them or can write to it.
    """
    trusted = {0, os.geteuid(), os.stat("/").st_uid}
    checked: set[Path] = set()
    pending = [folder, *folder.parents]
    while pending:
        path = pending.pop()
        if path in checked:
            continue
        checked.add(path)
        status = path.lstat()
        if status.st_uid not in trusted:
            raise PermissionError(f"{path} belongs to another user (number {status.st_uid}): {OTHER_FOLDER}.")
        if stat.S_ISLNK(status.st_mode):
            target = path.parent / path.readlink()
            pending += [target, *target.parents]
        elif is_open_to_others(status, is_parent=not os.path.samestat(status, folder.stat())):
            raise PermissionError(f"Other users can write to {path}: run `chmod go-w {path}`, or {OTHER_FOLDER}.")


def is_open_to_others(status: os.stat_result, is_parent: bool) -> bool:
    """Return whether other users can replace the files of a folder, or the sub-folders of a parent."""
    if is_parent:
        return bool(status.st_mode & stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def library_name(key: str, content: bytes) -> str:
    """Return the file name of a library."""
    return f"{key}-{len(content)}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def load_library(path: Path, functions: tuple[str, ...]) -> ctypes.CDLL:
    """Load a library after comparing its content with its name.

    Raises:
        OSError: the file is damaged, cannot be read or loaded, or lacks one of `functions`.
    """
    key, size, _ = path.stem.rsplit("-", 2)
    status = path.stat()
    is_whole = stat.S_ISREG(status.st_mode) and str(status.st_size) == size
    if not is_whole or library_name(key, path.read_bytes()) != path.name:
        raise OSError(f"{path} is damaged: its content differs from the size and hash in its name.")
    library = ctypes.CDLL(str(path))
    if not all(hasattr(library, name) for name in functions):
        raise OSError(f"{path} lacks one of the functions {', '.join(functions)}.")
    return library


def find_library(folder: Path, key: str, functions: tuple[str, ...]) -> ctypes.CDLL | None:
    """Load the library with this key from the folder; delete those that cannot be used.

    Returns:
        The library; None if the folder has none that can be used.
    """
    for path in sorted(folder.glob(f"{key}-*-*.so")):
        try:
            return load_library(path, functions)
        except OSError as error:
            logger.warning(f"A compiled library cannot be used and is compiled again. {error}")
            with suppress(OSError):
                path.unlink()
    return None


@contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """Provide a temporary folder for one compilation; delete those that killed processes left.

    Raises:
        OSError: a file cannot be written.
    """
    for left in folder.glob(f"{BUILD_PREFIX}*"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > BUILD_SECONDS:
                shutil.rmtree(left)
    try:
        with tempfile.TemporaryDirectory(prefix=BUILD_PREFIX, dir=folder, ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
    except OSError as error:
        if error.errno is None:  # not from the system: the message already has a reason and a remedy
            raise
        raise OSError(f"{folder} cannot be written to ({error.strerror}): {OTHER_FOLDER}, with free space.") from error


def store_library(built: Path, folder: Path, key: str, functions: tuple[str, ...]) -> ctypes.CDLL:
    """Load a new library and move it into the folder, complete and written to the disk.

    Args:
        built: the file that the compiler wrote, on the file system of `folder`.
        folder: the folder of libraries.
        key: what the library was compiled from.
        functions: names of the functions that the library must have.

    Raises:
        OSError: the file cannot be read, loaded or written to the disk, or lacks one of `functions`.
    """
    content = built.read_bytes() if built.exists() else b""
    if is_cut_short(content):
        raise OSError("The compiler wrote an incomplete library: set CC to another compiler.")
    flush(built)
    path = folder / library_name(key, content)
    named = built.rename(built.with_name(path.name))
    try:
        library = load_library(named, functions)
    except OSError as error:
        reason = str(error).replace(str(named), built.name).rstrip(".")
        raise OSError(f"The compiler wrote an unusable library ({reason}): set CC to another compiler.") from error
    try:
        named.replace(path)
        flush(folder)
    except OSError as error:
        logger.warning_once(
            f"A compiled library cannot be kept, so each process compiles it again: delete {path} ({error.strerror})."
        )
    return library


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_cut_short(content: bytes) -> bool:
    """Return whether a library is empty, or a 64-bit ELF file that ends before the end of its section table.

    Linkers write that table last. Loading such a file could crash the process.
    """
    if len(content) < 64 or content[:5] != b"\x7fELF\x02":
        return not content
    order = "<" if sys.byteorder == "little" else ">"
    start, size, count = struct.unpack_from(f"{order}40xQ10xHH", content)
    return start + size * count > len(content)
