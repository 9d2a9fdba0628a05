"""Ablations of DFN: one part removed or changed at a time, the rest at its default."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..harness.environment import peak_memory_mib, run_isolated, set_up_device
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..recall.associative_recall import RecallSettings, long_recall, train_recall
from .byte_lm import ByteLMSettings, measure_byte_lm

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no flow (α = 0)": {"flow_step": 0.0},
    "one moved position": {"moved_query": False},
    "carried positions": {"carry_positions": True},
    "no far neighbours (K = 0)": {"num_neighbors": 0},
    "8 memory slots": {"memory_slots": 8},
    "FlowNorm none": {"flow_norm": "none"},
    "FlowNorm rms": {"flow_norm": "rms"},
    "FlowNorm running": {"flow_norm": "running"},
}


@dataclass(frozen=True)
class AblationSettings:
    """One variant and seed; the byte language model and the recall model have the same width, depth and heads."""

    variant: str = "full"
    seed: int = 0
    hidden_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 192
    learning_rate: float = 3e-3
    lm_steps: int = 400
    lm_batch_size: int = 8
    lm_length: int = 256
    lm_windows: int = 128
    recall_steps: int = 1000
    recall_batch_size: int = 32
    long_length: int = 2048
    long_num_pairs: int = 120
    long_batches: int = 4
    evaluation_seed: int = 10_000
    device: str = "cpu"


@dataclass(frozen=True)
class AblationResult:
    """Byte language model: loss in nats per byte, accuracies, peak MiB, largest gradient norm. Recall: accuracies."""

    loss: float
    top1: float
    top5: float
    short_recall: float
    long_recall: float
    peak_mib: float
    largest_gradient_norm: float
    machine: str


def measure_ablation(settings: AblationSettings, threads: int) -> AblationResult:
    """Train both models of one variant, each in a fresh process.

    Raises:
        ValueError: the variant is unknown.
    """
    if settings.variant not in VARIANTS:
        raise ValueError(f"variant is {settings.variant!r}: choose one of {', '.join(VARIANTS)}")
    result = run_isolated(_train_byte_lm, settings, threads)
    return AblationResult(**result, **run_isolated(_train_recall, settings, threads))


def run_ablations(
    settings: Iterable[AblationSettings], path: Path, threads: int, report: Callable[[str], None] = lambda line: None
) -> list[tuple[AblationSettings, AblationResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, AblationSettings, AblationResult)
    finished = []
    for run in settings:
        result = results.run(run, partial(measure_ablation, threads=threads))
        report(f"{run.variant}, seed {run.seed}: loss {result.loss:.3f}, long recall {result.long_recall:.3f}")
        finished.append((run, result))
    return finished


def ablation_table(results: Sequence[tuple[AblationSettings, AblationResult]]) -> str:
    """Return a table with one row per variant: mean ± standard error over seeds."""
    settings = results[0][0]
    columns: dict[str, tuple[str, int]] = {
        "loss, nats per byte": ("loss", 3),
        "top-1": ("top1", 3),
        "top-5": ("top5", 3),
        "recall, 64 tokens": ("short_recall", 3),
        f"recall, {settings.long_length} tokens": ("long_recall", 3),
        "peak memory, MiB": ("peak_mib", 0),
        "largest gradient norm": ("largest_gradient_norm", 1),
    }
    lines = []
    for variant in dict.fromkeys(run.variant for run, _ in results):
        found = [result for run, result in results if run.variant == variant]
        cells = [mean_with_error([getattr(one, field) for one in found], digits) for field, digits in columns.values()]
        lines.append((variant, str(len(found)), *cells))
    return markdown_table(("variant", "seeds", *columns), lines)


def _train_byte_lm(settings: AblationSettings, threads: int) -> dict[str, Any]:
    set_up_device(settings.device, threads)
    result = measure_byte_lm(
        ByteLMSettings(
            seed=settings.seed,
            learning_rate=settings.learning_rate,
            steps=settings.lm_steps,
            batch_size=settings.lm_batch_size,
            length=settings.lm_length,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            intermediate_size=settings.intermediate_size,
            evaluation_windows=settings.lm_windows,
            device=settings.device,
        ),
        **VARIANTS[settings.variant],
    )
    return {
        "loss": result.loss,
        "top1": result.top1,
        "top5": result.top5,
        "largest_gradient_norm": result.largest_gradient_norm,
        "peak_mib": round(peak_memory_mib(settings.device), 1),
        "machine": result.machine,
    }


def _train_recall(settings: AblationSettings, threads: int) -> dict[str, Any]:
    set_up_device(settings.device, threads)
    recall = RecallSettings(
        seed=settings.seed,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
        batch_size=settings.recall_batch_size,
        steps=settings.recall_steps,
        learning_rate=settings.learning_rate,
        long_length=settings.long_length,
        long_num_pairs=settings.long_num_pairs,
        long_batches=settings.long_batches,
        evaluation_seed=settings.evaluation_seed,
        device=settings.device,
    )
    trained_recall = train_recall(recall, **VARIANTS[settings.variant])
    return {"short_recall": trained_recall.accuracy, "long_recall": long_recall(trained_recall.model, recall)}
