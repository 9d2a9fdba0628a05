"""Trains models of this package or of transformers with a `Trainer`, resumes runs and saves transformers folders.

Causal language models train on packed blocks, encoder-decoders on pairs. Baselines use the same code and batches.
`torchrun --nproc-per-node 4 -m dfn_hf.cli train lm OUTPUT` trains on four devices.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import is_tensorboard_available

from ..data.collators import PackedBlockCollator
from ..evaluation.language_model import check_vocabulary
from ..hub.model_card import model_card
from ..storage.disk_errors import explain_disk_errors
from .callbacks.complete_checkpoints import CompleteCheckpointsCallback
from .callbacks.flow_memory import FlowMemoryCallback
from .callbacks.progress_bar import ProgressBarCallback
from .checkpoints import CHECKPOINTS, remove_interrupted_saves
from .run import TrainingResult, begin_run, describe_run, save_trained_model
from .settings import TrainingSettings


class MatrixDecayTrainer(Trainer):
    """A Trainer that applies weight decay to matrices only, not to biases, norms and other vectors.

    Tied weights, which are saved once, are not reported as missing when the best checkpoint is loaded.
    """

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters with two or more dimensions."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))


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
    make_card: Callable[..., ModelCard] = model_card,
) -> TrainingResult:
    """Train `model` and save the checkpoint with the lowest validation loss as a transformers folder.

    During training, checkpoints are in `output_folder/checkpoints`. At the end, the trained model takes the place of
    what was there in one step, and the checkpoints are deleted. Only files that this package wrote are deleted.
    TensorBoard logs are written if TensorBoard is installed. On a GPU with bfloat16, training uses mixed precision.

    Args:
        model: model to train. With LoRA adapters (`dfn_hf.training.lora.add_lora`), the folder holds the merged model,
            and `adapter/` holds the adapter.
        tokenizer: tokenizer to save with the model; None for a model without text input.
        train_blocks, validation_blocks: packed blocks of `input_ids`, `labels`, `segment_ids`, each `[block_size]`,
            or examples for `data_collator`.
        output_folder: new or empty folder, unless `overwrite` or `resume`.
        settings: None means the defaults of `TrainingSettings`.
        provenance: one sentence for the model card: the training data and the initial model.
        resume: continue from the newest complete checkpoint in `output_folder`, or start if there is none.
        overwrite: replace a model and checkpoints in `output_folder` that this package wrote.
        progress: show a progress bar.
        callbacks: additional Trainer callbacks.
        data_collator: collates examples; None for packed blocks.
        make_trainer: Trainer class, or a function with the same arguments.
        make_card: makes the model card, with the arguments of `model_card`.

    Raises:
        ValueError: `output_folder` has content that may not be replaced, the run to resume had other settings or no
            complete checkpoint, another process trains in `output_folder`, the tokenizer has ids outside the model's
            vocabulary, or training diverged.
        OSError: the disk is full; the last complete checkpoint is kept.
    """
    settings = settings or TrainingSettings()
    output_folder = Path(output_folder)
    base_model = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    check_model(base_model, tokenizer)
    run = describe_run(base_model, settings, provenance, train_blocks)
    checkpoints = output_folder / CHECKPOINTS
    arguments = training_arguments(checkpoints, settings, group_by_length=data_collator is not None)
    progress_bar = ProgressBarCallback()
    use_cache = base_model.config.use_cache  # the Trainer sets it to False
    with begin_run(output_folder, run, resume=resume, overwrite=overwrite) as last:
        trainer = make_trainer(
            model=model,
            args=arguments,
            data_collator=data_collator or PackedBlockCollator(base_model),
            train_dataset=train_blocks,
            eval_dataset=validation_blocks,
            processing_class=tokenizer,
            callbacks=[
                CompleteCheckpointsCallback(checkpoints),
                FlowMemoryCallback(),
                *callbacks,
                *([progress_bar] if progress else []),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            run_trainer(trainer, checkpoints, last)
        finally:
            progress_bar.close()
            base_model.config.use_cache = use_cache

        history = trainer.state.log_history
        initial_loss = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
        best_loss = trainer.state.best_metric
        if best_loss is None or not math.isfinite(best_loss):
            raise ValueError(
                f"training diverged: lower learning_rate (--learning-rate), now {settings.learning_rate:g}"
            )
        result = TrainingResult(output_folder, history, initial_loss, best_loss)
        if trainer.is_world_process_zero():
            trained = trainer.accelerator.unwrap_model(trainer.model)
            card = partial(make_card, settings=asdict(settings), provenance=provenance)
            save_trained_model(trained, tokenizer, result, card)
        trainer.accelerator.wait_for_everyone()
    return result


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise ValueError if the tokenizer does not fit the model."""
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)


def run_trainer(trainer: Trainer, checkpoints: Path, last: Path | None) -> None:
    """Train from the checkpoint `last` or from the first step, and delete what a failed save leaves."""
    log = logging.getLogger("transformers.trainer")
    with explain_disk_errors(checkpoints.parent, remedy="continue with --resume"):
        try:
            log.addFilter(is_not_about_a_moved_run)
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            log.removeFilter(is_not_about_a_moved_run)
            if trainer.is_world_process_zero():
                remove_interrupted_saves(checkpoints)


def is_not_about_a_moved_run(record: logging.LogRecord) -> bool:
    """Filter of the Trainer's warning about a moved best checkpoint, which `CompleteCheckpointsCallback` finds."""
    return "recorded in the resumed state does not exist" not in record.getMessage()


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
        ddp_find_unused_parameters=False,
    )
