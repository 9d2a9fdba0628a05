"""Causal cell lists in C: `neighbor_search.search_cells` in float32 on a CPU.

The C code processes one entity at a time. An entity that leaves the local window is added to the ring buffers of its
cells, and a query reads the ring buffers of its own cells. If a cache keeps the chains, the entity becomes the newest
of its cells' chains too; a short call reads the chains instead of ring buffers. The lists equal those of the torch
form bit for bit.
"""

import ctypes

import torch

from .c_compiler import compiled_library, in_threads, kernels_enabled, pointer
from .c_source import c_source

MAX_NEIGHBORS = MAX_CANDIDATES = 2**14  # the C code keeps them on the stack
# Without fused multiply-adds, distances have the same bits as in torch.
SEARCH_FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fopenmp-simd")
SEARCH_SOURCE = c_source("neighbor_search_cpu.c")

SEARCH_SIZES = (
    "length",
    "tables",
    "dims",
    "wanted",
    "window",
    "candidates",
    "stored",
    "cells_stored",
    "slots",
    "link_capacity",
)
SEARCH_TENSORS = (
    "queries",
    "keys",
    "query_cells",
    "key_cells",
    "query_index",
    "reach",
    "counts",
    "offsets",
    "newest",
    "links",
)


class _Search(ctypes.Structure):
    """`Search` of the C code: sizes and tensors."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in SEARCH_SIZES),
        *((name, ctypes.c_void_p) for name in (*SEARCH_TENSORS, "indices", "distances")),
    ]


def search_library(positions: torch.Tensor) -> ctypes.CDLL | None:
    """Return the compiled library if positions are float32 on a CPU and kernels are enabled, else None."""
    if positions.device.type != "cpu" or positions.dtype != torch.float32 or not kernels_enabled():
        return None
    return compiled_library(SEARCH_SOURCE, *SEARCH_FLAGS, functions=("cells", "search"), carried="libneighbor_search")


def cells_cpu(
    library: ctypes.CDLL,
    positions: torch.Tensor,
    grid: int,
    scale: int,
    rotation: torch.Tensor,
    shift: torch.Tensor,
    edges: list[int],
    cells_per_axis: list[int],
) -> torch.Tensor:
    """`cell_lists.CellGrids.cells` for positions on the grid; returns int32 `[..., L]`.

    Args:
        library: from `search_library`.
        positions: `[..., P]`.
        grid: grid points per unit.
        scale: units of rotation and shift are 1 / scale.
        rotation: int32 `[L, A, P]`.
        shift: int32 `[L, A]`, as a fraction of an edge.
        edges: one per table, in units of 1 / (grid · scale).
        cells_per_axis: one per table.
    """
    num_tables, axes, dims = rotation.shape
    positions, rotation, shift = positions.contiguous(), rotation.contiguous(), shift.contiguous()
    out = rotation.new_empty(*positions.shape[:-1], num_tables)
    edge_array, count_array = ((ctypes.c_int64 * num_tables)(*values) for values in (edges, cells_per_axis))

    def work(first: int, last: int) -> None:
        sizes = (ctypes.c_int64(size) for size in (first, last, num_tables, axes, dims))
        tensors = (pointer(tensor) for tensor in (rotation, shift))
        library.cells(
            *sizes,
            pointer(positions),
            ctypes.c_double(grid),
            ctypes.c_int64(scale),
            *tensors,
            edge_array,
            count_array,
            pointer(out),
        )

    in_threads(work, positions.numel() // dims if dims else 0, 1)
    return out


def search_cells_cpu(
    library: ctypes.CDLL,
    query_positions: torch.Tensor,
    query_cells: torch.Tensor,
    query_index: torch.Tensor,
    key_positions: torch.Tensor,
    key_cells: torch.Tensor,
    num_neighbors: int,
    window: int,
    candidates_per_table: int,
    table_offsets: list[int],
    reach: torch.Tensor | None,
    counts: torch.Tensor | None,
    newest: torch.Tensor | None,
    links: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`neighbor_search.search_cells` with at least one query and one neighbour; updates `newest` and `links` in place.

    Raises:
        MemoryError: the ring buffers cannot be allocated.
    """
    rows, length, num_tables = query_cells.shape
    assert newest is None or (newest.is_contiguous() and links.is_contiguous())
    inputs = (query_positions, query_cells, query_index, key_positions, key_cells, reach, counts)
    query_positions, query_cells, query_index, key_positions, key_cells, reach, counts = (
        None if tensor is None else tensor.contiguous() for tensor in inputs
    )
    stored = key_positions.shape[1]
    offsets = query_index.new_tensor(table_offsets[:-1])
    indices = query_index.new_empty(rows, length, num_neighbors)
    distances = query_positions.new_empty(rows, length, num_neighbors)
    sizes = (length, num_tables, query_positions.shape[-1], num_neighbors, window, candidates_per_table, stored)
    call = _Search(*sizes, key_cells.shape[1], table_offsets[-1], 0 if links is None else links.shape[1])
    tensors = (
        query_positions,
        key_positions,
        query_cells,
        key_cells,
        query_index,
        reach,
        counts,
        offsets,
        newest,
        links,
    )
    for name, tensor in zip((*SEARCH_TENSORS, "indices", "distances"), (*tensors, indices, distances), strict=True):
        setattr(call, name, pointer(tensor))

    def work(first: int, last: int) -> None:
        if library.search(ctypes.c_int64(first), ctypes.c_int64(last), ctypes.byref(call)):
            raise MemoryError(
                f"The neighbour search could not allocate memory for the cell lists of {stored} entities."
            )

    in_threads(work, rows, length)
    return indices, distances
