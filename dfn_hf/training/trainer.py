"""Training of language models, with a `Trainer` that resumes and saves whole folders.

Works for the models of this package and for any other of transformers, so that a baseline is trained on the same
batches by the same code: causal ones on packed blocks, encoder-decoders on pairs.
`torchrun --nproc-per-node 4 -m dfn_hf.cli train …` trains on several devices.
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

from ..data.collators import PackedBlockCollator
from ..hub.model_card import model_card
from ..hub.output_folder import explain_disk_errors, atomic_output_dir
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
    """What a finished run leaves.

    Attributes:
        folder: a transformers folder with the best checkpoint by validation loss, the tokenizer, a model card and
            `training_log.json`.
        history: the Trainer's log: entries with `step` and `loss`, `learning_rate`, `grad_norm` (a training log) or
            `eval_loss` (an evaluation; the first is from before the first step).
        initial_loss: validation loss before the first step, in nats per token.
        validation_loss: validation loss of the saved model, in nats per token.
    """

    folder: Path
    history: list[dict[str, float]]
    initial_loss: float
    validation_loss: float


class SearchSwitchCallback(TrainerCallback):
    """Train with exact neighbour search first, then with cell lists.

    A cell list proposes only entities of the reader's own cells, so positions get no gradient towards a match that
    lies elsewhere: trained from scratch with small cells, a model may not learn to recall. Two recipes help. Either
    the coarsest cell spans the whole ball, so that the most recent far entities are always proposed (the default
    `cell_sizes` do), or the first steps search exactly, which is quick on blocks up to 2,048 tokens, and cell lists
    take over for the rest, so that positions adapt to the search that the model will be used with.

    Sets `model.config.search_implementation`, read by the model in each forward pass, and leaves it at `"cells"`.

    Args:
        exact_share: share of the steps, from the first, that search exactly.
    """

    def __init__(self, exact_share: float) -> None:
        self.exact_share = exact_share

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        searches_exactly = state.global_step < self.exact_share * state.max_steps
        kwargs["model"].config.search_implementation = "exact" if searches_exactly else "cells"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].config.search_implementation = "cells"


class MatrixDecayTrainer(Trainer):
    """A Trainer whose weight decay spares every scale, decay and bias, whatever its name."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters with two dimensions or more."""
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
    """Train `model` and save the best checkpoint by validation loss as a transformers folder.

    Checkpoints go to `output_folder/checkpoints` while training runs. When it has ended, the model takes the place of
    `output_folder` in one step, and the checkpoints go. Until then what stood in `output_folder` stays. TensorBoard
    logs are written when it is installed. On a GPU that has bfloat16, training runs in mixed precision.

    Args:
        model: a language model, or one with LoRA (`dfn_hf.training.lora.add_lora`). With LoRA the folder holds the merged
            model, which loads like any other, and in `adapter/` the adapter alone.
        tokenizer: saved beside the model; None for a model that reads no text.
        train_blocks, validation_blocks: packed blocks of `input_ids`, `labels`, `segment_ids`, each `[block_size]`;
            or what `data_collator` takes.
        output_folder: must be new or empty, unless `overwrite` or `resume`.
        settings: None means the defaults of `TrainingSettings`.
        provenance: one sentence for the model card: which text, and which model it started from.
        resume: go on from the last complete checkpoint in `output_folder`, or start if there is none.
        overwrite: replace what stands in `output_folder` once training has ended.
        progress: show a progress bar.
        callbacks: further Trainer callbacks.
        data_collator: makes batches; None for packed blocks.
        make_trainer: gives the Trainer for the arguments of one.

    Raises:
        ValueError: `output_folder` holds something that neither `resume` nor `overwrite` allows to touch, or the
            unfinished run in it had other settings; the tokenizer has ids outside the model's vocabulary; or training
            diverged.
        OSError: the disk is full. The last complete checkpoint stays.
    """
    settings = settings or TrainingSettings()
    output_folder = Path(output_folder)
    check_output_folder(output_folder, resume=resume, overwrite=overwrite)
    base_model = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    if tokenizer is not None and len(tokenizer) > base_model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocab_size is {base_model.config.vocab_size}: "
            "use the tokenizer the model was made for"
        )
    if settings.exact_search_ratio and base_model.config.model_type != "dfn":
        raise ValueError(
            f"exact_search_ratio is {settings.exact_search_ratio:g} and a {base_model.config.model_type} searches for "
            "nothing: leave it out (--exact-search-ratio)"
        )
    use_cache = base_model.config.use_cache
    run = describe_run(base_model, settings, provenance)
    checkpoints = output_folder / CHECKPOINTS
    if not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    last = last_checkpoint(checkpoints)
    if last is not None:
        check_same_run(checkpoints, run)
    progress_bar = ProgressBarCallback()
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

    with explain_disk_errors(output_folder):
        if trainer.is_world_process_zero():
            checkpoints.mkdir(parents=True, exist_ok=True)
            (checkpoints / RUN_FILE).write_text(json.dumps(run, indent=2))
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            progress_bar.close()
            if trainer.is_world_process_zero():
                remove_incomplete_checkpoints(checkpoints)
            base_model.config.use_cache = use_cache  # which the Trainer turned off

    history = trainer.state.log_history
    initial_loss = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    best_loss = trainer.state.best_metric
    if best_loss is None or not math.isfinite(best_loss):
        raise ValueError(f"training diverged: lower learning_rate (now {settings.learning_rate:g})")
    result = TrainingResult(output_folder, history, initial_loss, best_loss)
    if trainer.is_world_process_zero():
        export(trainer.accelerator.unwrap_model(trainer.model), tokenizer, result, settings, provenance)
    trainer.accelerator.wait_for_everyone()
    return result


def training_arguments(
    checkpoints: Path, settings: TrainingSettings, *, group_by_length: bool = False
) -> TrainingArguments:
    """The Trainer's arguments for `settings`, to change and use with a Trainer of one's own.

    Args:
        group_by_length: make batches of rows about as long as each other, where rows are not packed.
    """
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(checkpoints),
        use_cpu=not torch.accelerator.is_available(),  # said, so that several processes find each other on CPUs too
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
    """Write the transformers folder of `result`, whole or not at all."""
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
    """All that must be the same for a run to be resumed, as JSON gives it back."""
    run = {"provenance": provenance, **dataclasses.asdict(settings), **model.config.to_dict()}
    run.pop("transformers_version", None)  # which may be a newer one by now
    return json.loads(json.dumps(run, default=str))
