"""Checks of paths that a command is given. They import the standard library only, so mistakes are reported quickly."""

import os
from pathlib import Path

from ..loading.model_path import resolve_source

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def check_models(*sources: str | None) -> None:
    """Raise ValueError unless each model is a folder, a bundled checkpoint or a Hub id; None is skipped."""
    for source in sources:
        if source is not None:
            resolve_source(source)


def check_data(*paths: str | None) -> None:
    """Raise ValueError unless each path is a file or a folder; None is skipped."""
    for path in paths:
        if path is not None and not Path(path).exists():
            raise ValueError(f"there is no file or folder {path}: check the path")


def prepare_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Call `prepare_output_folder` in the main process, to check `output` before anything is loaded."""
    if os.environ.get("RANK", "0") == "0":
        from ..training.checkpoints import prepare_output_folder

        prepare_output_folder(output, resume=resume, overwrite=overwrite)


def check_new_file(path: Path | None) -> None:
    """Raise ValueError if a file exists at `path`."""
    if path is not None and path.exists():
        raise ValueError(f"{path} exists: choose a new file")


def check_picture(path: Path) -> None:
    """Raise ValueError unless `path` is new and has the suffix of a picture."""
    check_new_file(path)
    if path.suffix not in PICTURE_SUFFIXES:
        raise ValueError(f"{path} is not a picture: end the name in {', '.join(PICTURE_SUFFIXES)}")
