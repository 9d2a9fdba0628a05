"""One head of flow attention, neighbour search included, and of torch's causal attention over all tokens."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from dfn_hf import DFNConfig
from dfn_hf.modeling.dfn.entities import squash_to_ball
from dfn_hf.modeling.ops.box_tree import GRID, index_layout, to_grid
from dfn_hf.modeling.ops.dispatch import triton_available
from dfn_hf.modeling.ops.flow_attention import flow_attention
from dfn_hf.modeling.ops.kernels.c_compiler import SWITCH
from dfn_hf.modeling.ops.neighbor_search import search_exact, search_tree

from ..harness.environment import describe_machine, dtype_named, peak_memory_mib, set_up_device
from ..harness.interleaving import Timing, run_over_lengths
from ..harness.results import ResultsFile
from .throughput import timed

WORKLOADS = ("forward", "forward and backward")
COMPILED = {"cpu": "flow attention (C)", "cuda": "flow attention (Triton)"}
EXACT = "flow attention, exact search"
TORCH = "flow attention (torch)"
SDPA = "causal attention"
NUM_CLUSTERS = 2000


@dataclass(frozen=True)
class SingleHeadSettings:
    """One operation on one row.

    The defaults are those of a DFN.

    Attributes:
        num_leaves: leaves of the tree that the search reads; `EXACT` and `SDPA` have none.
        dtype: of the values of flow attention, and of queries, keys and values of `SDPA`.
    """

    operation: str = COMPILED["cpu"]
    workload: str = "forward"
    length: int = 1024
    heads: int = 1
    width: int = 64
    position_dim: int = 4
    num_neighbors: int = 16
    window: int = 32
    num_leaves: int = DFNConfig.num_leaves
    dtype: str = "float32"
    repeats: int = 3
    threads: int = 1
    device: str = "cpu"

    @property
    def label(self) -> str:
        return self.operation

    @property
    def tokens(self) -> int:
        return self.length * self.heads


def operations(device: str) -> tuple[str, ...]:
    """Return the operations of a device, the compiled flow attention first."""
    return (COMPILED[torch.device(device).type], EXACT, TORCH, SDPA)


def run_single_head(
    runs: Iterable[SingleHeadSettings],
    time_limit: float,
    path: Path,
    report: Callable[[str], None] = lambda line: None,
) -> list[tuple[SingleHeadSettings, Timing]]:
    """Measure the runs in round-robin order; finished ones are read from the CSV at `path`. See `run_over_lengths`."""
    return run_over_lengths(
        runs, ResultsFile(path, SingleHeadSettings, Timing), prepare_single_head, time_limit, report
    )


def prepare_single_head(settings: SingleHeadSettings) -> Callable[[], Timing]:
    """Draw the inputs, and return a callable that times the operation once.

    Raises:
        ValueError: the operation or workload is unknown or not available on this machine.
    """
    set_up_device(settings.device, settings.threads)
    known = operations(settings.device)
    if settings.operation not in known:
        raise ValueError(f"operation is {settings.operation!r}: choose one of {', '.join(known)}")
    if settings.workload not in WORKLOADS:
        raise ValueError(f"workload is {settings.workload!r}: choose one of {', '.join(WORKLOADS)}")
    with_gradients = settings.workload != "forward"
    make = _attention if settings.operation == SDPA else _flow_attention
    operate, inputs = make(settings, torch.Generator().manual_seed(0))
    for tensor in inputs:
        tensor.requires_grad_(with_gradients)

    def run_once() -> None:
        for tensor in inputs:
            tensor.grad = None
        y = operate()
        if with_gradients:
            y.backward(torch.ones_like(y))

    def timed_call() -> Timing:
        with torch_operations_only() if settings.operation == TORCH else nullcontext():
            seconds = timed(run_once, settings.device)
        return Timing(seconds, round(peak_memory_mib(settings.device), 1), describe_machine(settings.device))

    return timed_call


@contextmanager
def torch_operations_only() -> Iterator[None]:
    """Disable the C and Triton kernels."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before


def _flow_attention(
    settings: SingleHeadSettings, generator: torch.Generator
) -> tuple[Callable[[], torch.Tensor], Sequence[torch.Tensor]]:
    heads, length, device = settings.heads, settings.length, settings.device
    where = torch.device(device)
    compiled = index_layout(where, settings.position_dim) == "paged" or triton_available(where)
    if settings.operation in COMPILED.values() and not compiled:
        raise ValueError(
            f"operation is {settings.operation!r}, which needs a C compiler (on a GPU: Triton) and {SWITCH} not 0"
        )
    moved_on_grid, rest_on_grid = clustered_positions(settings, generator)
    moved, rest = moved_on_grid / GRID, rest_on_grid / GRID
    index = torch.arange(length, device=device)[None]
    rows = index.expand(heads, -1)
    # The affinity −γ‖q − k‖² with γ = 0.3 as a dot product; see `augment_key`.
    key = torch.cat([rest, -0.3 * rest.square().sum(dim=-1, keepdim=True)], dim=-1)[None]
    query = torch.cat([0.6 * moved, torch.ones_like(moved[..., :1])], dim=-1)[None]
    value = torch.randn(1, heads, length, settings.width, generator=generator).to(device, dtype_named(settings.dtype))
    decay = torch.rand(heads, generator=generator).to(device)

    def operate() -> torch.Tensor:
        searched = moved_on_grid, rows, rest_on_grid, settings.num_neighbors, settings.window
        if settings.operation == EXACT:
            neighbors, _ = search_exact(*searched)
        else:
            neighbors, _ = search_tree(*searched, settings.num_leaves)
        return flow_attention(query, key, value, decay, index, index, neighbors[None], settings.window)[0]

    return operate, (query, key, value, decay)


def _attention(
    settings: SingleHeadSettings, generator: torch.Generator
) -> tuple[Callable[[], torch.Tensor], Sequence[torch.Tensor]]:
    shape = (1, settings.heads, settings.length, settings.width)
    query, key, value = (
        torch.randn(shape, generator=generator).to(settings.device, dtype_named(settings.dtype)) for _ in range(3)
    )
    return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True), (query, key, value)


def clustered_positions(settings: SingleHeadSettings, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw moved and rest positions, int16 `[heads, length, position_dim]` in grid points of the ball.

    The positions are noisy copies of cluster centres with a skewed frequency, as those of tokens.
    """
    places = torch.randn(settings.heads, NUM_CLUSTERS, settings.position_dim, generator=generator)
    kinds = (torch.rand(settings.length, generator=generator).pow(3) * NUM_CLUSTERS).long()

    def positions() -> torch.Tensor:
        blur = torch.randn(settings.heads, settings.length, settings.position_dim, generator=generator)
        drawn = squash_to_ball(1.2 * places[:, kinds] + 0.15 * blur)
        return to_grid(drawn).to(settings.device)

    return positions(), positions()
