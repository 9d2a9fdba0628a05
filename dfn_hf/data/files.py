"""Finds and opens a user's data files; every error names the file and the remedy.

Imports the standard library only.
"""

import bz2
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn, TextIO, cast

COMPRESSED_SUFFIXES = (".bz2", ".gz", ".xz")
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".bz2": bz2.BZ2Decompressor,
    ".xz": partial(lzma.LZMADecompressor, lzma.FORMAT_XZ),
}
CHUNK_BYTES = 2**16
# Text compresses by a factor of about 10, and images by about 50. A much larger factor suggests a file that was made
# to fill the memory.
MAX_EXPANSION = 200
FREE_BYTES = 2**26  # content up to this size is accepted at any factor

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def format_suffix(file: Path) -> str:
    """Return the suffix without compression, in lower case: `.jsonl` for `corpus.JSONL.xz`."""
    return (file.with_suffix("") if file.suffix.lower() in COMPRESSED_SUFFIXES else file).suffix.lower()


def find_files(path: str | os.PathLike[str], suffixes: tuple[str, ...], kind: str) -> list[Path]:
    """List the file at `path`, or the files with one of `suffixes` in the folder at `path`, sorted by path.

    A folder is searched recursively, including linked folders, each once. Hidden files and folders are skipped.

    Args:
        path: file or folder.
        suffixes: suffixes of the files of a folder, without compression; see `format_suffix`.
        kind: what the files hold, for errors.

    Raises:
        ValueError: `path` does not exist, the folder holds no such file, or a file or folder cannot be read.
    """
    if not os.fspath(path) or not os.path.exists(path):
        raise ValueError(f"there is no file or folder {os.fspath(path)!r}: check the path")
    path = Path(path)
    if path.is_dir():
        found = files_below(path, suffixes)
        if not found:
            raise ValueError(
                f"the folder {path} holds no {kind} file ({', '.join(suffixes)}): add one, or give the path of a file"
            )
    else:
        found = [path]
    for file in found:
        check_file(file)
    return found


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files in a folder that are not hidden and have one of `suffixes`, sorted by path."""

    def refuse(error: OSError) -> NoReturn:
        raise unreadable(error.filename, error)

    found: list[Path] = []
    visited = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder that has been searched
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [file for file in files if format_suffix(file) in suffixes]
    return sorted(found)


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless `path` is a regular file. Opening a pipe or a device would block."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name of {os.fspath(path)!r} is not UTF-8: rename the file") from error
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            raise ValueError(f"{path} is a link to a file that does not exist: remove the link") from error
        raise unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "not a file")
        raise ValueError(f"{path} is {kind}: give a regular file, because data are read several times")


def unreadable(path: Any, error: OSError) -> ValueError:
    """The error for a file or folder that the operating system does not let the user read."""
    return ValueError(f"{path} cannot be read ({error.strerror or error}): check that it exists and its permissions")


@contextmanager
def explain_read_errors(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Raise any error of a reader of damaged files as a ValueError that names the file.

    Args:
        path: the file.
        kind: what the file should be, with an article, such as "a PCM WAV file".

    Raises:
        ValueError: also for a file that is missing, or is not a regular file.
    """
    check_file(path)
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise unreadable(path, error) from error
        raise damaged(path, kind, error) from error
    except MemoryError as error:
        raise ValueError(f"{path} does not fit in memory, or is damaged: give a smaller file") from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise damaged(path, kind, error) from error


def damaged(path: Any, kind: str, error: Exception) -> ValueError:
    """The error for a file that its reader rejects, with the first line of the reader's message."""
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return ValueError(f"{path} is damaged or not {kind} ({reason}): copy or save it again")


@contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """Open a UTF-8 file, decompressed by its suffix, without a byte-order mark.

    Raises:
        ValueError: on opening or reading, if the file is missing, not a regular file, unreadable, damaged, or not
            UTF-8.
    """
    check_file(path)
    try:
        with open_bytes(path) as file, io.TextIOWrapper(cast(Any, file), encoding="utf-8-sig") as text:
            yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it to UTF-8") from error
    except OSError as error:
        if error.errno is not None:
            raise unreadable(path, error) from error
        raise ValueError(f"{path} is damaged ({error}): compress or copy it again") from error
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): compress or copy it again") from error


def open_bytes(path: str) -> IO[bytes]:
    """Open a file in binary mode, decompressed by its suffix."""
    suffix = Path(path).suffix.lower()
    if suffix not in COMPRESSED_SUFFIXES:
        return open(path, "rb")
    size = os.stat(path).st_size
    if size == 0:
        raise EOFError("it has no bytes")
    chunks = gzip_chunks(path) if suffix == ".gz" else stream_chunks(path, DECOMPRESSORS[suffix])
    limit = max(FREE_BYTES, MAX_EXPANSION * size)
    return io.BufferedReader(ChunkReader(bounded(chunks, path, limit)), CHUNK_BYTES)


def gzip_chunks(path: str) -> Iterator[bytes]:
    """Yield the content of a gzip file in chunks."""
    with gzip.open(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def stream_chunks(path: str, new_decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Yield the content of all streams of a bzip2 or xz file in chunks; zero bytes may follow a stream.

    The file objects of `bz2` and `lzma` skip the rest of a file if a stream after the first is damaged.

    Raises:
        EOFError: the last stream is truncated.
        OSError, lzma.LZMAError: the file is damaged.
    """
    with open(path, "rb") as file:
        rest = file.read(CHUNK_BYTES)
        while rest:
            decompressor = new_decompressor()
            while not decompressor.eof:
                if not rest and decompressor.needs_input:
                    rest = file.read(CHUNK_BYTES)
                    if not rest:
                        raise EOFError("it ends within a stream")
                yield decompressor.decompress(rest, CHUNK_BYTES)
                rest = b""
            rest = decompressor.unused_data
            while not (rest := rest.lstrip(b"\0")) and (rest := file.read(CHUNK_BYTES)):
                pass


def bounded(chunks: Iterator[bytes], path: str, limit: int) -> Generator[bytes, None, None]:
    """Yield the chunks that are not empty; raise ValueError if they have more than `limit` bytes."""
    count = 0
    for chunk in chunks:
        count += len(chunk)
        if count > limit:
            raise ValueError(
                f"{path} expands to more than {MAX_EXPANSION} times its size: if it is not damaged, decompress it "
                "first"
            )
        if chunk:
            yield chunk


class ChunkReader(io.RawIOBase):
    """A binary file object over an iterator of chunks, none of which is empty."""

    def __init__(self, chunks: Generator[bytes, None, None]) -> None:
        self.chunks = chunks
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.rest = self.rest or memoryview(next(self.chunks, b""))
        count = min(len(self.rest), len(buffer))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count

    def close(self) -> None:
        self.chunks.close()
        super().close()
