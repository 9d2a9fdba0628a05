"""Forward passes over the lengths that the repository of the DFN paper reports, 32 to 768,000 tokens."""

from collections.abc import Sequence

from ..harness.results import markdown_table
from .scaling import ScalingResult, ScalingSettings

# Seconds and MB of GPU memory by length, from the README of the paper's repository, on an unnamed GPU. The timed code
# is an MLP per token and attention among the 64 tokens with the largest norm.
REPORTED = {
    32: (0.034, 59.0),
    512: (0.025, 59.9),
    204800: (0.296, 458.9),
    256000: (0.429, 558.9),
    512000: (13.663, 1058.9),
    768000: (21.351, 1558.9),
}
LENGTHS = (32, 512, 8192, 65536, 204800, 256000, 512000, 768000)


def paper_lengths_table(results: Sequence[tuple[ScalingSettings, ScalingResult]]) -> str:
    """Return a table with one row per length; "–" if the paper's repository does not report it."""
    lines = []
    for run, result in results:
        reported = REPORTED.get(run.length)
        lines.append(
            (
                f"{run.length:,}",
                f"{result.seconds:.3f}",
                f"{1e6 * result.seconds / run.length:.1f}",
                f"{result.peak_mib:,.0f}",
                *(("–", "–") if reported is None else (f"{reported[0]:.3f}", f"{reported[1]:,.1f}")),
            )
        )
    header = ("tokens", "time s", "µs per token", "peak MiB", "paper's repository: time s", "GPU MB")
    return markdown_table(header, lines)
