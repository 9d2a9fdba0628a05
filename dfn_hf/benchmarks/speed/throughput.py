"""Time and peak memory of models of equal size over the length: forward pass, training step and decoding."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, set_seed

from ..baselines.models import ModelSize, build_model, count_parameters
from ..datasets.byte_windows import VOCAB_SIZE, corpus_bytes
from ..harness.environment import clock, describe_machine, peak_memory_mib, run_isolated, set_up_device, synchronize
from ..harness.length_plots import log_log_slope
from ..harness.results import ResultsFile, markdown_table

WORKLOADS = ("forward", "training", "decoding")
WARM_UP_LENGTH = 512
DECODED_TOKENS = 32  # timed tokens after the context


@dataclass(frozen=True)
class SpeedSettings:
    """One model, workload and length with batch size 1; the result is the median of `repeats` after a warm-up."""

    model: str = "flownetwork"
    workload: str = "forward"
    length: int = 8192
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 384
    repeats: int = 3
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class SpeedResult:
    """Seconds of a forward pass over the length, of a training step, or of one decoded token; peak MiB."""

    parameters: int
    seconds: float
    peak_mib: float
    machine: str


def measure_speed(settings: SpeedSettings) -> SpeedResult:
    """Time the workload on bytes of the corpus; run it in a fresh process for a valid peak memory.

    Raises:
        ValueError: the workload is unknown.
    """
    if settings.workload not in WORKLOADS:
        raise ValueError(f"workload is {settings.workload!r}: choose one of {', '.join(WORKLOADS)}")
    set_up_device(settings.device, settings.threads)
    set_seed(0)
    size = ModelSize(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
    )
    model = build_model(settings.model, size, device=settings.device).eval()
    input_ids = corpus_bytes(settings.length).to(settings.device)
    workload = {"forward": forward, "training": train, "decoding": decode}[settings.workload]
    workload(model, input_ids[:, :WARM_UP_LENGTH], settings.device)
    seconds = [workload(model, input_ids, settings.device) for _ in range(settings.repeats)]
    return SpeedResult(
        parameters=count_parameters(model),
        seconds=round(statistics.median(seconds), 5),
        peak_mib=round(peak_memory_mib(settings.device), 1),
        machine=describe_machine(settings.device),
    )


@torch.no_grad()
def forward(model: PreTrainedModel, input_ids: torch.Tensor, device: str) -> float:
    """Return the seconds of a forward pass that computes only the last logits."""
    return timed(lambda: model(input_ids, use_cache=False, logits_to_keep=1), device)


def train(model: PreTrainedModel, input_ids: torch.Tensor, device: str) -> float:
    """Return the seconds of a forward and backward pass."""
    model.train().zero_grad()
    return timed(lambda: model(input_ids, labels=input_ids, use_cache=False).loss.backward(), device)


@torch.no_grad()
def decode(model: PreTrainedModel, input_ids: torch.Tensor, device: str) -> float:
    """Return the seconds per decoded token after a context of `input_ids`."""
    cache = DynamicCache(config=model.config)
    model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = input_ids[:, :1]
    model(token, past_key_values=cache, use_cache=True)

    def steps() -> None:
        for _ in range(DECODED_TOKENS):
            model(token, past_key_values=cache, use_cache=True)

    return timed(steps, device) / DECODED_TOKENS


def timed(function: Callable[[], object], device: str) -> float:
    """Return the seconds of one call of `function`."""
    synchronize(device)
    started = clock(device)
    function()
    synchronize(device)
    return clock(device) - started


def run_speed(
    runs: Iterable[SpeedSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[SpeedSettings, SpeedResult]]:
    """Measure each run in a fresh process; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, SpeedSettings, SpeedResult)
    finished = []
    for run in runs:
        result = results.run(run, partial(run_isolated, measure_speed))
        report(f"{run.model}, {run.workload} at {run.length:,}: {result.seconds:.4f} s, {result.peak_mib:,.0f} MiB")
        finished.append((run, result))
    return finished


def speed_table(results: Sequence[tuple[Any, SpeedResult]]) -> str:
    """Return a table with one row per workload and length, followed by parameters and log-log slopes.

    Args:
        results: settings with `model`, `workload` and `length`, and results; ratios are relative to the first model.
    """
    models = list(dict.fromkeys(run.model for run, _ in results))
    found = {(run.workload, run.length, run.model): result for run, result in results}
    header = ["workload", "tokens"]
    for model in models:
        header += [f"{model}, ms", f"{model}, peak MiB"]
    header += [f"{model} / {models[0]}, time" for model in models[1:]]
    lines, slopes = [], []
    for workload in dict.fromkeys(run.workload for run, _ in results):
        lengths = sorted({run.length for run, _ in results if run.workload == workload})
        for length in lengths:
            cells, first = [workload, f"{length:,}"], found.get((workload, length, models[0]))
            measured = [found.get((workload, length, model)) for model in models]
            for one in measured:
                cells += ["–", "–"] if one is None else [f"{1000 * one.seconds:,.1f}", f"{one.peak_mib:,.0f}"]
            cells += ["–" if not (one and first) else f"{one.seconds / first.seconds:.2f}" for one in measured[1:]]
            lines.append(cells)
        for model in models:
            points = [
                (length, found[workload, length, model].seconds)
                for length in lengths
                if (workload, length, model) in found
            ]
            slope = log_log_slope(*map(list, zip(*points, strict=True))) if len(points) > 1 else None
            if slope is not None:
                slopes.append(
                    f"log-log slope of {workload}, {model}, {points[0][0]:,} to {points[-1][0]:,}: {slope:.2f}"
                )
    parameters = ", ".join(
        f"{name} {next(m.parameters for run, m in results if run.model == name):,}" for name in models
    )
    return "\n".join([markdown_table(header, lines), "", f"parameters: {parameters}", *slopes])
