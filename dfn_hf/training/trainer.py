"""Trains models of this package or of transformers with a `Trainer`, resumes runs and saves transformers folders.

Causal language models train on packed blocks, encoder-decoders on pairs. Baselines use the same code and batches.
`torchrun --nproc-per-node 4 -m dfn_hf.cli train lm OUTPUT` trains on four devices.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_tensorboard_available
from transformers.utils import logging

from ..data.collators import PackedBlockCollator
from ..hub.model_card import model_card
from ..hub.output_folder import atomic_output_dir, explain_disk_errors
from .callbacks.flow_memory import FlowMemoryCallback
from .callbacks.progress_bar import ProgressBarCallback
from .checkpoints import (
    CHECKPOINTS,
    RUN_FILE,
    check_output_folder,
    check_same_run,
    last_checkpoint,
    remove_incomplete_checkpoints,
)
from .settings import TrainingSettings

LOG_FILE = "training_log.json"
TENSORBOARD = "runs"


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


class SearchSwitchCallback(TrainerCallback):
    """Uses exact neighbour search in the first steps of training and cell lists afterwards.

    A cell list proposes only entities in the query's own cells, so positions receive no gradient towards a match in
    another cell. Trained from scratch with small cells, a model may therefore not learn recall. Two settings avoid
    this: a coarsest cell that spans the whole ball, as in the default `cell_sizes`, so that the most recent distant
    entities are always proposed; or exact search in the first steps, which is fast on blocks up to 2,048 tokens. The
    remaining steps use cell lists, so that positions adapt to the search that is used at inference.

    Sets `model.config.search_implementation`, which the model reads in each forward pass, to `"exact"` or `"cells"`,
    and to `"cells"` at the end.

    Args:
        exact_search_ratio: fraction of the steps, from the first, with exact search.
    """

    def __init__(self, exact_search_ratio: float) -> None:
        self.exact_search_ratio = exact_search_ratio

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        searches_exactly = state.global_step < self.exact_search_ratio * state.max_steps
        kwargs["model"].config.search_implementation = "exact" if searches_exactly else "cells"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].config.search_implementation = "cells"


class MatrixDecayTrainer(Trainer):
    """A Trainer that applies weight decay to matrices only, not to biases, norms and other vectors."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters with two or more dimensions."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def train_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    train_blocks: Dataset | IterableDataset,
    validation_blocks: Dataset | IterableDataset,
    output_folder: str | Path,
    settings: TrainingSettings | None = None,
    *,
    provenance: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: Iterable[TrainerCallback] = (),
    data_collator: DataCollator | None = None,
    make_trainer: Callable[..., Trainer] = MatrixDecayTrainer,
) -> TrainingResult:
    """Train `model` and save the checkpoint with the lowest validation loss as a transformers folder.

    During training, checkpoints are in `output_folder/checkpoints`. At the end, the trained model replaces
    `output_folder`, including the checkpoints, in one atomic step; earlier content is kept until then. TensorBoard
    logs are written if TensorBoard is installed. On a GPU with bfloat16, training uses mixed precision.

    Args:
        model: model to train. With LoRA adapters (`dfn_hf.training.lora.add_lora`), the folder holds the merged model,
            and `adapter/` holds the adapter.
        tokenizer: tokenizer to save with the model; None for a model without text input.
        train_blocks, validation_blocks: packed blocks of `input_ids`, `labels`, `segment_ids`, each `[block_size]`,
            or examples for `data_collator`.
        output_folder: new or empty folder, unless `overwrite` or `resume`.
        settings: None means the defaults of `TrainingSettings`.
        provenance: one sentence for the model card: the training data and the initial model.
        resume: continue from the last complete checkpoint in `output_folder`, or start if there is none.
        overwrite: replace the content of `output_folder` at the end of training.
        progress: show a progress bar.
        callbacks: additional Trainer callbacks.
        data_collator: collates examples; None for packed blocks.
        make_trainer: Trainer class, or a function with the same arguments.

    Raises:
        ValueError: `output_folder` has content and neither `resume` nor `overwrite` is set, the run to resume had
            other settings, the tokenizer has ids outside the model's vocabulary, or training diverged.
        OSError: the disk is full; the last complete checkpoint is kept.
    """
    settings = settings or TrainingSettings()
    output_folder = Path(output_folder)
    check_output_folder(output_folder, resume=resume, overwrite=overwrite)
    base_model = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    check_model(base_model, tokenizer, settings)
    run = describe_run(base_model, settings, provenance)
    checkpoints = output_folder / CHECKPOINTS
    if not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    last = last_checkpoint(checkpoints)
    if last is not None:
        check_same_run(checkpoints, run)
    progress_bar = ProgressBarCallback()
    # The Trainer sets use_cache to False and the verbosity of transformers to its log_level.
    use_cache, verbosity = base_model.config.use_cache, logging.get_verbosity()
    trainer = make_trainer(
        model=model,
        args=training_arguments(checkpoints, settings, group_by_length=data_collator is not None),
        data_collator=data_collator or PackedBlockCollator(base_model),
        train_dataset=train_blocks,
        eval_dataset=validation_blocks,
        processing_class=tokenizer,
        callbacks=[FlowMemoryCallback(), *callbacks, *([progress_bar] if progress else [])],
    )
    trainer.remove_callback(PrinterCallback)
    if settings.exact_search_ratio > 0:
        trainer.add_callback(SearchSwitchCallback(settings.exact_search_ratio))

    try:
        run_trainer(trainer, checkpoints, run, last)
    finally:
        progress_bar.close()
        base_model.config.use_cache = use_cache
        logging.set_verbosity(verbosity)

    history = trainer.state.log_history
    initial_loss = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    best_loss = trainer.state.best_metric
    if best_loss is None or not math.isfinite(best_loss):
        raise ValueError(f"training diverged: lower learning_rate (--learning-rate), now {settings.learning_rate:g}")
    result = TrainingResult(output_folder, history, initial_loss, best_loss)
    if trainer.is_world_process_zero():
        export(trainer.accelerator.unwrap_model(trainer.model), tokenizer, result, settings, provenance)
    trainer.accelerator.wait_for_everyone()
    return result


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: TrainingSettings) -> None:
    """Raise ValueError if the tokenizer or the settings do not fit the model."""
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocab_size is {model.config.vocab_size}: "
            "use the model's own tokenizer"
        )
    if settings.exact_search_ratio and model.config.model_type != "dfn":
        raise ValueError(
            f"exact_search_ratio is {settings.exact_search_ratio:g} but a {model.config.model_type} has no neighbour "
            "search: remove exact_search_ratio (--exact-search-ratio)"
        )


def run_trainer(trainer: Trainer, checkpoints: Path, run: dict[str, Any], last: Path | None) -> None:
    """Write the description of the run, train, and delete incomplete checkpoints.

    Args:
        checkpoints: folder of the checkpoints.
        run: result of `describe_run`.
        last: checkpoint to resume from.
    """
    with explain_disk_errors(checkpoints.parent):
        if trainer.is_world_process_zero():
            checkpoints.mkdir(parents=True, exist_ok=True)
            (checkpoints / RUN_FILE).write_text(json.dumps(run, indent=2))
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            if trainer.is_world_process_zero():
                remove_incomplete_checkpoints(checkpoints)


def training_arguments(
    checkpoints: Path, settings: TrainingSettings, *, group_by_length: bool = False
) -> TrainingArguments:
    """Build the `TrainingArguments` for `settings`, also for use with another Trainer.

    Args:
        checkpoints: folder of the checkpoints.
        settings: settings of the run.
        group_by_length: batch examples of similar length, for examples that are not packed.
    """
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(checkpoints),
        use_cpu=not torch.accelerator.is_available(),  # without it, several processes on CPUs do not connect
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=on_gpu,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=settings.save_steps,
        save_steps=settings.save_steps,
        eval_on_start=True,
        prediction_loss_only=True,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=min(10, settings.max_steps),
        logging_nan_inf_filter=False,
        report_to="tensorboard" if is_tensorboard_available() else "none",
        remove_unused_columns=False,
        label_names=["labels"],
        train_sampling_strategy="group_by_length" if group_by_length else "random",
        seed=settings.seed,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        ddp_find_unused_parameters=False,
    )


def export(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    result: TrainingResult,
    settings: TrainingSettings,
    provenance: str,
) -> None:
    """Write the transformers folder of `result` atomically."""
    with atomic_output_dir(result.folder) as folder:
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder / "adapter"))
            model = cast(PreTrainedModel, model.merge_and_unload())
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / LOG_FILE).write_text(json.dumps(result.history, indent=1))
        card = model_card(
            model,
            name=result.folder.resolve().name,
            provenance=provenance,
            settings=dataclasses.asdict(settings),
            validation_loss=result.validation_loss,
        )
        card.save(folder / "README.md")
        logs = result.folder / CHECKPOINTS / TENSORBOARD
        if logs.is_dir():
            shutil.copytree(logs, folder / TENSORBOARD)


def describe_run(model: PreTrainedModel, settings: TrainingSettings, provenance: str) -> dict[str, Any]:
    """Everything that must be equal to resume a run, as JSON values."""
    run = {"provenance": provenance, **dataclasses.asdict(settings), **model.config.to_dict()}
    run.pop("transformers_version", None)  # may differ when a run is resumed
    return json.loads(json.dumps(run, default=str))
