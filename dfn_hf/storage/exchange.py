"""Exchange of two folders in one step, where the system can do it."""

import ctypes
import os
import sys
from pathlib import Path

ASIDE = ".aside"
AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fs.h
RENAME_SWAP = 2  # sys/stdio.h of macOS


def exchange(first: Path, second: Path) -> None:
    """Exchange two folders of one file system.

    Linux and macOS do it in one step. On file systems that cannot, `second` is first renamed to the name of `first`
    with the suffix `.aside`.

    Raises:
        OSError: a folder cannot be renamed.
    """
    if exchange_at_once(os.fsencode(first), os.fsencode(second)):
        return
    aside = first.with_name(f"{first.name}{ASIDE}")
    second.rename(aside)
    try:
        first.rename(second)
    except OSError:
        aside.rename(second)
        raise
    aside.rename(first)


def exchange_at_once(first: bytes, second: bytes) -> bool:
    """Exchange two paths with one system call; return False if there is none or it fails."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(first, second, RENAME_SWAP) == 0
        return libc.renameat2(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE) == 0
    except (AttributeError, OSError, TypeError):  # another system, or an old libc
        return False
