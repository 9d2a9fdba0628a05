"""The checkpoints of a training run: which are complete, which to resume from, and which files the run wrote.

A checkpoint is complete if it has a manifest and every file agrees with it. Imports the standard library only.
"""

import json
import re
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..storage.folder_checks import check_replaceable, check_writable
from ..storage.locks import is_locked
from ..storage.manifest import (
    MANIFEST,
    PRIVATE,
    changed_file,
    files_below,
    read_manifest,
    remove_empty_folders,
    remove_known_files,
    unknown_files,
    write_manifest,
    write_text_atomically,
)
from ..storage.output_folder import recover_output_folder

CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"
EVENT_FILES = "events.out.tfevents.*"  # of TensorBoard, which grow during the run
SAVING = f"{PRIVATE}saving"  # a file in a checkpoint while it is saved
INTERRUPTED = "its save was interrupted"
# Files that a Trainer saves. Those of a checkpoint whose save was interrupted have no manifest.
TRAINER_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*config.json", "*.py", "*token*.json", "*.jinja", "vocab.*",
    "merges.txt", "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json",
    "training_args.bin", RUN_FILE, f"{PRIVATE}*", "README.md", ".tmp*",
)  # fmt: skip


def prepare_output_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Finish or delete what a killed run left in `folder`, and check that a trained model may be written to it.

    Args:
        folder: output folder of the training run.
        resume: allow checkpoints of an interrupted run.
        overwrite: allow a model and checkpoints that this package wrote. The trained model will replace them.

    Raises:
        ValueError: it may not; the message names the file that prevents it and the remedy.
    """
    check_writable(folder)
    recover_output_folder(folder)
    if not folder.is_dir():
        return
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_symlink():
        raise ValueError(f"{checkpoints} is a link, which is not followed: remove it, or choose another folder")
    run = recover_run(checkpoints)
    if run is None and checkpoints.is_dir() and not unknown_files(checkpoints):  # killed before it wrote a file
        remove_known_files(checkpoints)
    holds_model = read_manifest(folder) is not None
    if run is not None and holds_model and not run["replaces"]:  # killed after the model was saved
        remove_known_files(checkpoints)
        run = None
    others = sorted(path for path in folder.iterdir() if run is None or path != checkpoints)
    if resume and run is not None:
        if holds_model:
            damaged = [path for path in checkpoint_folders(checkpoints) if checkpoint_fault(path) is not None]
            check_replaceable(folder, ignored=[*damaged, *set_aside(checkpoints)])
    elif others and overwrite:
        check_replaceable(folder)
    elif others:
        raise ValueError(occupied_message(folder, others, resume))
    elif run is not None and not overwrite and saved_checkpoints(checkpoints):
        newest = saved_checkpoints(checkpoints)[-1].name
        raise ValueError(f"{folder} holds a run that stopped after {newest}: add --resume or --overwrite")
    elif run is not None:
        check_own_checkpoints(checkpoints)


def occupied_message(folder: Path, others: list[Path], resume: bool) -> str:
    """Return the error message for an output folder that holds the paths `others`."""
    remedy = "choose another folder"
    with suppress(ValueError):
        check_replaceable(folder)
        remedy += ", or add --overwrite" + (" instead of --resume" if resume else "")
    if resume and read_manifest(folder) is not None:
        return f"{folder} holds a finished model: {remedy}"
    path = min(others, key=lambda path: path.name.startswith(PRIVATE))
    files = files_below(path) if path.is_dir() and not path.is_symlink() else []
    name = (files[0] if files else path).relative_to(folder)
    return f"{folder} is not empty (it holds {name}): {remedy}"


def recover_run(checkpoints: Path) -> dict[str, Any] | None:
    """Return the record of an interrupted run, or None; delete the checkpoints whose save was interrupted.

    Raises:
        ValueError: the run continues in another process.
    """
    records = (read_run(folder) for folder in (checkpoints, *reversed(checkpoint_folders(checkpoints))))
    record = next((found for found in records if found is not None), None)
    if record is not None:
        if is_locked(checkpoints):
            raise ValueError(f"another process is training in {checkpoints.parent}: wait until it has ended")
        write_text_atomically(checkpoints / RUN_FILE, json.dumps(record, indent=2))
        remove_interrupted_saves(checkpoints)
        record_run_files(checkpoints)
    return record


def check_own_checkpoints(checkpoints: Path) -> None:
    """Raise ValueError if `checkpoints` holds a file that no training run wrote."""
    for path in unknown_files(checkpoints):
        raise ValueError(
            f"{path} was not written by a training run, or has changed since: move it, or choose another folder"
        )


def write_run(checkpoints: Path, run: dict[str, Any], *, replaces: bool) -> None:
    """Record the settings that must be equal to resume the run, and whether its model will replace another."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_text_atomically(checkpoints / RUN_FILE, json.dumps({"replaces": replaces, "run": run}, indent=2))


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the record of the run whose checkpoints `folder` holds, or of a checkpoint; None without a valid one."""
    try:
        record = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("run"), dict) and "replaces" in record
    return record if is_record else None


def check_same_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Raise ValueError unless the run that wrote this checkpoint had the settings `run`."""
    record = read_run(checkpoint)
    earlier = record["run"] if record else {}
    for field, value in run.items():
        if earlier.get(field) != value:
            raise ValueError(
                f"the unfinished run in {checkpoint.parents[1]} had {field} = {earlier.get(field)!r}, not {value!r}: "
                "resume with the same options and data, or start again with --overwrite instead of --resume"
            )


def newest_complete_checkpoint(checkpoints: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the newest complete checkpoint, and why each newer one is not complete.

    Raises:
        ValueError: there are checkpoints, but none is complete.
    """
    faults: dict[str, str] = {}
    for path in reversed(checkpoint_folders(checkpoints)):
        fault = checkpoint_fault(path)
        if fault is None:
            return path, faults
        faults[path.name] = fault
    if any(fault != INTERRUPTED for fault in faults.values()):
        listed = ", ".join(f"{name} ({fault})" for name, fault in faults.items())
        raise ValueError(
            f"no checkpoint in {checkpoints} is complete: {listed}. Restore one of them, or move the folder away to "
            "start again"
        )
    return None, faults


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Return why a checkpoint is not complete, or None if it is."""
    if (checkpoint / SAVING).exists() or not (checkpoint / MANIFEST).exists():
        return INTERRUPTED
    name = MANIFEST if read_manifest(checkpoint) is None else changed_file(checkpoint)
    if name is None:
        return None
    return f"{name} is {'damaged' if (checkpoint / name).exists() else 'missing'}"


def begin_save(checkpoint: Path) -> None:
    """Mark a checkpoint as being saved, and record what its folder holds before."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    earlier = [path.relative_to(checkpoint).as_posix() for path in files_below(checkpoint)]
    write_text_atomically(checkpoint / SAVING, json.dumps(earlier))


def complete_save(checkpoint: Path) -> None:
    """Record the files of a saved checkpoint, with the run that it belongs to."""
    write_text_atomically(checkpoint / RUN_FILE, (checkpoint.parent / RUN_FILE).read_text())
    write_manifest(checkpoint, saved_files(checkpoint))
    (checkpoint / SAVING).unlink(missing_ok=True)


def saved_files(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint that its save wrote: new ones, and those with a name of a Trainer's file."""
    try:
        earlier = json.loads((checkpoint / SAVING).read_text())
    except (OSError, ValueError):
        earlier = []
    return [
        path
        for path in files_below(checkpoint)
        if path.relative_to(checkpoint).as_posix() not in earlier or is_trainer_file(path)
    ]


def is_trainer_file(path: Path) -> bool:
    """Whether a Trainer saves files of this name."""
    return any(fnmatch(path.name, pattern) for pattern in TRAINER_FILES)


def remove_old_checkpoints(checkpoints: Path, keep: set[str], *, limit: int) -> None:
    """Delete the oldest saved checkpoints, except those named in `keep`, until `limit` are left."""
    saved = saved_checkpoints(checkpoints)
    removable = [path for path in saved if path.name not in keep]
    for path in removable[: max(0, len(saved) - limit)]:
        remove_known_files(path)


def remove_interrupted_saves(checkpoints: Path) -> None:
    """Delete what a killed process or a full disk left of an incomplete save, and no file of another name."""
    for path in checkpoint_folders(checkpoints):
        if (path / SAVING).exists() or not files_below(path):
            for file in sorted(path.iterdir(), key=lambda file: file.name == SAVING):
                if file.is_file() and not file.is_symlink() and is_trainer_file(file):
                    file.unlink()
            remove_empty_folders(path)


def move_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that the run can save it again; return its new path."""
    number = len(set_aside(checkpoint.parent))
    return checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.damaged{f'-{number}' if number else ''}"))


def set_aside(checkpoints: Path) -> list[Path]:
    """Return the damaged checkpoints that earlier runs renamed."""
    return list(checkpoints.glob("checkpoint-*.damaged*"))


def record_run_files(checkpoints: Path) -> None:
    """Record the files of the run outside its checkpoints: `run.json` and the logs of TensorBoard."""
    logs = [path for path in files_below(checkpoints) if fnmatch(path.name, EVENT_FILES)]
    write_manifest(checkpoints, [checkpoints / RUN_FILE, *logs])


def saved_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders whose save was completed, from the oldest to the newest."""
    folders = checkpoint_folders(checkpoints)
    return [path for path in folders if not (path / SAVING).exists() and read_manifest(path) is not None]


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Return all checkpoint folders, complete or not, from the oldest to the newest."""
    named = [path for path in checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    folders = [path for path in named if path.is_dir() and not path.is_symlink()]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))
