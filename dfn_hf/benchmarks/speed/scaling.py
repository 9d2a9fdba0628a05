"""Time and memory of a forward pass over the length: DFN and a Llama with torch's fused attention."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import set_seed

from ..baselines.models import ModelSize, build_model, count_parameters
from ..datasets.byte_windows import VOCAB_SIZE, corpus_bytes
from ..harness.environment import clock, describe_machine, peak_memory_mib, run_isolated, set_up_device, synchronize
from ..harness.length_plots import log_log_slope
from ..harness.results import ResultsFile, markdown_table

WARM_UP_LENGTH = 4096


@dataclass(frozen=True)
class ScalingSettings:
    """One model at one length, `repeats` timed passes after a warm-up pass over the first 4,096 tokens."""

    model: str = "dfn"
    length: int = 16384
    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 512
    repeats: int = 3
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class ScalingResult:
    """Median seconds of a forward pass and of its token mixers, and memory before and at its peak.

    The token mixer is the attention module of a layer, with its projections and DFN's neighbour search.
    """

    parameters: int
    seconds: float
    mixer_seconds: float
    idle_mib: float
    peak_mib: float
    machine: str


def measure_scaling(settings: ScalingSettings) -> ScalingResult:
    """Time `settings.repeats` passes over bytes of the corpus; run it in a fresh process for a valid peak memory."""
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
    mixers = _time_mixers(model, settings.device)
    input_ids = corpus_bytes(settings.length).to(device=settings.device)
    _forward(model, input_ids[:, :WARM_UP_LENGTH], settings.device)
    idle = peak_memory_mib(settings.device)
    passes, mixer_passes = [], []
    for _ in range(settings.repeats):
        mixers.seconds = 0.0
        passes.append(_forward(model, input_ids, settings.device))
        mixer_passes.append(mixers.seconds)
    return ScalingResult(
        parameters=count_parameters(model),
        seconds=round(statistics.median(passes), 4),
        mixer_seconds=round(statistics.median(mixer_passes), 4),
        idle_mib=round(idle, 1),
        peak_mib=round(peak_memory_mib(settings.device), 1),
        machine=describe_machine(settings.device),
    )


def run_scaling(
    settings: ScalingSettings,
    *,
    lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    path: Path,
    report: Callable[[str], None] = lambda line: None,
) -> list[tuple[ScalingSettings, ScalingResult]]:
    """Measure DFN at `lengths` and Llama at `baseline_lengths`, each in a fresh process.

    Finished runs are read from the CSV at `path`.
    """
    results = ResultsFile(path, ScalingSettings, ScalingResult)
    runs = [replace(settings, model="dfn", length=length) for length in lengths]
    runs += [replace(settings, model="llama", length=length) for length in baseline_lengths]
    finished = []
    for run in runs:
        result = results.run(run, partial(run_isolated, measure_scaling))
        report(f"{run.model}, {run.length:,} tokens: {result.seconds:.2f} s, {result.peak_mib:,.0f} MiB")
        finished.append((run, result))
    return finished


def scaling_table(results: Sequence[tuple[ScalingSettings, ScalingResult]]) -> str:
    """Return a table with one row per length, followed by the slopes of time and of memory above the idle process."""
    by_model = {
        name: {run.length: result for run, result in results if run.model == name} for name in ("dfn", "llama")
    }
    settings = results[0][0]
    per_token_and_head = settings.num_hidden_layers * settings.num_attention_heads / 1e6
    lines = []
    for length in sorted({run.length for run, _ in results}):
        dfn, llama = by_model["dfn"].get(length), by_model["llama"].get(length)
        cells = [f"{length:,}"]
        for one in (dfn, llama):
            if one is None:
                cells += ["–"] * 4
                continue
            cells += [
                f"{one.seconds:.2f}",
                f"{one.seconds / length / per_token_and_head:.2f}",
                f"{one.mixer_seconds / length / per_token_and_head:.2f}",
                f"{one.peak_mib:,.0f}",
            ]
        cells.append(f"{llama.seconds / dfn.seconds:.2f}" if dfn and llama else "–")
        lines.append(cells)
    header = ["tokens"]
    for name in ("DFN", "Llama"):
        header += [f"{name} s", f"{name} µs per token and head", f"{name} mixer µs", f"{name} peak MiB"]
    header.append("Llama / DFN time")
    return "\n".join([markdown_table(header, lines), "", *_slope_lines(by_model)])


def plot_scaling(results: Sequence[tuple[ScalingSettings, ScalingResult]], path: Path) -> None:
    """Save a log-log figure of seconds and peak memory over the length."""
    import matplotlib.pyplot as plt

    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label, marker in (("dfn", "DFN", "o"), ("llama", "Llama, fused attention", "s")):
        points = sorted((run.length, result) for run, result in results if run.model == name)
        if points:
            lengths = [length for length, _ in points]
            time_axes.loglog(lengths, [one.seconds for _, one in points], marker=marker, label=label, base=2)
            memory_axes.loglog(lengths, [one.peak_mib for _, one in points], marker=marker, label=label, base=2)
    time_axes.set(xlabel="tokens", ylabel="seconds", title="Time of a forward pass")
    memory_axes.set(xlabel="tokens", ylabel="MiB", title="Peak memory of the process")
    for axes in (time_axes, memory_axes):
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


class _MixerTime:
    """Accumulates the `seconds` spent in the token mixers; set it to 0 before a pass."""

    seconds = 0.0


def _time_mixers(model: torch.nn.Module, device: str) -> _MixerTime:
    spent = _MixerTime()
    started = [0.0]

    def start(*_) -> None:
        synchronize(device)
        started[0] = clock(device)

    def stop(*_) -> None:
        synchronize(device)
        spent.seconds += clock(device) - started[0]

    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(start)
            module.register_forward_hook(stop)
    return spent


@torch.no_grad()
def _forward(model: torch.nn.Module, input_ids: torch.Tensor, device: str) -> float:
    synchronize(device)
    started = clock(device)
    model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    synchronize(device)
    return clock(device) - started


def _slope_lines(by_model: dict[str, dict[int, ScalingResult]]) -> list[str]:
    lines = []
    for name, result in by_model.items():
        lengths = sorted(result)
        slopes = {
            "time": log_log_slope(lengths, [result[length].seconds for length in lengths]),
            "memory beyond idle": log_log_slope(
                lengths, [result[length].peak_mib - result[length].idle_mib for length in lengths]
            ),
        }
        known = [f"of {quantity} {slope:.3f}" for quantity, slope in slopes.items() if slope is not None]
        if known:
            lines.append(f"{name}: log-log slope {', '.join(known)}")
    return lines
