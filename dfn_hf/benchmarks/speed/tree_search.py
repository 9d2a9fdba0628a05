"""The neighbour search on its own: what it finds of the exact neighbours, time per query and size of the index."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dfn_hf import DFNConfig
from dfn_hf.modeling.ops.box_tree import TreeIndex, index_layout, index_shapes, to_grid
from dfn_hf.modeling.ops.neighbor_search import search_exact, search_tree

from ..harness.environment import clock, describe_machine, run_isolated, set_up_device, synchronize
from ..harness.results import ResultsFile, markdown_table

EXTENT = 2.0  # every axis has positions from −EXTENT to EXTENT, which lie on the ball of a DFN's positions
NUM_CLUSTERS = 2000
CLUSTER_BLUR = 0.05
WALK_STEP = 0.02
QUERY_BLUR = 0.05


@dataclass(frozen=True)
class SearchSettings:
    """One row of one head. The defaults of the search are those of a DFN.

    Attributes:
        shape: distribution of the positions, one of `SHAPES`.
        length: entities of the row.
        timed_queries: last entities of the row, whose search is timed; the tree holds the entities before.
        compared_queries: last of the timed entities, whose neighbours are compared with those of the exact search.
        repeats: timed calls after a warm-up; the result is their median.
    """

    shape: str = "uniform"
    length: int = 4096
    position_dim: int = 4
    num_neighbors: int = 16
    window: int = 32
    num_leaves: int = DFNConfig.num_leaves
    timed_queries: int = 2048
    compared_queries: int = 300
    repeats: int = 3
    seed: int = 0
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class SearchResult:
    """Quality and cost of one search.

    Attributes:
        recall: fraction of the exact `num_neighbors` nearest that the search finds.
        recall_at_1: fraction of the queries whose exact nearest neighbour is found.
        microseconds: time per query, with the time to enter the queries' entities into the tree.
        index_bytes: size of the tree per entity of the row.
    """

    recall: float
    recall_at_1: float
    microseconds: float
    index_bytes: float
    machine: str


def uniform_positions(length: int, position_dim: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw keys and queries independently in a cube."""
    keys, queries = (EXTENT * (2 * torch.rand(length, position_dim, generator=generator) - 1) for _ in range(2))
    return keys, queries


def clustered_positions(
    length: int, position_dim: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noisy copies of cluster centres; the frequency of a cluster falls with its rank by Zipf's law."""
    centres = EXTENT * (2 * torch.rand(NUM_CLUSTERS, position_dim, generator=generator) - 1)
    weights = 1 / torch.arange(1, NUM_CLUSTERS + 1)
    places = centres[weights.multinomial(length, replacement=True, generator=generator)]
    return near(places, CLUSTER_BLUR, generator), near(places, CLUSTER_BLUR, generator)


def drift_on_one_axis(length: int, position_dim: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw positions whose first axis rises steadily along the row; the other axes are uniform."""
    keys, _ = uniform_positions(length, position_dim, generator)
    keys[:, 0] = torch.linspace(-EXTENT, EXTENT, length)
    return keys, near(keys, QUERY_BLUR, generator)


def drift_on_all_axes(length: int, position_dim: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw positions that move steadily along the diagonal of the cube."""
    places = torch.linspace(-EXTENT, EXTENT, length)[:, None].expand(-1, position_dim)
    return near(places, QUERY_BLUR, generator), near(places, QUERY_BLUR, generator)


def random_walk(length: int, position_dim: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the positions of a random walk, reflected at the sides of the cube."""
    walk = (WALK_STEP * torch.randn(length, position_dim, generator=generator, dtype=torch.float64)).cumsum(dim=0)
    phase = (walk + EXTENT) % (4 * EXTENT)
    keys = (torch.minimum(phase, 4 * EXTENT - phase) - EXTENT).float()
    return keys, near(keys, QUERY_BLUR, generator)


def one_place(length: int, position_dim: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one position for all keys and queries."""
    keys = torch.zeros(length, position_dim)
    return keys, keys


def near(places: torch.Tensor, blur: float, generator: torch.Generator) -> torch.Tensor:
    """Add normal noise with the standard deviation `blur`."""
    return places + blur * torch.randn(places.shape, generator=generator)


SHAPES: dict[str, Callable[[int, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]] = {
    "uniform": uniform_positions,
    "clusters": clustered_positions,
    "drift on one axis": drift_on_one_axis,
    "drift on all axes": drift_on_all_axes,
    "random walk": random_walk,
    "one place": one_place,
}


def run_search(
    runs: Iterable[SearchSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[SearchSettings, SearchResult]]:
    """Measure the runs, each in a fresh process; finished ones are read from the CSV at `path`.

    Raises:
        ValueError: as for `check_search_settings`; raised before the first measurement.
    """
    runs = list(runs)
    for run in runs:
        check_search_settings(run)
    results = ResultsFile(path, SearchSettings, SearchResult)
    finished = []
    for run in runs:
        result = results.run(run, lambda settings: run_isolated(measure_search, settings))
        report(
            f"{run.shape}, P = {run.position_dim}, {run.length:,} entities: recall {result.recall:.3f}, "
            f"{result.microseconds:.2f} µs"
        )
        finished.append((run, result))
    return finished


def check_search_settings(settings: SearchSettings) -> None:
    """Raise a ValueError if the shape is unknown, or the row or its timed part is too short."""
    if settings.shape not in SHAPES:
        raise ValueError(f"shape is {settings.shape!r}: choose one of {', '.join(SHAPES)}")
    if settings.timed_queries < settings.compared_queries:
        raise ValueError(f"timed_queries is {settings.timed_queries}: choose at least {settings.compared_queries}")
    if settings.length <= settings.timed_queries:
        raise ValueError(f"length is {settings.length}: choose more than timed_queries ({settings.timed_queries})")


@torch.no_grad()
def measure_search(settings: SearchSettings) -> SearchResult:
    """Build the tree of a row, time the search of its last entities, and compare it with the exact search."""
    set_up_device(settings.device, settings.threads)
    key, query = draw_positions(settings)
    index = empty_index(settings)
    search_last(settings, query[:, : -settings.timed_queries], key, 1, index)
    seconds = []
    for _ in range(1 + settings.repeats):
        copy = deepcopy(index)
        synchronize(settings.device)
        started = clock(settings.device)
        found = search_last(settings, query, key, settings.timed_queries, copy)
        synchronize(settings.device)
        seconds.append(clock(settings.device) - started)
    found = found[:, -settings.compared_queries :]
    exact = search_last(settings, query, key, settings.compared_queries)
    size = sum(tensor.nbytes for tensor in vars(index).values() if tensor is not None)
    return SearchResult(
        recall=round(recall(found, exact), 4),
        recall_at_1=round(recall(found, exact[..., :1]), 4),
        microseconds=round(1e6 * statistics.median(seconds[1:]) / settings.timed_queries, 3),
        index_bytes=round(size / settings.length, 1),
        machine=describe_machine(settings.device),
    )


def draw_positions(settings: SearchSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw keys and queries of the row, int16 `[1, length, position_dim]` each."""
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = SHAPES[settings.shape](settings.length, settings.position_dim, generator)
    key, query = (to_grid(positions)[None].to(settings.device) for positions in drawn)
    return key, query


def empty_index(settings: SearchSettings) -> TreeIndex:
    """Return the empty tree of one row with room for `length` entities."""
    device = torch.device(settings.device)
    shapes = index_shapes(index_layout(device, settings.position_dim), settings.length, settings.position_dim)
    dtypes = {"leaf_boxes": torch.int16}
    return TreeIndex(
        **{
            name: torch.zeros(1, *shape, dtype=dtypes.get(name, torch.int32), device=device)
            for name, shape in shapes.items()
        }
    )


def search_last(
    settings: SearchSettings, query: torch.Tensor, key: torch.Tensor, count: int, index: TreeIndex | None = None
) -> torch.Tensor:
    """Return the neighbours of the last `count` queries, int64 `[1, count, K]`; without an index the exact ones."""
    length = query.shape[1]
    query_index = torch.arange(length - count, length, device=query.device)[None]
    arguments = query[:, -count:], query_index, key[:, :length], settings.num_neighbors, settings.window
    if index is None:
        return search_exact(*arguments)[0]
    return search_tree(*arguments, settings.num_leaves, index=index)[0]


def recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the fraction of the entities in `exact` that are in `found`; −1 is none. NaN if there are none."""
    wanted = exact >= 0
    hits = (exact[..., None] == found[..., None, :]).any(dim=-1) & wanted
    return hits.sum().item() / wanted.sum().item() if wanted.any() else math.nan


def search_runs(
    settings: SearchSettings, *, shapes: Sequence[str], position_dims: Sequence[int], lengths: Sequence[int]
) -> list[SearchSettings]:
    """Return one run per shape, dimension and length; the other fields are those of `settings`."""
    return [
        replace(settings, shape=shape, position_dim=position_dim, length=length)
        for shape in shapes
        for position_dim in position_dims
        for length in lengths
    ]


def search_table(results: Sequence[tuple[SearchSettings, SearchResult]]) -> str:
    """Return a table with one row per run."""
    settings = results[0][0]
    header = (
        "positions",
        "P",
        "entities",
        "leaves",
        f"recall@{settings.num_neighbors}",
        "recall@1",
        "µs per query",
        "index bytes per entity",
    )
    lines = [
        (
            run.shape,
            str(run.position_dim),
            f"{run.length:,}",
            str(run.num_leaves),
            f"{result.recall:.3f}",
            f"{result.recall_at_1:.3f}",
            f"{result.microseconds:.2f}",
            f"{result.index_bytes:.1f}",
        )
        for run, result in results
    ]
    return markdown_table(header, lines)
