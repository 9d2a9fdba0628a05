"""Time and memory of a forward pass over a field, over the number of samples."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import set_seed

from dfn_hf.data.fields import grid_coordinates
from dfn_hf.modeling.dfn.configuration_dfn import DFNConfig
from dfn_hf.modeling.dfn.modeling_dfn_field import DFNForFieldReconstruction

from ..harness.environment import clock, describe_machine, peak_memory_mib, run_isolated, set_up_device
from ..harness.results import ResultsFile, markdown_table

SIDES = (125, 250, 500, 1000)


@dataclass(frozen=True)
class FieldSpeedSettings:
    """A square synthetic image with `side` samples per side; other fields as in `FieldSettings`."""

    side: int = 1000
    samples_per_entity: int = 16
    hidden_size: int = 64
    num_hidden_layers: int = 2
    intermediate_size: int = 128
    threads: int = 1


@dataclass(frozen=True)
class FieldSpeedResult:
    """Seconds of a forward pass that reconstructs every sample, and peak MiB of the process."""

    seconds: float
    peak_mib: float
    machine: str


def measure_field_speed(settings: FieldSpeedSettings) -> FieldSpeedResult:
    """Measure one image in a fresh process."""
    return run_isolated(_forward, settings)


@torch.no_grad()
def _forward(settings: FieldSpeedSettings) -> FieldSpeedResult:
    set_up_device("cpu", settings.threads)
    set_seed(0)
    coordinates = grid_coordinates(settings.side, settings.side)[None]
    values = torch.sin(9 * coordinates.prod(dim=-1, keepdim=True)) + 0.1 * torch.randn(1, settings.side**2, 1)

    def model(num_entities: int) -> DFNForFieldReconstruction:
        config = DFNConfig(
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_hidden_layers,
            intermediate_size=settings.intermediate_size,
            num_entities=num_entities,
            entity_sampling="adaptive",
        )
        return DFNForFieldReconstruction(config).eval()

    model(16)(coordinates[:, :256], values[:, :256])  # compiles the C kernels if necessary
    measured = model(settings.side**2 // settings.samples_per_entity)
    started = clock("cpu")
    measured(coordinates, values)
    return FieldSpeedResult(
        round(clock("cpu") - started, 2), round(peak_memory_mib("cpu"), 1), describe_machine("cpu")
    )


def run_field_speed(
    runs: Iterable[FieldSpeedSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[FieldSpeedSettings, FieldSpeedResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, FieldSpeedSettings, FieldSpeedResult)
    finished = []
    for settings in runs:
        result = results.run(settings, measure_field_speed)
        report(f"{settings.side**2:,} samples: {result.seconds:.1f} s, {result.peak_mib:,.0f} MiB")
        finished.append((settings, result))
    return finished


def field_speed_table(finished: list[tuple[FieldSpeedSettings, FieldSpeedResult]]) -> str:
    """Return a table with one row per size, followed by the slope of log time over log samples."""
    lines = [
        (
            f"{settings.side**2:,}",
            f"{settings.side**2 // settings.samples_per_entity:,}",
            f"{result.seconds:.2f}",
            f"{1e6 * result.seconds / settings.side**2:.1f}",
            f"{result.peak_mib / 1024:.2f}",
        )
        for settings, result in finished
    ]
    table = markdown_table(("samples", "entities", "time s", "µs per sample", "peak GiB"), lines)
    if len(finished) < 2:
        return table
    points = [(2 * math.log(settings.side), math.log(result.seconds)) for settings, result in finished]
    (x_mean, y_mean) = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)
    return f"{table}\n\nslope of log time over log samples: {slope:.2f}"
