"""The folder of a training run: begins or resumes the run in it, and writes the trained model at the end."""

import dataclasses
import hashlib
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCard
from peft import PeftModel
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..storage.disk_errors import explain_disk_errors
from ..storage.locks import folder_lock
from ..storage.manifest import files_below, read_manifest, remove_known_files
from ..storage.output_folder import atomic_output_dir
from .checkpoints import (
    CHECKPOINTS,
    check_same_run,
    move_aside,
    newest_complete_checkpoint,
    prepare_output_folder,
    record_run_files,
    set_aside,
    write_run,
)
from .settings import TrainingSettings

LOG_FILE = "training_log.json"
TENSORBOARD = "runs"

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Result of a finished training run.

    Attributes:
        folder: transformers folder with the weights of lowest validation loss, the tokenizer, a model card and
            `training_log.json`.
        history: the Trainer's log. An entry has `step`, and either `loss`, `learning_rate` and `grad_norm`, or
            `eval_loss`; the first evaluation precedes the first step.
        initial_loss: validation loss before the first step, in nats per token.
        validation_loss: validation loss of the saved model, in nats per token.
    """

    folder: Path
    history: list[dict[str, float]]
    initial_loss: float
    validation_loss: float


@contextmanager
def begin_run(folder: Path, run: dict[str, Any], *, resume: bool, overwrite: bool) -> Iterator[Path | None]:
    """Prepare the output folder and lock it during the run; yield the checkpoint to resume from, if there is one.

    The main process changes the folder, and the others wait for it.

    Raises:
        ValueError: the folder may not be written, or the run to resume had other settings.
    """
    checkpoints = folder / CHECKPOINTS
    with ExitStack() as stack:
        last = None
        if PartialState().is_main_process:
            prepare_output_folder(folder, resume=resume, overwrite=overwrite)
            last, faults = newest_complete_checkpoint(checkpoints) if resume else (None, {})
            if last is not None:
                check_same_run(last, run)
            for name, fault in faults.items():
                kept = move_aside(checkpoints / name)
                logger.warning(f"{checkpoints / name} is not complete ({fault}): it is kept as {kept.name}.")
            if resume:
                start = "There is no complete checkpoint: training starts from the first step."
                logger.warning(start if last is None else f"Resuming from {last}.")
            else:
                remove_known_files(checkpoints)
            with explain_disk_errors(folder):
                write_run(checkpoints, run, replaces=read_manifest(folder) is not None)
            stack.enter_context(folder_lock(checkpoints))
        yield broadcast_object_list([last])[0]


def save_trained_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    result: TrainingResult,
    make_card: Callable[..., ModelCard],
) -> None:
    """Write the transformers folder of `result` atomically, and delete the checkpoints."""
    checkpoints = result.folder / CHECKPOINTS
    record_run_files(checkpoints)
    replace = read_manifest(result.folder) is not None
    with atomic_output_dir(result.folder, replace=replace, kept=set_aside(checkpoints)) as folder:
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder / "adapter"))
            model = cast(PreTrainedModel, model.merge_and_unload())
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / LOG_FILE).write_text(json.dumps(result.history, indent=1))
        make_card(model, name=result.folder.resolve().name, validation_loss=result.validation_loss).save(
            folder / "README.md"
        )
        copy_logs(checkpoints, folder)
    remove_known_files(checkpoints)


def copy_logs(checkpoints: Path, folder: Path) -> None:
    """Copy the logs of TensorBoard to `folder`, without the host name in their paths."""
    host = re.compile(rf"[._]{re.escape(socket.gethostname())}(?=[./]|$)")
    for log in files_below(checkpoints / TENSORBOARD):
        copied = folder / host.sub("", log.relative_to(checkpoints).as_posix())
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, copied)


def describe_run(
    model: PreTrainedModel, settings: TrainingSettings, provenance: str, examples: Dataset | IterableDataset
) -> dict[str, Any]:
    """Return the settings that must be equal to resume a run, as JSON values."""
    run = {"provenance": provenance, **dataclasses.asdict(settings), **model.config.to_dict()}
    run["training_data"] = describe_examples(examples)
    run.pop("transformers_version", None)  # may differ when a run is resumed
    return json.loads(json.dumps(run, default=str))


def describe_examples(examples: Dataset | IterableDataset) -> str:
    """Return the number of examples and a hash of the first, middle and last one; a stream is not read."""
    if not isinstance(examples, Sized):
        return "a stream"
    digest = hashlib.sha256()
    for number in sorted({0, len(examples) // 2, len(examples) - 1}):
        for name, value in sorted(examples[number].items()):
            digest.update(name.encode() + np.asarray(value).tobytes())
    return f"{len(examples)} examples, {digest.hexdigest()[:16]}"
