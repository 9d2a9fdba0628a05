"""Launches the Triton kernels of the neighbour search and of flow attention. Importing it requires Triton.

Block sizes are estimates for an H200, not measurements.

Shape letters: B batch, H heads, G = B * H rows, M queries, N stored entities, E query/key features, D value features,
P position_dim, L tables, w candidates per table, K neighbours.
"""

from itertools import pairwise

import torch

try:  # transformers requires every package imported outside a `try` on each machine that loads this file
    import triton
except ImportError:
    raise

from .flow_attention_triton import (
    Attention,
    StridedRows,
    backward_keys_kernel,
    backward_neighbors_kernel,
    backward_queries_kernel,
    forward_kernel,
)
from .neighbor_search_triton import Search, cells_kernel, constexpr, ends_kernel, search_kernel

PLACES = 256  # entities per program of cells_kernel and ends_kernel
CODES_PER_WARP = 512  # candidate codes per program of search_kernel
QUERIES = 16  # queries per program of the attention kernels, the minimum of a matrix product
KEYS = 16  # entities per program of backward_keys_kernel
PAIRS = 16  # queries per iteration of backward_neighbors_kernel
TILE = 32  # entities of the local window, or queries of an entity, per iteration


def cells_triton(
    positions: torch.Tensor,
    grid: float,
    rotation: torch.Tensor,
    shift: torch.Tensor,
    edges: torch.Tensor,
    cells_per_axis: list[int],
) -> torch.Tensor:
    """`cell_lists.CellGrids.cells` for positions on the grid; returns int32 `[..., M, L]`, stored by table.

    Args:
        positions: float32 `[..., M, P]`.
        grid: grid points per unit.
        rotation: int32 `[L, A, P]`.
        shift: `[L, A]`, integers in units of rotated positions.
        edges: `[L]`, likewise.
        cells_per_axis: one per table.
    """
    *leading, length, dims = positions.shape
    tables, axes, _ = rotation.shape
    cells = torch.empty(*leading, tables, length, dtype=torch.int32, device=positions.device)
    counts = torch.tensor(cells_per_axis, dtype=torch.int32, device=positions.device)
    constants = (positions.contiguous(), rotation.int().contiguous(), shift.double(), edges.double(), counts)
    blocks, rows = -(-length // PLACES), cells[..., 0, 0].numel()
    with torch.cuda.device_of(positions):
        cells_kernel[(rows * blocks,)](
            *constants, cells, length, blocks, grid, tables, axes, dims, triton.next_power_of_2(dims), PLACES
        )
    return cells.transpose(-1, -2)


def search_cells_triton(
    query_positions: torch.Tensor,
    query_cells: torch.Tensor,
    key_positions: torch.Tensor,
    key_cells: torch.Tensor,
    num_neighbors: int,
    window: int,
    candidates_per_table: int,
    table_offsets: list[int],
    reach: torch.Tensor | None,
    counts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`neighbor_search.search_cells` for rows without a past."""
    rows, length, tables = query_cells.shape
    num_cells = max(end - start for start, end in pairwise(table_offsets))
    # A stable sort keeps the time order. Shorter keys need fewer radix passes.
    cells = key_cells.transpose(1, 2).to(torch.int16 if num_cells < 2**15 else torch.int32)
    cells, times = cells.contiguous().sort(dim=-1, stable=True)
    bounds = torch.arange(num_cells + 1, device=cells.device).to(cells.dtype).expand(rows, tables, -1)
    padded_tables, padded_candidates = triton.next_power_of_2(tables), triton.next_power_of_2(candidates_per_table)
    search = Search(
        queries=query_positions.contiguous(),
        keys=key_positions.contiguous(),
        cells=query_cells.transpose(1, 2).contiguous(),
        times=times.int(),
        starts=torch.searchsorted(cells, bounds.contiguous(), out_int32=True),
        ends=torch.empty(rows, tables, length, dtype=torch.int32, device=cells.device),
        reach=None if reach is None else reach.contiguous(),
        counts=counts,
        length=length,
        num_cells=num_cells,
        window=constexpr(window),
        dims=constexpr(query_positions.shape[-1]),
        tables=constexpr(tables),
        padded_tables=constexpr(padded_tables),
        candidates=constexpr(candidates_per_table),
        padded_candidates=constexpr(padded_candidates),
    )
    indices = query_positions.new_empty(rows, length, num_neighbors, dtype=torch.int64)
    distances = query_positions.new_empty(rows, length, num_neighbors)
    blocks = -(-length // PLACES)
    queries = max(1, CODES_PER_WARP // (padded_tables * padded_candidates))
    search_blocks = -(-length // queries)
    with torch.cuda.device_of(indices):
        ends_kernel[(rows * tables * blocks,)](search, blocks, length.bit_length(), PLACES)
        # One warp per program keeps each reduction within the warp.
        search_kernel[(rows * search_blocks,)](
            search, indices, distances, search_blocks, num_neighbors, queries, num_warps=1
        )
    return indices, distances


def flow_attention_forward_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flow_attention.flow_attention_forward` without dropout."""
    batch, heads, length, _ = query.shape
    # The heads of an entity are contiguous, as in `flow_attention_torch.empty_y`.
    y = value.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, heads, length)
    blocks = -(-length // QUERIES)
    call = _kernel_inputs(query, key, value, decay, query_index, reach, neighbors, window)
    with torch.cuda.device_of(query):
        forward_kernel[(batch * heads * blocks,)](call, _rows(y), lse, blocks, QUERIES, TILE)
    return y, lse


def flow_attention_backward_triton(
    grad_y: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`flow_attention.flow_attention_backward` without dropout.

    The gradients of neighbours are summed with atomic additions, in any order. With
    `torch.use_deterministic_algorithms(True)` another kernel sums them in a fixed order.
    """
    batch, heads, length, _ = query.shape
    stored, num_neighbors, rows = key.shape[2], neighbors.shape[-1], batch * heads
    blocks, key_blocks = -(-length // QUERIES), -(-stored // KEYS)
    warps = max(4, triton.next_power_of_2(value.shape[-1]) // 16)  # enough registers for a program's rows
    call = _kernel_inputs(query, key, value, decay, query_index, reach, neighbors, window)
    grad_y_rows, grad_lse = _rows(grad_y), grad_lse.contiguous()
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    grad_query, grad_key, grad_value = (_rows(grad) for grad in grads)
    grad_decay, sums = query.new_empty(batch, heads, blocks), torch.empty_like(lse)
    far: tuple[StridedRows | None, ...] = (None, None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    if num_neighbors:
        make = torch.empty_like if deterministic else torch.zeros_like
        far = tuple(_rows(make(x, dtype=torch.float32)) for x in grads[1:])
    with torch.cuda.device_of(query):
        backward_queries_kernel[(rows * blocks,)](
            call, lse, _rows(y), grad_y_rows, grad_lse, sums, grad_query, grad_decay, *far, blocks,
            bool(num_neighbors) and not deterministic, QUERIES, TILE, num_warps=warps,
        )  # fmt: skip
        if num_neighbors and deterministic:
            sorted_neighbors, pairs = neighbors.reshape(rows, -1).sort(dim=-1, stable=True)
            entities = torch.arange(stored + 1, device=sorted_neighbors.device).expand(rows, -1).contiguous()
            starts = torch.searchsorted(sorted_neighbors, entities)
            backward_neighbors_kernel[(rows * stored,)](
                call, pairs, starts, lse, grad_y_rows, sums, *far, PAIRS, num_warps=warps // 4
            )
        backward_keys_kernel[(rows * key_blocks,)](
            call, lse, grad_y_rows, sums, *far, grad_key, grad_value, key_blocks, KEYS, TILE, num_warps=warps
        )
    return grads[0], grads[1], grads[2], grad_decay.sum(dim=(0, 2))


def _kernel_inputs(query, key, value, decay, query_index, reach, neighbors, window):
    """Collect the inputs of the attention kernels."""
    return Attention(
        query=_rows(query),
        key=_rows(key),
        value=_rows(value),
        decay=decay.contiguous(),
        past=query_index[:, 0].contiguous(),
        reach=reach.contiguous(),
        neighbors=neighbors.contiguous(),
        heads=query.shape[1],
        length=query.shape[2],
        stored=key.shape[2],
        num_neighbors=constexpr(neighbors.shape[-1]),
        window=constexpr(window),
    )


def _rows(x: torch.Tensor) -> StridedRows:
    """Return the address and strides of `x` `[B, H, length, features]`, copied if its features are not contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    features, (batch, head, entity) = x.shape[-1], x.stride()[:3]
    padded = max(16, triton.next_power_of_2(features))
    return StridedRows(x, batch, head, entity, constexpr(features), constexpr(padded))
