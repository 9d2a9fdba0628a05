"""Checks of an output folder before a long run: can it be written, and can its content be replaced?"""

import os
from collections.abc import Collection
from pathlib import Path

from .exchange import ASIDE
from .manifest import PRIVATE, unknown_files

MAX_NAME_BYTES = 255
# The most that is added to the name of a folder while it is replaced.
ADDED_BYTES = len(f".{PRIVATE}staging-01234567{ASIDE}")
SHOWN = 3


def check_writable(folder: Path) -> None:
    """Raise ValueError unless `folder` can be created, or files can be created in it."""
    folder = Path(os.path.abspath(folder))
    for name in folder.parts:
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise ValueError(
                f"the name {name[:40]}… in the output folder is longer than {MAX_NAME_BYTES} bytes: shorten it"
            )
    above = folder
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        kind = "a broken link" if above.is_symlink() else "a file"
        raise ValueError(f"{above} is {kind}: give a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{above} cannot be written: choose another output folder, or change its permissions")


def check_replaceable(folder: Path, *, ignored: Collection[Path] = ()) -> None:
    """Raise ValueError unless the content of `folder` may be replaced.

    It may be if this package wrote all of it, except what is in the folders `ignored`, and if the system can exchange
    the folder with another one.
    """
    shown = folder
    folder = folder.resolve()
    if os.path.ismount(folder):
        raise ValueError(f"{shown} is a mount point, which cannot be replaced: choose a folder in it")
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise ValueError(f"{shown} holds the current folder, which cannot be replaced: run the command from elsewhere")
    skipped = {path.resolve() for path in ignored}
    unknown = [str(path.relative_to(folder)) for path in unknown_files(folder) if skipped.isdisjoint(path.parents)]
    if unknown:
        others = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise ValueError(
            f"{shown} holds {', '.join(sorted(unknown)[:SHOWN])}{others}, which dfn-hf did not write or which changed "
            "since: choose another folder, or move what you want to keep and delete the rest"
        )
    if len(os.fsencode(folder.name)) + ADDED_BYTES > MAX_NAME_BYTES:
        raise ValueError(f"the name {folder.name[:40]}… is too long to replace the folder: choose a shorter one")
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{folder.parent} cannot be written, so {shown} cannot be replaced: choose another folder")
