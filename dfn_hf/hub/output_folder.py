"""Output folders that are written completely or not at all. Imports the standard library only."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors and torch.save report a failed write in their message, without an errno.
DISK_FULL_WORDS = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "PytorchStreamWriter failed",
    "fail at inline_container.cc",
)


@contextmanager
def atomic_output_dir(folder: Path) -> Iterator[Path]:
    """Yield an empty sibling of `folder` to write into, which is renamed to `folder` when the block ends.

    If the block fails, the sibling is deleted and `folder` does not change. An existing `folder` is replaced, so the
    caller asks the user first.

    Raises:
        OSError: the disk is full; the message names `folder`.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = folder.with_name(f".{folder.name}.{uuid4().hex}")
    replaced = folder.with_name(f"{written.name}.replaced")
    written.mkdir()
    try:
        with explain_disk_errors(folder):
            yield written
        if folder.exists():
            folder.rename(replaced)
        try:
            written.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def check_new_folder(folder: Path) -> None:
    """Raise ValueError unless `folder` is new or an empty folder."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose a new folder, or remove it")


@contextmanager
def explain_disk_errors(folder: Path) -> Iterator[None]:
    """Raise the different errors of libraries on a full disk as one OSError that names `folder`."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        message = f"{os.strerror(errno.ENOSPC)} while saving: free some space and try again"
        raise OSError(errno.ENOSPC, message, str(folder)) from error


def is_disk_full(error: Exception) -> bool:
    """Whether `error` reports a write that failed because the disk is full."""
    return getattr(error, "errno", None) in DISK_FULL or any(words in str(error) for words in DISK_FULL_WORDS)
