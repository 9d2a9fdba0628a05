"""Output folders that are written completely or not at all.

A new model is written in a staging folder inside the output folder, and its files are then moved up. `config.json`
comes last among them, and until it is there nothing loads the folder. A model that is replaced is written beside the
old one, and the two folders are exchanged. `recover_output_folder` finishes or deletes what a killed process left.
"""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

from .disk_errors import explain_disk_errors
from .exchange import exchange
from .folder_checks import check_replaceable, check_writable
from .locks import folder_lock, is_locked
from .manifest import MANIFEST, PRIVATE, files_below, read_manifest, remove_known_files, write_manifest

STAGING = f"{PRIVATE}staging-"
UNFINISHED = f"{PRIVATE}unfinished"  # a file in a staging folder that marks new content, until it is in its place
LAST = ["config.json", MANIFEST]  # moved up after all other files, in this order


@contextmanager
def atomic_output_dir(folder: Path, *, replace: bool = False, kept: Collection[Path] = ()) -> Iterator[Path]:
    """Yield an empty folder to write into; its content becomes that of `folder` when the block ends.

    If the block fails, what it wrote is deleted and `folder` does not change.

    Args:
        folder: output folder; it is created if it does not exist.
        replace: replace the content of `folder`, and delete the old files, if this package wrote all of them (see
            `check_replaceable`). Without it, `folder` must not hold a name of the new content.
        kept: files and folders of others in `folder` that are moved to the new content.

    Raises:
        OSError: the disk is full, or a folder cannot be written. The message names the folder.
        ValueError: `folder` may not be replaced, or holds a name of the new content.
    """
    folder = folder.resolve()
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = staging_beside(folder) if replace else folder / f"{STAGING}{uuid4().hex[:8]}"
    staging.mkdir()
    (staging / UNFINISHED).touch()
    with folder_lock(staging):
        try:
            with explain_disk_errors(folder):
                yield staging
                set_permissions(staging)
                write_manifest(staging)
            if replace:
                check_replaceable(folder, ignored=kept)
            else:
                check_free_names(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            if not was_there:
                with suppress(OSError):
                    folder.rmdir()
            raise
        if replace:
            replace_folder(staging, folder, kept)
        else:
            move_up(staging, folder)


def prepare_new_folder(folder: Path) -> None:
    """Finish or delete what killed processes left in `folder`, and check that it is new or empty.

    Raises:
        ValueError: it is not, it cannot be written, or another process is writing to it.
    """
    check_writable(folder)
    recover_output_folder(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose a new folder, or remove it")


def check_free_names(staging: Path, folder: Path) -> None:
    """Raise ValueError if `folder` holds a name that the staging folder will move there."""
    for path in staging.iterdir():
        if path.name != UNFINISHED and (folder / path.name).exists():
            raise ValueError(f"{folder / path.name} has a name that the new model needs: move it")


def move_up(staging: Path, folder: Path) -> None:
    """Move a complete staging folder's content to `folder`, the folder above it."""
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: (name in LAST, name == MANIFEST))
    for name in names:
        if name != UNFINISHED:
            (staging / name).rename(folder / name)
    (staging / UNFINISHED).unlink(missing_ok=True)
    staging.rmdir()


def set_permissions(staging: Path) -> None:
    """Give all files the permissions of a new file: safetensors writes files that only their owner can read."""
    mode = (staging / UNFINISHED).stat().st_mode
    for path in files_below(staging):
        path.chmod(mode)


def replace_folder(staging: Path, folder: Path, kept: Collection[Path]) -> None:
    """Exchange a complete staging folder with `folder`, move `kept` to it, and delete the old content."""
    try:
        exchange(staging, folder)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    (folder / UNFINISHED).unlink(missing_ok=True)
    for path in kept:
        place = path.resolve().relative_to(folder)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (staging / place).rename(folder / place)
    remove_known_files(staging)


def recover_output_folder(folder: Path) -> None:
    """Finish or delete what killed processes left in `folder` and beside it.

    Raises:
        ValueError: another process is writing to `folder`.
    """
    folder = folder.resolve()
    for staging in folder.glob(f"{STAGING}*"):
        check_unlocked(staging, folder)
        if read_manifest(staging) is None:
            shutil.rmtree(staging)
        else:
            move_up(staging, folder)
    for staging in sorted(folder.parent.glob(f"{escape(staging_name(folder))}*")):
        check_unlocked(staging, folder)
        recover_beside(staging, folder)
    (folder / UNFINISHED).unlink(missing_ok=True)


def recover_beside(staging: Path, folder: Path) -> None:
    """Finish or delete a folder that a killed replacement left beside `folder`.

    A folder with the marker `UNFINISHED` is the new one, before the exchange. It is deleted, and the next run writes
    it again. If `folder` is missing, an exchange in two steps was interrupted, and the new folder, which is complete,
    takes its place. A folder without the marker is the old one, after the exchange.
    """
    if not (staging / UNFINISHED).exists():
        remove_known_files(staging)
    elif folder.exists() or read_manifest(staging) is None:
        shutil.rmtree(staging)
    else:
        staging.rename(folder)


def staging_beside(folder: Path) -> Path:
    """Return an unused name beside `folder`."""
    return folder.with_name(f"{staging_name(folder)}{uuid4().hex[:8]}")


def staging_name(folder: Path) -> str:
    """Return the start of the names of staging folders beside `folder`."""
    return f".{folder.name}{STAGING}"


def check_unlocked(staging: Path, folder: Path) -> None:
    """Raise ValueError if the process that made `staging` still runs."""
    if is_locked(staging):
        raise ValueError(f"another process is writing to {folder}: wait until it has ended, or choose another folder")
