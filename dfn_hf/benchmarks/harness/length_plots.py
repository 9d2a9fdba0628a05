"""Times and peak memory over the length as a table, a picture, slopes and the lengths where one overtakes another."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..speed.scaling import log_log_slope
from .interleaving import RunT, TimingT
from .results import markdown_table


def lengths_table(results: Sequence[tuple[RunT, TimingT]], unit: str = "µs per token") -> str:
    """One line per work and length; below it slopes and break-evens. The first label is what others are compared with.

    Args:
        unit: of a turn's time over the run's `tokens`.
    """
    labels = list(dict.fromkeys(run.label for run, _ in results))
    found = {(run.work, run.length, run.label): (run, timing) for run, timing in results}
    header = ["work", "tokens", *(f"{label}, {unit}" for label in labels)]
    header += [f"{label} / {labels[0]}" for label in labels[1:]] + [f"{label}, peak MiB" for label in labels]
    lines = []
    for work, length in dict.fromkeys((run.work, run.length) for run, _ in results):
        first = found.get((work, length, labels[0]))
        times, ratios, peaks = (["–"] * len(labels) for _ in range(3))
        for place, label in enumerate(labels):
            if (work, length, label) in found:
                run, timing = found[work, length, label]
                times[place] = _three_digits(1e6 * timing.seconds / run.tokens)
                ratios[place] = f"{timing.seconds / first[1].seconds:.2f}" if first else "–"
                peaks[place] = f"{timing.peak_mib:,.0f}"
        lines.append([work, f"{length:,}", *times, *ratios[1:], *peaks])
    return "\n".join([markdown_table(header, lines), "", *_comparisons(results, labels)])


def break_even(lengths: Sequence[int], first: Sequence[float], other: Sequence[float]) -> float | None:
    """The length from which on `first` takes less time, by a power law between the two lengths around it.

    0 where it does at every length, None where it does not at the last.
    """
    advantage = [math.log(b / a) for a, b in zip(first, other, strict=True)]
    behind = [place for place, value in enumerate(advantage) if value <= 0]
    if not behind:
        return 0.0
    at = behind[-1]
    if at == len(lengths) - 1:
        return None
    share = advantage[at] / (advantage[at] - advantage[at + 1])
    return math.exp(math.log(lengths[at]) + share * math.log(lengths[at + 1] / lengths[at]))


def plot_lengths(results: Sequence[tuple[RunT, TimingT]], path: Path) -> None:
    """Write a picture: seconds over the length, both axes logarithmic, one part per kind of work."""
    import matplotlib.pyplot as plt

    works = list(dict.fromkeys(run.work for run, _ in results))
    labels = list(dict.fromkeys(run.label for run, _ in results))
    figure, axes = plt.subplots(1, len(works), figsize=(4 * len(works), 4), layout="constrained", squeeze=False)
    for work, part in zip(works, axes[0], strict=True):
        for label in labels:
            points = _points(results, work, label)
            part.plot(points.keys(), points.values(), marker="o", markersize=4, label=label)
        part.set(xlabel="tokens", ylabel="seconds", title=work, yscale="log")
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
    for work in dict.fromkeys(run.work for run, _ in results):
        seconds = {label: _points(results, work, label) for label in labels}
        for label, points in seconds.items():
            slope = log_log_slope(list(points), list(points.values()))
            if slope is not None:
                shortest, longest = min(points), max(points)
                lines.append(f"{work}, {label}: log-log slope {slope:.2f} from {shortest:,} to {longest:,} tokens")
        first = seconds[labels[0]]
        for label in labels[1:]:
            common = [length for length in first if length in seconds[label]]
            if not common:
                continue
            at = break_even(common, [first[n] for n in common], [seconds[label][n] for n in common])
            said = f"from {at:,.0f} tokens on" if at else "at every length measured"
            said = f"at no length, {common[-1]:,} tokens being the last" if at is None else said
            lines.append(f"{work}: {labels[0]} is quicker than {label} {said}")
    return lines


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _points(results: Sequence[tuple[RunT, TimingT]], work: str, label: str) -> dict[int, float]:
    return {run.length: timing.seconds for run, timing in results if (run.work, run.label) == (work, label)}
