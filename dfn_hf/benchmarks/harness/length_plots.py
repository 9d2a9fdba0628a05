"""Time and peak memory over the length: tables, figures, log-log slopes and break-even lengths."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from .interleaving import RunT, TimingT
from .results import markdown_table


def lengths_table(results: Sequence[tuple[RunT, TimingT]], unit: str = "µs per token") -> str:
    """Return a table with one row per workload and length, followed by slopes and break-even lengths.

    Args:
        results: runs and timings; the first label is the reference of the ratios.
        unit: unit of the seconds of a call divided by the run's `tokens`.
    """
    labels = list(dict.fromkeys(run.label for run, _ in results))
    found = {(run.workload, run.length, run.label): (run, timing) for run, timing in results}
    header = ["workload", "tokens", *(f"{label}, {unit}" for label in labels)]
    header += [f"{label} / {labels[0]}" for label in labels[1:]] + [f"{label}, peak MiB" for label in labels]
    lines = []
    for workload, length in dict.fromkeys((run.workload, run.length) for run, _ in results):
        first = found.get((workload, length, labels[0]))
        times, ratios, peaks = (["–"] * len(labels) for _ in range(3))
        for place, label in enumerate(labels):
            if (workload, length, label) in found:
                run, timing = found[workload, length, label]
                times[place] = _three_digits(1e6 * timing.seconds / run.tokens)
                ratios[place] = f"{timing.seconds / first[1].seconds:.2f}" if first else "–"
                peaks[place] = f"{timing.peak_mib:,.0f}"
        lines.append([workload, f"{length:,}", *times, *ratios[1:], *peaks])
    return "\n".join([markdown_table(header, lines), "", *_comparisons(results, labels)])


def log_log_slope(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """Return the least-squares slope of log(value) over log(length): 1 is linear, 2 quadratic.

    None for fewer than two lengths, or if a value is 0 (a short pass may need no additional memory).
    """
    if len(lengths) < 2 or min(values) <= 0:
        return None
    logs = [math.log(length) for length in lengths]
    return statistics.linear_regression(logs, [math.log(value) for value in values]).slope


def break_even(lengths: Sequence[int], first: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the length above which `first` is faster than `other`.

    Interpolates with a power law between the two neighbouring measured lengths.

    Returns:
        0 if `first` is faster at every length, None if it is slower at the last length.
    """
    advantage = [math.log(b / a) for a, b in zip(first, other, strict=True)]
    slower = [place for place, value in enumerate(advantage) if value <= 0]
    if not slower:
        return 0.0
    at = slower[-1]
    if at == len(lengths) - 1:
        return None
    fraction = advantage[at] / (advantage[at] - advantage[at + 1])
    return math.exp(math.log(lengths[at]) + fraction * math.log(lengths[at + 1] / lengths[at]))


def plot_lengths(results: Sequence[tuple[RunT, TimingT]], path: Path) -> None:
    """Save a figure with one log-log panel of seconds over tokens per workload."""
    import matplotlib.pyplot as plt

    workloads = list(dict.fromkeys(run.workload for run, _ in results))
    labels = list(dict.fromkeys(run.label for run, _ in results))
    figure, axes = plt.subplots(
        1, len(workloads), figsize=(4 * len(workloads), 4), layout="constrained", squeeze=False
    )
    for workload, part in zip(workloads, axes[0], strict=True):
        for label in labels:
            points = _points(results, workload, label)
            part.plot(points.keys(), points.values(), marker="o", markersize=4, label=label)
        part.set(xlabel="tokens", ylabel="seconds", title=workload, yscale="log")
        part.set_xscale("log", base=2)
        part.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
        part.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        part.grid(alpha=0.3)
    axes[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _comparisons(results: Sequence[tuple[RunT, TimingT]], labels: Sequence[str]) -> list[str]:
    lines = []
    for workload in dict.fromkeys(run.workload for run, _ in results):
        seconds = {label: _points(results, workload, label) for label in labels}
        for label, points in seconds.items():
            slope = log_log_slope(list(points), list(points.values()))
            if slope is not None:
                shortest, longest = min(points), max(points)
                lines.append(f"{workload}, {label}: log-log slope {slope:.2f} from {shortest:,} to {longest:,} tokens")
        first = seconds[labels[0]]
        for label in labels[1:]:
            common = [length for length in first if length in seconds[label]]
            if not common:
                continue
            at = break_even(common, [first[n] for n in common], [seconds[label][n] for n in common])
            where = f"above {at:,.0f} tokens" if at else "at every measured length"
            where = f"at no measured length up to {common[-1]:,} tokens" if at is None else where
            lines.append(f"{workload}: {labels[0]} is faster than {label} {where}")
    return lines


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _points(results: Sequence[tuple[RunT, TimingT]], workload: str, label: str) -> dict[int, float]:
    return {run.length: timing.seconds for run, timing in results if (run.workload, run.label) == (workload, label)}
