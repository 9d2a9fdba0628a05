"""Distils a causal language model (teacher) into a DFN that was converted from it (student).

In the first phase each layer of the student reads the teacher's hidden states and is fitted to the output of the
teacher's layer. In the second phase the student runs end to end and is fitted to the teacher's next-token
distribution. Checkpoints, resuming and progress are those of `train_model`.
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
from .run import TrainingResult
from .settings import TrainingSettings
from .trainer import MatrixDecayTrainer, train_model

IGNORED_LABEL = -100
LABEL_WEIGHT = 0.3  # weight of the cross-entropy with the labels; the KL divergence from the teacher has weight 1


@dataclass(frozen=True)
class DistillationSettings(TrainingSettings):
    """Settings of a distillation; the defaults are many small steps, which need fewer tokens than few large ones.

    Attributes:
        layerwise_ratio: fraction of the steps, from the first, that fit each layer separately.

    The other attributes are those of `TrainingSettings`.
    """

    max_steps: int = 400
    batch_size: int = 1
    save_steps: int = 100
    layerwise_ratio: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.layerwise_ratio <= 1:
            raise ValueError(f"layerwise_ratio must be between 0 and 1, got {self.layerwise_ratio}")


@dataclass(frozen=True)
class DistillationResult(TrainingResult):
    """Result of a finished distillation.

    Attributes:
        teacher_loss: validation loss of the teacher, in nats per token.
        num_tokens: training tokens processed, over all epochs.
        operations: floating-point operations of the run, `num_tokens` times `operations_per_token`.

    The other attributes are those of `TrainingResult`.
    """

    teacher_loss: float
    num_tokens: int
    operations: float


class DistillationTrainer(MatrixDecayTrainer):
    """A Trainer whose training loss compares the student with a teacher. Evaluation uses the language-model loss.

    Args:
        teacher: a causal language model; it is frozen.
        layerwise_ratio: see `DistillationSettings`.
        options: arguments of `Trainer`, except `data_collator`: batches are packed blocks in the teacher's format,
            which a DFN also accepts.
    """

    def __init__(self, *, teacher: PreTrainedModel, layerwise_ratio: float, **options: Any) -> None:
        super().__init__(**options | {"data_collator": PackedBlockCollator(teacher)})
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.layerwise_ratio = layerwise_ratio
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the tokens of one forward pass

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
            teacher_outputs = self.teacher(**inputs, use_cache=False, output_hidden_states=layerwise)
        if layerwise:
            layers = self.accelerator.unwrap_model(model).model.layers
            with teacher_forced(layers, teacher_outputs.hidden_states):
                student_outputs = model(**inputs, output_hidden_states=True)
        else:
            student_outputs = model(**inputs)
        predicted, expected = (outputs.logits[:, :-1][scored] for outputs in (student_outputs, teacher_outputs))
        loss = kl_divergence(predicted, expected) + LABEL_WEIGHT * F.cross_entropy(predicted, labels[scored])
        if layerwise:
            loss = loss + layerwise_error(student_outputs.hidden_states, teacher_outputs.hidden_states)
        return (loss, student_outputs) if return_outputs else loss

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
    """Fit `student` to `teacher` and save the checkpoint with the lowest validation loss as a transformers folder.

    Args:
        student: a DFN with the teacher's layers, for example from `dfn-hf convert --from llama`.
        teacher: the causal language model from which the student was converted.
        tokenizer: tokenizer of both; saved with the student.
        train_blocks, validation_blocks: packed blocks of `input_ids`, `labels`, `segment_ids`, each `[block_size]`.
        output_folder: new or empty folder, unless `overwrite` or `resume` is given.
        settings: None means the defaults of `DistillationSettings`.
        options: `provenance`, `resume`, `overwrite`, `progress` and `callbacks` of `train_model`.

    Raises:
        ValueError: student and teacher differ in vocabulary size, hidden size or number of layers, or `train_model`
            raises it.
        OSError: the disk is full; the last complete checkpoint is kept.
    """
    settings = settings or DistillationSettings()
    check_pair(student, teacher)
    for role, model in (("student", student), ("teacher", teacher)):
        if model.name_or_path and Path(model.name_or_path).resolve() == Path(output_folder).resolve():
            raise ValueError(f"{output_folder} holds the {role}: give another output folder")
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
    """Raise ValueError unless the student is a DFN with the teacher's vocabulary size, width and number of layers."""
    if student.config.model_type != "dfn":
        raise ValueError(
            f"the student has model_type {student.config.model_type!r}: give a DFN (dfn-hf convert --from llama)"
        )
    for field in ("vocab_size", "hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(student.config, field), getattr(teacher.config, field)
        if ours != theirs:
            raise ValueError(
                f"{field} is {ours} in the student and {theirs} in the teacher: give a student that was converted "
                "from this teacher (dfn-hf convert --from llama)"
            )


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless both tokenizers map every token to the same id."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    for token in ours.keys() | theirs.keys():
        if ours.get(token) != theirs.get(token):
            raise ValueError(
                f"the token {token!r} has id {ours.get(token)} in the student's tokenizer and {theirs.get(token)} in "
                "the teacher's: use the same tokenizer for both"
            )


@contextmanager
def teacher_forced(layers: Sequence[torch.nn.Module], states: Sequence[torch.Tensor]) -> Iterator[None]:
    """Feed the teacher's hidden states to every layer except the first, instead of the previous layer's output.

    Args:
        layers: layers of the student.
        states: the teacher's embeddings and the output of each of its layers, each `[B, M, hidden_size]`.
    """

    def replace_input(state: torch.Tensor, layer: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return state, *arguments[1:]

    later = zip(layers[1:], states[1:-1], strict=True)
    hooks = [layer.register_forward_pre_hook(partial(replace_input, state)) for layer, state in later]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layerwise_error(student_states: Sequence[torch.Tensor], teacher_states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared error of each layer's output, relative to the squared change by the teacher's layer; mean over layers.

    Args:
        student_states: the student's embeddings and layer outputs for the teacher's hidden states, the last after the
            final norm, each `[B, M, hidden_size]`.
        teacher_states: the teacher's, likewise.
    """
    errors = []
    for before, ours, theirs in zip(teacher_states[:-1], student_states[1:], teacher_states[1:], strict=True):
        errors.append(F.mse_loss(ours, theirs) / F.mse_loss(before, theirs))
    return torch.stack(errors).mean()


def kl_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) in nats, mean over the N rows of logits `[N, vocab_size]`."""
    ours, theirs = (logits.float().log_softmax(dim=-1) for logits in (student_logits, teacher_logits))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def operations_per_token(student: Any, teacher: Any) -> int:
    """Floating-point operations per token, without embeddings: 6 per student parameter, 2 per teacher parameter."""
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
