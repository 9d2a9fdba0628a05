"""Distillation of a causal language model into a DFN that was made from it.

First every layer of the student reads the teacher's states and learns to give what the teacher's layer gives; then
the layers read each other and the student learns the teacher's distribution over next tokens. It is a training run
like any other: checkpoints, resuming, progress and the folder that appears whole are those of `training`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.collators import PackedBlockCollator
from .trainer import MatrixDecayTrainer, TrainingResult, TrainingSettings, train_model

IGNORED_LABEL = -100
LABEL_WEIGHT = 0.3  # of the text's own tokens beside the teacher's distribution


@dataclass(frozen=True)
class DistillationSettings(TrainingSettings):
    """What a distillation does: many small steps, which go further on as many tokens than few large ones.

    Attributes:
        layerwise_ratio: share of the steps, from the first, that fit each layer alone.

    The others are those of `TrainingSettings`.
    """

    max_steps: int = 400
    batch_size: int = 1
    save_steps: int = 100
    layerwise_ratio: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.layerwise_ratio <= 1:
            raise ValueError(f"layerwise_ratio must lie between 0 and 1, got {self.layerwise_ratio}")


@dataclass(frozen=True)
class DistillationResult(TrainingResult):
    """What a finished distillation leaves.

    Attributes:
        teacher_loss: the teacher's validation loss, in nats per token.
        num_tokens: tokens distilled on, those read again included.
        operations: floating-point operations of it all, `num_tokens` times `operations_per_token`.

    The others are those of `TrainingResult`.
    """

    teacher_loss: float
    num_tokens: int
    operations: float


class DistillationTrainer(MatrixDecayTrainer):
    """A Trainer whose loss is the student's difference from a teacher; evaluated like any language model.

    Args:
        teacher: a causal language model; it is frozen.
        layerwise_ratio: see `DistillationSettings`.
        options: those of `Trainer`, but for the collator: batches are packed blocks as the teacher takes them, which
            a DFN does too.
    """

    def __init__(self, *, teacher: PreTrainedModel, layerwise_ratio: float, **options: Any) -> None:
        super().__init__(**options | {"data_collator": PackedBlockCollator(teacher)})
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.layerwise_ratio = layerwise_ratio
        self.model_accepts_loss_kwargs = False  # losses are means over the tokens of a forward pass

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        scored = labels != IGNORED_LABEL
        layerwise = self.state.global_step < self.layerwise_ratio * self.state.max_steps
        with torch.no_grad():
            taught = self.teacher(**inputs, use_cache=False, output_hidden_states=layerwise)
        if layerwise:
            layers = self.accelerator.unwrap_model(model).model.layers
            with teacher_forced(layers, taught.hidden_states):
                learnt = model(**inputs, output_hidden_states=True)
        else:
            learnt = model(**inputs)
        predicted, expected = (outputs.logits[:, :-1][scored] for outputs in (learnt, taught))
        loss = divergence(predicted, expected) + LABEL_WEIGHT * F.cross_entropy(predicted, labels[scored])
        if layerwise:
            loss = loss + layerwise_error(learnt.hidden_states, taught.hidden_states)
        return (loss, learnt) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return inputs["input_ids"].numel() * operations_per_token(self.model, self.teacher)


def distill_model(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_blocks: Dataset | IterableDataset,
    validation_blocks: Dataset | IterableDataset,
    output_folder: str | Path,
    settings: DistillationSettings | None = None,
    **options: Any,
) -> DistillationResult:
    """Fit `student` to `teacher` and save the best checkpoint by validation loss as a transformers folder.

    Args:
        student: a DFN with the teacher's layers, such as `dfn-hf convert --from llama` makes.
        teacher: the causal language model that it was made from.
        tokenizer: of both; saved beside the student.
        train_blocks, validation_blocks: packed blocks of `input_ids`, `labels`, `segment_ids`, each `[block_size]`.
        output_folder: must be new or empty, unless `overwrite` or `resume` is among the options.
        settings: None means the defaults of `DistillationSettings`.
        options: `provenance`, `resume`, `overwrite`, `progress` and `callbacks` as `train_model` takes them.

    Raises:
        ValueError: student and teacher differ in their vocabulary, their width or their number of layers; or what
            `train_model` refuses.
        OSError: the disk is full. The last complete checkpoint stays.
    """
    settings = settings or DistillationSettings()
    check_pair(student, teacher)
    for role, model in (("student", student), ("teacher", teacher)):
        if model.name_or_path and Path(model.name_or_path).resolve() == Path(output_folder).resolve():
            raise ValueError(f"{output_folder} holds the {role}: choose another folder for the result")
    teacher_loss = blocks_loss(teacher, validation_blocks, settings.batch_size)
    result = train_model(
        student,
        tokenizer,
        train_blocks,
        validation_blocks,
        output_folder,
        settings,
        make_trainer=partial(DistillationTrainer, teacher=teacher, layerwise_ratio=settings.layerwise_ratio),
        **options,
    )
    operations = result.history[-1]["total_flos"]
    num_tokens = round(operations / operations_per_token(student, teacher))
    return DistillationResult(**vars(result), teacher_loss=teacher_loss, num_tokens=num_tokens, operations=operations)


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError unless the student is a DFN whose states and tokens mean what the teacher's do."""
    if student.config.model_type != "dfn":
        raise ValueError(f"the student is a {student.config.model_type}: give a DFN (dfn-hf convert --from llama)")
    for field in ("vocab_size", "hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(student.config, field), getattr(teacher.config, field)
        if ours != theirs:
            raise ValueError(
                f"{field} is {ours} in the student and {theirs} in the teacher: give the student that was made from "
                "this teacher (dfn-hf convert --from llama)"
            )


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where an id means another token to the student than to the teacher."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    for token in ours.keys() | theirs.keys():
        if ours.get(token) != theirs.get(token):
            raise ValueError(
                f"the token {token!r} is id {ours.get(token)} to the student and {theirs.get(token)} to the teacher: "
                "both need the same tokenizer"
            )


@contextmanager
def teacher_forced(layers: Sequence[torch.nn.Module], states: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let every layer but the first read the teacher's states in the place of what the layer before it gave.

    Args:
        layers: of the student.
        states: the teacher's embeddings and the output of each of its layers, each `[B, M, hidden_size]`.
    """

    def read(given: torch.Tensor, layer: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return given, *arguments[1:]

    later = zip(layers[1:], states[1:-1], strict=True)
    hooks = [layer.register_forward_pre_hook(partial(read, given)) for layer, given in later]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layerwise_error(learnt: Sequence[torch.Tensor], taught: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared error of every layer's output over the square of what the teacher's layer changed, mean over layers.

    Args:
        learnt, taught: embeddings and the output of each layer, the last after the final norm, each
            `[B, M, hidden_size]`; what the student's layer gave for the teacher's input.
    """
    errors = []
    for before, ours, theirs in zip(taught[:-1], learnt[1:], taught[1:], strict=True):
        errors.append(F.mse_loss(ours, theirs) / F.mse_loss(before, theirs))
    return torch.stack(errors).mean()


def divergence(learnt: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher ‖ student) in nats of logits `[N, vocab_size]`."""
    ours, theirs = (logits.float().log_softmax(dim=-1) for logits in (learnt, taught))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def operations_per_token(student: Any, teacher: Any) -> int:
    """6 per parameter of the student, forward and backward, and 2 of the teacher, forward; without embeddings."""
    return 6 * student.num_parameters(exclude_embeddings=True) + 2 * teacher.num_parameters(exclude_embeddings=True)


@torch.no_grad()
def blocks_loss(model: PreTrainedModel, blocks: Dataset | IterableDataset, batch_size: int) -> float:
    """Loss of `model` on packed blocks, in nats per token."""
    model.eval()
    total, num_tokens = 0.0, 0
    for batch in DataLoader(blocks, batch_size, collate_fn=PackedBlockCollator(model)):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        scored = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
        total += float(model(**batch, use_cache=False).loss) * scored
        num_tokens += scored
    return total / num_tokens
