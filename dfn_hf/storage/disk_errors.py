"""The errors that libraries raise on a full disk, as one OSError."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
def explain_disk_errors(folder: Path, *, remedy: str = "run the command again") -> Iterator[None]:
    """Raise the different errors of libraries on a full disk as one OSError that names `folder` and the remedy."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        message = f"{os.strerror(errno.ENOSPC)} while {folder} was saved: free some space and {remedy}"
        raise OSError(message) from error


def is_disk_full(error: Exception) -> bool:
    """Whether `error` reports a write that failed because the disk is full."""
    return getattr(error, "errno", None) in DISK_FULL or any(words in str(error) for words in DISK_FULL_WORDS)
