"""Associative recall: train on 64 tokens, evaluate on thousands with and without far neighbours, then fine-tune."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, set_seed

from dfn_hf import DFNConfig

from ..baselines.models import ModelSize, build_model, count_parameters
from ..datasets.mqar import recall_accuracy, recall_batches
from ..harness.environment import describe_machine
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..harness.training_loop import fit

LEARNED_ACCURACY = 0.99
DECAY_RATIO = 0.2
FINE_TUNING_SEED = 20_000


@dataclass(frozen=True)
class RecallSettings:
    """One run: the model, its short training task, the long evaluation tasks, and the fine-tuning between them.

    Attributes:
        num_leaves: leaves of the tree that DFN's search reads.
        evaluation_seed: seed of the evaluation sequences.
    """

    model: str = "dfn"
    seed: int = 0
    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 128
    length: int = 64
    num_pairs: int = 8
    batch_size: int = 32
    steps: int = 1000
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    num_leaves: int = DFNConfig.num_leaves
    long_length: int = 2048
    long_num_pairs: int = 120
    tuning_length: int = 512
    tuning_num_pairs: int = 60
    tuning_batch_size: int = 8
    tuning_steps: int = 400
    tuning_learning_rate: float = 1e-3
    longest_length: int = 8192
    longest_num_pairs: int = 120
    long_batches: int = 16
    evaluation_seed: int = 50_000
    device: str = "cpu"


@dataclass(frozen=True)
class RecallResult:
    """Accuracies on query tokens.

    Attributes:
        steps_to_learn: step of the first evaluation with an accuracy of 0.99; None if it was not reached.
        short: on the training task.
        long: at `long_length`, without fine-tuning.
        long_without_far: at `long_length` with `num_neighbors` 0; None for other models.
        longest_before_tuning: at `longest_length`, without fine-tuning.
        longest: at `longest_length`, after fine-tuning.
        seconds: wall-clock time of training and evaluation.
    """

    parameters: int
    steps_to_learn: int | None
    short: float
    long: float
    long_without_far: float | None
    longest_before_tuning: float
    longest: float
    seconds: float
    machine: str


@dataclass(frozen=True)
class TrainedRecall:
    """A model trained on the short task, its accuracy there, and the first step with `LEARNED_ACCURACY`."""

    model: PreTrainedModel
    accuracy: float
    steps_to_learn: int | None
    largest_gradient_norm: float


def train_recall(
    settings: RecallSettings, report: Callable[[str], None] = lambda line: None, **dfn_options
) -> TrainedRecall:
    """Train a model on the short task, with the neighbour search of the evaluation from the first step."""
    set_seed(settings.seed)
    size = ModelSize(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
    )
    if settings.model == "dfn":
        dfn_options = {"num_leaves": settings.num_leaves} | dfn_options
    model = build_model(settings.model, size, device=settings.device, **dfn_options)
    task = {"length": settings.length, "num_pairs": settings.num_pairs, "vocab_size": settings.vocab_size}
    accuracies: dict[int, float] = {}

    def evaluate(step: int) -> None:
        accuracies[step] = recall_accuracy(model, seed=settings.evaluation_seed, num_batches=8, batch_size=32, **task)
        report(f"{settings.model}, seed {settings.seed}: step {step}, accuracy {accuracies[step]:.3f}")

    trained = fit(
        model,
        recall_batches(settings.seed, batch_size=settings.batch_size, **task),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        decay_ratio=DECAY_RATIO,
        evaluate=evaluate,
    )
    return TrainedRecall(
        model=model,
        accuracy=accuracies[settings.steps],
        steps_to_learn=next((step for step, accuracy in accuracies.items() if accuracy >= LEARNED_ACCURACY), None),
        largest_gradient_norm=trained.largest_gradient_norm,
    )


def long_recall(model: PreTrainedModel, settings: RecallSettings) -> float:
    """Return the accuracy at `long_length`."""
    return recall_accuracy(
        model,
        seed=settings.evaluation_seed,
        num_batches=settings.long_batches,
        batch_size=1,
        length=settings.long_length,
        num_pairs=settings.long_num_pairs,
        vocab_size=settings.vocab_size,
    )


def longest_recall(model: PreTrainedModel, settings: RecallSettings) -> float:
    """Return the accuracy at `longest_length`."""
    return recall_accuracy(
        model,
        seed=settings.evaluation_seed,
        num_batches=settings.long_batches,
        batch_size=1,
        length=settings.longest_length,
        num_pairs=settings.longest_num_pairs,
        vocab_size=settings.vocab_size,
    )


def measure_recall(settings: RecallSettings, report: Callable[[str], None] = lambda line: None) -> RecallResult:
    """Train on the short task, evaluate on the long ones, fine-tune, and evaluate on the longest one."""
    started = time.perf_counter()
    trained_recall = train_recall(settings, report)
    model = trained_recall.model
    long = long_recall(model, settings)
    long_without_far = _long_recall_without_far(model, settings)
    longest_before_tuning = longest_recall(model, settings)
    report(
        f"{settings.model}, seed {settings.seed}: {settings.long_length} tokens {long:.3f}, "
        f"{settings.longest_length} tokens {longest_before_tuning:.3f}; fine-tuning"
    )
    _fine_tune(model, settings)
    return RecallResult(
        parameters=count_parameters(model),
        steps_to_learn=trained_recall.steps_to_learn,
        short=trained_recall.accuracy,
        long=long,
        long_without_far=long_without_far,
        longest_before_tuning=longest_before_tuning,
        longest=longest_recall(model, settings),
        seconds=round(time.perf_counter() - started, 1),
        machine=describe_machine(settings.device),
    )


def run_recall(
    runs: Iterable[RecallSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[RecallSettings, RecallResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, RecallSettings, RecallResult)
    return [(run, results.run(run, lambda settings: measure_recall(settings, report))) for run in runs]


def recall_table(results: list[tuple[RecallSettings, RecallResult]]) -> str:
    """Return a table with one row per model: mean ± standard error over seeds."""
    settings = results[0][0]
    header = (
        "model",
        "seeds",
        f"{settings.length} tokens, {settings.num_pairs} pairs",
        f"steps to {LEARNED_ACCURACY}",
        f"{settings.long_length} / {settings.long_num_pairs}, zero-shot",
        f"{settings.long_length} / {settings.long_num_pairs}, K = 0",
        f"{settings.longest_length} / {settings.longest_num_pairs}, zero-shot",
        f"{settings.longest_length} / {settings.longest_num_pairs}, {settings.tuning_steps} steps at "
        f"{settings.tuning_length}",
        "minutes",
    )
    lines = []
    for name in dict.fromkeys(run.model for run, _ in results):
        found = [result for run, result in results if run.model == name]
        lines.append(
            (
                name,
                str(len(found)),
                mean_with_error([one.short for one in found]),
                mean_with_error([one.steps_to_learn for one in found], digits=0),
                mean_with_error([one.long for one in found]),
                mean_with_error([one.long_without_far for one in found]),
                mean_with_error([one.longest_before_tuning for one in found]),
                mean_with_error([one.longest for one in found]),
                mean_with_error([one.seconds / 60 for one in found], digits=1),
            )
        )
    return markdown_table(header, lines)


def _long_recall_without_far(model: PreTrainedModel, settings: RecallSettings) -> float | None:
    if not hasattr(model.config, "num_neighbors"):
        return None
    trained_with = model.config.num_neighbors
    model.config.num_neighbors = 0
    try:
        return long_recall(model, settings)
    finally:
        model.config.num_neighbors = trained_with


def _fine_tune(model: PreTrainedModel, settings: RecallSettings) -> None:
    if settings.tuning_steps == 0:
        return
    fit(
        model,
        recall_batches(
            FINE_TUNING_SEED + settings.seed,
            batch_size=settings.tuning_batch_size,
            length=settings.tuning_length,
            num_pairs=settings.tuning_num_pairs,
            vocab_size=settings.vocab_size,
        ),
        steps=settings.tuning_steps,
        learning_rate=settings.tuning_learning_rate,
        weight_decay=settings.weight_decay,
        decay_ratio=DECAY_RATIO,
    )
