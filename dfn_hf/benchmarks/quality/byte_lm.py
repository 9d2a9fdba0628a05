"""Byte language modelling on the bundled corpus: DFN, FlowNetwork and its ablations, Llama, and llama-conv."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed

from ..baselines.models import ModelSize, build_model, count_parameters
from ..datasets.byte_windows import VOCAB_SIZE, corpus_windows
from ..harness.environment import describe_machine
from ..harness.lr_search import SEARCH_SEED
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..harness.training_loop import fit

INITIALIZER_RANGES = (0.02, None)  # defaults of Llama and of DFN, 1/sqrt(hidden_size)


@dataclass(frozen=True)
class ByteLMSettings:
    """One training run.

    Attributes:
        initializer_range: None is 1/sqrt(hidden_size).
        intermediate_size: of the DFN; the other models match its number of parameters.
    """

    model: str = "dfn"
    seed: int = 0
    learning_rate: float = 3e-3
    initializer_range: float | None = None
    steps: int = 800
    batch_size: int = 8
    length: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    intermediate_size: int = 384
    evaluation_windows: int = 256
    device: str = "cpu"


@dataclass(frozen=True)
class ByteLMResult:
    """Validation loss in nats per byte, top-1 and top-5 accuracy, and training time in seconds."""

    parameters: int
    loss: float
    top1: float
    top5: float
    largest_gradient_norm: float
    training_seconds: float
    wall_seconds: float
    machine: str


@dataclass(frozen=True)
class Validation:
    """Mean loss and accuracies over all predicted bytes of the validation windows."""

    loss: float
    top1: float
    top5: float


def measure_byte_lm(
    settings: ByteLMSettings, report: Callable[[str], None] = lambda line: None, **dfn_options
) -> ByteLMResult:
    """Train a model on random windows of the train split; evaluate it on evenly spaced validation windows."""
    set_seed(settings.seed)
    size = ModelSize(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
        initializer_range=settings.initializer_range,
    )
    model = build_model(settings.model, size, device=settings.device, **dfn_options)
    started = time.perf_counter()

    def announce(step: int) -> None:
        report(
            f"{settings.model}, learning rate {settings.learning_rate:g}, seed {settings.seed}: "
            f"step {step} of {settings.steps}, {time.perf_counter() - started:.0f} s"
        )

    trained = fit(
        model,
        corpus_windows("train", settings.length).random_batches(settings.batch_size, settings.seed),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        evaluate=announce,
    )
    validation = validate(
        model,
        corpus_windows("validation", settings.length).evenly_spaced_batches(
            settings.evaluation_windows, settings.batch_size
        ),
    )
    return ByteLMResult(
        parameters=count_parameters(model),
        **vars(validation),
        largest_gradient_norm=round(trained.largest_gradient_norm, 3),
        training_seconds=round(trained.seconds, 1),
        wall_seconds=round(trained.wall_seconds, 1),
        machine=describe_machine(settings.device),
    )


@torch.no_grad()
def validate(model: PreTrainedModel, batches: Iterator[dict[str, torch.Tensor]]) -> Validation:
    """Return loss, top-1 and top-5 over batches of `input_ids` `[batch, length]`; the first byte is not predicted."""
    loss = top1 = top5 = 0.0
    count = 0
    for batch in batches:
        input_ids = batch["input_ids"].to(model.device)
        targets = input_ids[:, 1:].flatten()
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        hits = logits.topk(5).indices == targets[:, None]
        top1 += hits[:, 0].sum().item()
        top5 += hits.sum().item()
        count += targets.numel()
    return Validation(loss=loss / count, top1=top1 / count, top5=top5 / count)


def run_byte_lm(
    settings: ByteLMSettings,
    *,
    models: Sequence[str],
    seeds: Iterable[int],
    learning_rates: Sequence[float],
    search_steps: int,
    path: Path,
    report: Callable[[str], None] = lambda line: None,
) -> list[tuple[ByteLMSettings, ByteLMResult]]:
    """Measure every model with every seed, at its best learning rate and initialisation.

    Short runs of `search_steps` steps with the seed `SEARCH_SEED` try each of `learning_rates` with each of
    `INITIALIZER_RANGES`; the combination with the lowest loss is used. Finished runs are read from the CSV at `path`.
    Batches depend only on the seed, so all models train on the same ones.

    Args:
        settings: shared settings; `model`, `seed`, `learning_rate` and `initializer_range` are replaced.
        models: names of the models.
        seeds: seeds of the full runs.
        learning_rates: rates of the short runs.
        search_steps: training steps of a short run.
        path: the CSV file.
        report: receives one line per event.
    """
    results = ResultsFile(path, ByteLMSettings, ByteLMResult)

    def run(**changes) -> tuple[ByteLMSettings, ByteLMResult]:
        changed = replace(settings, **changes)
        return changed, results.run(changed, lambda missing: measure_byte_lm(missing, report))

    best = {}
    for model in models:
        searched = [
            run(model=model, seed=SEARCH_SEED, steps=search_steps, learning_rate=rate, initializer_range=initial)
            for rate in learning_rates
            for initial in INITIALIZER_RANGES
        ]
        chosen = min(searched, key=lambda pair: pair[1].loss)[0]
        best[model] = {"learning_rate": chosen.learning_rate, "initializer_range": chosen.initializer_range}
        report(
            f"{model}: learning rate {chosen.learning_rate:g}, initial standard deviation {_initial_std(chosen):.3f}"
        )
    # Seed by seed, so that an interrupted table has the same seeds for all models.
    return [run(model=model, seed=seed, **best[model]) for seed in seeds for model in models]


def byte_lm_table(results: list[tuple[ByteLMSettings, ByteLMResult]]) -> str:
    """Return a table with one row per model: mean ± standard error over seeds."""
    header = (
        "model",
        "parameters",
        "learning rate",
        "initial std",
        "seeds",
        "validation loss, nats per byte",
        "top-1",
        "top-5",
        "wall-clock s",
        "CPU ms per step",
    )
    lines = []
    for name in dict.fromkeys(run.model for run, _ in results):
        runs = [run for run, _ in results if run.model == name]
        found = [result for run, result in results if run.model == name]
        lines.append(
            (
                name,
                f"{found[0].parameters:,}",
                f"{runs[0].learning_rate:g}",
                f"{_initial_std(runs[0]):.3f}",
                str(len(found)),
                mean_with_error([one.loss for one in found]),
                mean_with_error([one.top1 for one in found]),
                mean_with_error([one.top5 for one in found]),
                mean_with_error([one.wall_seconds for one in found], digits=0),
                mean_with_error([1000 * one.training_seconds / runs[0].steps for one in found], digits=0),
            )
        )
    return markdown_table(header, lines)


def _initial_std(settings: ByteLMSettings) -> float:
    return settings.hidden_size**-0.5 if settings.initializer_range is None else settings.initializer_range
