"""Checks the output folder of a training run and finds its checkpoints. Imports the standard library only."""

import json
import shutil
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"


def check_output_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ValueError unless a trained model may be written to `folder`.

    Args:
        folder: output folder of the training run.
        resume: allow checkpoints of an interrupted run.
        overwrite: allow any content, which the trained model will replace.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    others = [path.name for path in folder.iterdir() if path.name != CHECKPOINTS] if folder.is_dir() else []
    if others and not overwrite:
        if resume:
            raise ValueError(f"{folder} holds a finished model: remove --resume")
        raise ValueError(
            f"{folder} is not empty (it holds {sorted(others)[0]}): choose another folder, or add --overwrite"
        )
    last = last_checkpoint(folder / CHECKPOINTS)
    if last is not None and not resume and not overwrite:
        raise ValueError(f"{folder} holds a run that stopped after {last.name}: add --resume or --overwrite")


def check_same_run(checkpoints: Path, run: dict[str, Any]) -> None:
    """Raise ValueError unless the run that wrote these checkpoints had the settings `run`."""
    earlier = json.loads((checkpoints / RUN_FILE).read_text())
    for field, value in run.items():
        if earlier.get(field) != value:
            raise ValueError(
                f"the unfinished run in {checkpoints.parent} had {field} = {earlier.get(field)!r}, not {value!r}: "
                "resume with the same options, or add --overwrite"
            )


def last_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    complete = [path for path in checkpoint_folders(checkpoints) if is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_incomplete_checkpoints(checkpoints: Path) -> None:
    """Delete incomplete checkpoints, which a killed process or a full disk leaves behind."""
    for path in checkpoint_folders(checkpoints):
        if not is_complete(path):
            shutil.rmtree(path, ignore_errors=True)


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Return all checkpoint folders, complete or not."""
    return [path for path in checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]


def is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer state, the last file that the Trainer writes, exists and is valid JSON."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True
