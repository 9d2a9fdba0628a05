"""Folders that appear whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors and torch.save report a failed write in words, without an errno.
DISK_FULL_WORDS = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "PytorchStreamWriter failed",
    "fail at inline_container.cc",
)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty sibling of `folder` to write into, which takes the place of `folder` when the block ends.

    If the block fails, what was written goes away and `folder` stays as it was. A folder that stood there before is
    replaced, so ask the user first.

    Raises:
        OSError: the disk is full; the message says so in one sentence.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = folder.with_name(f".{folder.name}.{uuid4().hex}")
    replaced = folder.with_name(f"{written.name}.replaced")
    written.mkdir()
    try:
        with clear_disk_errors(folder):
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


@contextmanager
def clear_disk_errors(folder: Path) -> Iterator[None]:
    """Turn each library's own words for a full disk into one OSError that names `folder`."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        message = f"{os.strerror(errno.ENOSPC)} while saving: free some space and try again"
        raise OSError(errno.ENOSPC, message, str(folder)) from error


def is_disk_full(error: Exception) -> bool:
    """Whether `error` reports a write that found no room, in whichever words."""
    return getattr(error, "errno", None) in DISK_FULL or any(words in str(error) for words in DISK_FULL_WORDS)
