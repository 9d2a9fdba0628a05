"""The manifest of a folder: path, size and SHA-256 of every file that this package wrote there.

A command deletes or replaces a file only if the manifest proves that this package wrote it and that nobody has changed
it since.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

PRIVATE = ".dfn-hf-"  # start of the names of files and folders that only this package writes
MANIFEST = f"{PRIVATE}manifest.json"
READ_BYTES = 2**20


def write_manifest(folder: Path, paths: Iterable[Path] | None = None) -> None:
    """Flush files to the disk, and record them in the manifest of `folder`.

    The manifest is written atomically and last, so a folder with a manifest is complete.

    Args:
        folder: folder of the manifest.
        paths: files below it. None means all regular files except those named `PRIVATE…`.
    """
    files = {}
    for path in files_below(folder) if paths is None else paths:
        flush(path)
        files[path.relative_to(folder).as_posix()] = describe_file(path)
    write_text_atomically(folder / MANIFEST, json.dumps({"name": folder.name, "files": files}, indent=1))


def read_manifest(folder: Path, *, name: str | None = None) -> dict[str, dict[str, object]] | None:
    """Return size and SHA-256 by the path of each recorded file; None without a valid manifest.

    Args:
        folder: folder of the manifest.
        name: the name that the folder must have had when the manifest was written; None for any.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        files = content["files"] if name in (None, content["name"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return files if isinstance(files, dict) else None


def changed_file(folder: Path) -> str | None:
    """Return the first recorded file of `folder` that is missing or differs from its record; None if all agree.

    Raises:
        ValueError: `folder` has no manifest.
    """
    files = read_manifest(folder)
    if files is None:
        raise ValueError(f"{folder} has no manifest")
    return next((name for name, record in files.items() if not agrees(folder / name, record)), None)


def unknown_files(folder: Path) -> list[Path]:
    """Return the files and links below `folder` that this package did not write, or that have changed since.

    These are files that no manifest in a folder above them records, files that differ from their record, and links.
    """
    return [path for path in entries_below(folder) if not is_known(path, folder)]


def is_known(path: Path, folder: Path) -> bool:
    """Whether a manifest in `folder`, or between it and `path`, records the file and the file has not changed.

    The manifest of a folder in `folder` counts only if the folder was not renamed or copied there: the folder has the
    recorded name, and its parent has a manifest that counts.
    """
    if path.is_symlink() or not path.is_file():
        return False
    above, files = folder, read_manifest(folder)
    for name in path.relative_to(folder).parts:
        if path.parent == above and name.startswith(PRIVATE):
            return True
        if files is None:
            return False
        if agrees(path, files.get(path.relative_to(above).as_posix())):
            return True
        inner = read_manifest(above / name, name=name)
        if inner is not None:
            above, files = above / name, inner
        elif (above / name).is_dir():
            return False
    return False


def remove_known_files(folder: Path) -> None:
    """Delete the known files below `folder` (see `is_known`), and the folders that become empty, `folder` included.

    The manifests are deleted last, so an interrupted deletion can be repeated.
    """
    known = [path for path in entries_below(folder) if is_known(path, folder)]
    known.sort(key=lambda path: (path.name.startswith(PRIVATE), -len(path.parts)))
    for path in known:
        path.unlink(missing_ok=True)
    remove_empty_folders(folder)


def remove_empty_folders(folder: Path) -> None:
    """Delete the folders below `folder` that hold no file, and `folder` itself."""
    for parent, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(parent)
        except OSError:  # it still holds a file
            continue


def entries_below(folder: Path) -> Iterator[Path]:
    """Yield the files and links below `folder`. Links are not followed."""
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in [*names, *links]:
            yield Path(parent, name)


def files_below(folder: Path) -> list[Path]:
    """Return the regular files below `folder`, sorted by path, without those named `PRIVATE…`."""
    files = (path for path in entries_below(folder) if path.is_file() and not path.is_symlink())
    return sorted(path for path in files if not path.name.startswith(PRIVATE))


def agrees(path: Path, record: object) -> bool:
    """Whether the file at `path` has the recorded size and SHA-256."""
    if not isinstance(record, dict) or path.is_symlink() or not path.is_file():
        return False
    return path.stat().st_size == record.get("size") and describe_file(path) == record


def describe_file(path: Path) -> dict[str, object]:
    """Return size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` to the file at `path`; after a crash it holds the old content or the new."""
    written = path.with_name(f"{PRIVATE}{path.name}.new")
    with written.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until the content of a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot flush folders or files opened to read
        pass
    finally:
        os.close(descriptor)
