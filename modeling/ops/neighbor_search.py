"""Causal neighbour search: the K nearest predecessors of every entity, in O(n log n).

Two searches share one ranking, by (squared distance, most recent first):

- `exact`: blockwise over all predecessors, O(n^2) time and O(n) memory; the reference, the choice for short inputs.
- `cells`: causal cell lists. Each of several tables lays a randomly rotated and shifted grid over the positions. One
  sort per table by (cell, time) makes the predecessors of an entity in its cell a contiguous run; the last w of the
  run are candidates. Between calls the runs live on as chains (`CellChains`): the newest entity of each cell and, per
  entity, a link to the one before it. A prefill, a chunk and a single step walk the same function.

Shape letters: B batch, H heads, G = B * H rows, M queries of this call, N stored entities, P position_dim, L tables,
A axes of a grid, w candidates per table, K neighbours.
"""

import math
import sys
from collections.abc import Iterable

import torch

from .cell_grid import MAX_CELLS_PER_AXIS, check_cell_sizes
from .cell_lists import (
    EMPTY_KEY_CELL,
    EMPTY_QUERY_CELL,
    SORT_CHUNK,
    CellChains,
    CellGrids,
    CellLists,
    fold_segments,
    grid_constants,
    sort_by_cell_and_time,
    start_chains,
)
from .custom_ops import custom_op, use_custom_ops
from .dispatch import can_use_triton_search
from .kernels.neighbor_search_cpu import MAX_CANDIDATES, MAX_NEIGHBORS, search_cells_cpu, search_library

NO_CODE = 2**63 - 1
NO_BITS = NO_CODE >> 32  # of a distance
QUERY_CHUNK = 2048  # queries whose candidates are held and ranked at a time
KEY_CHUNK = 4096  # the same for keys in the exact search


def nearest_predecessors(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    num_neighbors: int,
    *,
    window: int = 0,
    method: str = "cells",
    num_tables: int = 8,
    candidates_per_table: int = 16,
    cell_sizes: list[float] | None = None,
    seed: int = 0,
    segment_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest predecessors of every entity, by Euclidean distance.

    Args:
        query_positions: float `[batch, heads, length, position_dim]`. Half precision is searched as float32.
        key_positions: float, same shape.
        num_neighbors: K ≥ 0.
        window: entity i sees the candidates j ≤ i − window; 0 lets it see itself.
        method: "exact" ranks all of them, "cells" those that share a cell with it (module docstring).
        num_tables: L, grids of the cell search.
        candidates_per_table: w, the most recent candidates taken from each table.
        cell_sizes: one edge length per table; None: geometric from 8 to 0.35. Cells end 511 edges from the origin.
        seed: draws the grids; no global random state is used.
        segment_ids: int `[batch, length]`; an entity sees its own segment only; negative is padding.

    Returns:
        (indices int64, squared distances) `[batch, heads, length, K]`: the K nearest distinct candidates by distance,
        then most recent first. Where there are fewer, −1 and inf.

    Raises:
        ValueError: wrong shapes or values, positions that are not finite.
    """
    if query_positions.dim() != 4 or query_positions.shape != key_positions.shape:
        raise ValueError(
            "query_positions and key_positions must both be [batch, heads, length, position_dim], got "
            f"{list(query_positions.shape)} and {list(key_positions.shape)}."
        )
    batch, heads, length, position_dim = query_positions.shape
    if position_dim < 1:
        raise ValueError("query_positions has position_dim 0; positions need at least one dimension.")
    if num_neighbors < 0 or window < 0:
        raise ValueError(f"num_neighbors and window must be ≥ 0, got {num_neighbors} and {window}.")
    if method not in ("cells", "exact"):
        raise ValueError(f'method must be "cells" or "exact", got {method!r}.')
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids must be [batch, length] = {[batch, length]}, got {list(segment_ids.shape)}.")
    for name, positions in (("query_positions", query_positions), ("key_positions", key_positions)):
        if not positions.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {positions.dtype}; convert it with .float().")
        if not positions.isfinite().all():
            raise ValueError(
                f"{name} holds values that are not finite; find out where they come from before searching."
            )
    cell_sizes = check_cell_sizes(cell_sizes, num_tables, candidates_per_table)

    dtype = torch.float64 if query_positions.dtype == torch.float64 else torch.float32
    if query_positions.numel() == 0:
        shape, device = (batch, heads, length, num_neighbors), query_positions.device
        return torch.full(shape, -1, device=device), torch.full(shape, math.inf, dtype=dtype, device=device)
    with torch.no_grad():
        queries, keys = (x.detach().to(dtype).flatten(0, 1) for x in (query_positions, key_positions))
        index = torch.arange(length, device=queries.device).expand(batch * heads, -1)
        segments = None
        if segment_ids is not None:
            segments = segment_ids.long().repeat_interleave(heads, dim=0)
        if method == "exact":
            found = search_exact(queries, index, keys, num_neighbors, window, segments=segments)
        else:
            rotation, shift = (x.to(queries.device) for x in grid_constants(position_dim, num_tables, seed))
            grids = CellGrids(rotation, shift, cell_sizes, [MAX_CELLS_PER_AXIS] * num_tables)
            found = search_cells(
                queries,
                grids.cells(queries),
                index,
                keys,
                grids.cells(keys),
                num_neighbors,
                window,
                candidates_per_table,
                segments=segments,
            )
    return tuple(x.view(batch, heads, length, num_neighbors) for x in found)


def nearest_predecessors_reference(query_positions, key_positions, num_neighbors, *, window=0, segment_ids=None):
    """`nearest_predecessors(method="exact")` as a loop over entities: one sort each, O(n^2 log n)."""
    batch, heads, length, _ = query_positions.shape
    indices = torch.full((batch, heads, length, num_neighbors), -1)
    distances = torch.full((batch, heads, length, num_neighbors), math.inf, dtype=query_positions.dtype)
    for row in range(batch):
        for head in range(heads):
            for i in range(length):
                ranked = []
                for j in range(i - window + 1):
                    if segment_ids is not None and not 0 <= segment_ids[row, i] == segment_ids[row, j]:
                        continue
                    squared = squared_distances(query_positions[row, head, i], key_positions[row, head, j])
                    ranked.append((squared.item(), i - j, j))
                for rank, (squared, _, j) in enumerate(sorted(ranked)[:num_neighbors]):
                    indices[row, head, i, rank], distances[row, head, i, rank] = j, squared
    return indices, distances


def search_cells(
    query_positions: torch.Tensor,
    query_cells: torch.Tensor,
    query_index: torch.Tensor,
    key_positions: torch.Tensor,
    key_cells: torch.Tensor,
    num_neighbors: int,
    window: int,
    candidates_per_table: int,
    *,
    reach: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    chains: CellChains | None = None,
    segments: torch.Tensor | None = None,
    table_offsets: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K nearest distinct candidates of each query; brings the chains up to date.

    Query a of a row has index i = past + a; the entity i − window becomes visible with it.

    Args:
        query_positions: `[G, M, P]`; query_cells: int32 `[G, M, L]`; query_index: int64 `[G, M]`, past + a.
        key_positions: `[G, N, P]`; key_cells: int32 `[G, N, L]`; of all entities, past and new.
        reach: int64 `[G, M]`, how many of the entities just before it a query may see; all if None.
        counts: int64 `[G]`, how many queries of the row are real; the rest are padding at its end. All if None.
        chains: the entities before index past − window; None if there is no past and none is to be kept.
        segments: int64 `[G, M]`, a query sees its own segment only; none if negative. Only without a past.
        table_offsets: `CellGrids.table_offsets` where cells are few enough to be addressed and positions lie on the
            grid: native code then finds the same lists sooner.

    Returns:
        (indices int64 `[G, M, K]`, squared distances `[G, M, K]`); −1 and inf where there are fewer than K.
    """
    arguments = (query_positions, query_cells, query_index, key_positions, key_cells)
    arguments += (num_neighbors, window, candidates_per_table, reach, counts, segments, table_offsets)
    if chains is not None:
        arguments += (chains.heads, chains.links, chains.table_offsets)
    return _search_operator(*arguments) if use_custom_ops() else _search_cells(*arguments)


def _search_cells(
    query_positions: torch.Tensor,
    query_cells: torch.Tensor,
    query_index: torch.Tensor,
    key_positions: torch.Tensor,
    key_cells: torch.Tensor,
    num_neighbors: int,
    window: int,
    candidates_per_table: int,
    reach: torch.Tensor | None,
    counts: torch.Tensor | None,
    segments: torch.Tensor | None,
    table_offsets: list[int] | None,
    heads: torch.Tensor | None = None,
    links: torch.Tensor | None = None,
    chain_offsets: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`search_cells`, with the parts of the chains one by one as operators need them."""
    rows, num_queries, num_tables = query_cells.shape
    if num_queries == 0 or num_neighbors == 0:
        shape = (rows, num_queries, num_neighbors)
        return query_index.new_full(shape, -1), query_positions.new_full(shape, math.inf)
    addressed = table_offsets is not None and segments is None
    fits = addressed and num_neighbors <= MAX_NEIGHBORS and candidates_per_table <= MAX_CANDIDATES
    library = search_library(query_positions) if fits else None
    if library is not None:
        return search_cells_cpu(
            library,
            query_positions,
            query_cells,
            query_index,
            key_positions,
            key_cells,
            num_neighbors,
            window,
            candidates_per_table,
            table_offsets,
            reach,
            counts,
            heads,
            links,
        )
    chains = None if heads is None else CellChains(heads, links, chain_offsets)
    on_gpu = addressed and can_use_triton_search(query_positions, num_tables, candidates_per_table)
    if on_gpu and (chains is None or (num_queries > 1 and bool((query_index[:, 0] == 0).all()))):
        from .kernels.triton_launch import search_cells_triton

        if chains is not None:
            start_chains(chains, key_cells[:, :num_queries], window, counts)
        return search_cells_triton(
            query_positions,
            query_cells,
            key_positions,
            key_cells,
            num_neighbors,
            window,
            candidates_per_table,
            table_offsets,
            reach,
            counts,
        )
    device = query_cells.device
    flat_keys = key_positions.reshape(-1, key_positions.shape[-1])
    row_start = torch.arange(rows, device=device)[:, None, None] * key_positions.shape[1]

    entering = query_index - window
    absent_keys, absent_queries = entering < 0, None
    if counts is not None:
        absent_queries = torch.arange(num_queries, device=device) >= counts[:, None]
        absent_keys = absent_keys | absent_queries
    entering_cells = key_cells.gather(1, entering.clamp(min=0)[..., None].expand(-1, -1, num_tables)).transpose(1, 2)
    sort_cells, entering_cells = query_cells.transpose(1, 2).long(), entering_cells.long()
    if segments is not None:
        sort_cells, entering_cells = fold_segments(sort_cells, entering_cells, segments, entering)
        absent_queries = segments < 0
        absent_keys = absent_keys | absent_queries.gather(1, entering.clamp(min=0))

    lists = CellLists.empty(rows, num_tables, num_queries, candidates_per_table, device)
    chain_heads = []
    tables_at_once = max(1, SORT_CHUNK // (rows * num_queries))
    for tables in torch.arange(num_tables).split(tables_at_once):
        tables = slice(int(tables[0]), int(tables[-1]) + 1)
        keys = entering_cells[:, tables].masked_fill(absent_keys[:, None], EMPTY_KEY_CELL)
        queries = sort_cells[:, tables]
        if absent_queries is not None:
            queries = queries.masked_fill(absent_queries[:, None], EMPTY_QUERY_CELL)
        run, ends = sort_by_cell_and_time(keys, queries)
        lists.set(tables, run, ends, queries)
        if chains is not None:
            chain_heads.append(chains.newest(queries, tables))
            chains.extend(run, entering[:, :1], tables)
    if chains is None:
        # Entities of a cell lie side by side then, and a query reads neighbouring memory.
        entering_keys = flat_keys.index_select(0, (row_start[..., 0] + entering.clamp(min=0)).view(-1))
        lists.lay_out(entering_keys.view(rows, num_queries, -1))
    else:
        chain_heads = torch.cat(chain_heads, dim=1)

    indices, distances = [], []
    step = max(1, QUERY_CHUNK // rows)
    for start in range(0, num_queries, step):
        part = slice(start, min(start + step, num_queries))
        index, positions = query_index[:, part, None].int(), query_positions[:, part]
        times, visible = lists.read(part)
        ids = times + entering[:, :1, None].int()
        if chains is None:
            squared = sum_of_squares(positions[..., p, None] - keys for p, keys in enumerate(lists.read_places(part)))
        else:
            ids = ids.long().masked_fill_(~visible, -1).unflatten(-1, (num_tables, -1)).transpose(1, 2).contiguous()
            chains.walk(ids, chain_heads[..., part])
            ids = ids.transpose(1, 2).flatten(2)
            if absent_queries is not None:
                ids = ids.masked_fill(absent_queries[:, part, None], -1)
            visible = ids >= 0
            keys = flat_keys.index_select(0, (row_start + ids.clamp(min=0)).view(-1)).view(*ids.shape, -1)
            squared = squared_distances(positions.unsqueeze(2), keys)
        if reach is not None:
            visible &= ids >= index - reach[:, part, None].int()
        nearest, squared = rank_nearest(squared, index - ids, visible, num_neighbors)
        indices.append(torch.where(nearest < 0, -1, index - nearest))
        distances.append(squared)
    return torch.cat(indices, dim=1), torch.cat(distances, dim=1)


def _shape_of_found(query_positions, query_cells, query_index, key_positions, key_cells, num_neighbors, *others):
    shape = (*query_index.shape, num_neighbors)
    return query_index.new_empty(shape), query_positions.new_empty(shape)


_search_operator = custom_op(_search_cells, _shape_of_found, mutates_args=("heads", "links"))


def search_exact(
    query_positions: torch.Tensor,
    query_index: torch.Tensor,
    key_positions: torch.Tensor,
    num_neighbors: int,
    window: int,
    *,
    reach: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K nearest of all predecessors, block by block: O(N) memory. Arguments and results as `search_cells`."""
    arguments = query_positions, query_index, key_positions, num_neighbors, window, reach, segments
    return _exact_operator(*arguments) if use_custom_ops() else _search_exact(*arguments)


def _search_exact(
    query_positions: torch.Tensor,
    query_index: torch.Tensor,
    key_positions: torch.Tensor,
    num_neighbors: int,
    window: int,
    reach: torch.Tensor | None,
    segments: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, num_queries, _ = query_positions.shape
    num_keys = key_positions.shape[1]
    device = query_positions.device
    indices, distances = [], []
    step = max(1, QUERY_CHUNK // rows)
    for start in range(0, num_queries, step):
        part = slice(start, min(start + step, num_queries))
        index = query_index[:, part, None]
        offsets = query_index.new_empty(rows, part.stop - part.start, 0)
        squared = query_positions.new_empty(rows, part.stop - part.start, 0)
        # Which keys count is not known, or not without a wait for each step of a GPU: all may.
        if torch.compiler.is_exporting() or (num_queries == 1 and device.type != "cpu"):
            last_key = num_keys if num_neighbors else 0
        else:
            last_key = min(num_keys, int(index.max()) - window + 1) if num_neighbors else 0
        for first in range(0, last_key, KEY_CHUNK):
            ids = torch.arange(first, min(first + KEY_CHUNK, last_key), device=device)
            visible = ids <= index - window
            if reach is not None:
                visible &= ids >= index - reach[:, part, None].int()
            if segments is not None:
                own = segments[:, part, None]
                visible &= (segments[:, None, ids] == own) & (own >= 0)
            block = squared_distances(query_positions[:, part, None], key_positions[:, None, ids])
            offsets = torch.cat([offsets, (index - ids)], dim=-1)
            squared = torch.cat([squared, block.masked_fill(~visible, math.inf)], dim=-1)
            offsets, squared = rank_nearest(squared, offsets, squared.isfinite(), num_neighbors)
        if offsets.shape[-1] < num_neighbors:
            offsets, squared = rank_nearest(squared, offsets, squared.isfinite(), num_neighbors)
        indices.append(torch.where(offsets < 0, -1, index - offsets))
        distances.append(squared)
    return torch.cat(indices, dim=1), torch.cat(distances, dim=1)


_exact_operator = custom_op(
    _search_exact,
    lambda queries, index, keys, num_neighbors, *others: (
        index.new_empty(*index.shape, num_neighbors),
        queries.new_empty(*index.shape, num_neighbors),
    ),
)


def squared_distances(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Σ_p (q_p − k_p)² over the last dimension."""
    return sum_of_squares(queries[..., p] - keys[..., p] for p in range(queries.shape[-1]))


def sum_of_squares(apart: Iterable[torch.Tensor]) -> torch.Tensor:
    """Σ_p x_p², summed in a fixed order so that every caller gets the same bits. What it is given it may overwrite."""
    squares = (x.mul_(x) for x in apart)
    total = next(squares)
    for square in squares:
        total += square
    return total


def rank_nearest(
    squared: torch.Tensor, offsets: torch.Tensor, visible: torch.Tensor, num_neighbors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K distinct visible candidates first by (squared distance, offset): `[..., C]` → two of `[..., K]`.

    A candidate may stand in several tables: equal offsets are one entity. Offsets are −1 and distances inf where fewer
    than K are visible.
    """
    missing = num_neighbors - squared.shape[-1]
    if missing > 0:
        squared = torch.nn.functional.pad(squared, (0, missing), value=math.inf)
        offsets = torch.nn.functional.pad(offsets, (0, missing))
        visible = torch.nn.functional.pad(visible, (0, missing))
    if squared.dtype == torch.float64:
        return _rank_float64(squared, offsets, visible, num_neighbors)
    # The bits of a float32 ≥ 0 sort as it does: distance and offset make one integer, equal only for the same entity.
    bits = squared.view(torch.int32) | _where(~visible, NO_BITS, torch.int32)
    codes = torch.stack([offsets.int(), bits] if sys.byteorder == "little" else [bits, offsets.int()], dim=-1)
    codes = _smallest_distinct(codes.view(torch.int64).squeeze(-1), num_neighbors)
    bits = (codes >> 32).int()
    found = bits != NO_BITS
    offsets = torch.where(found, codes & 0xFFFFFFFF, -1)
    return offsets, bits.view(torch.float32).masked_fill(~found, math.inf)


def _where(mask: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """`bits` where the mask is set, else 0. With |= it fills as `masked_fill` does, without a branch per element."""
    return mask.to(dtype).neg_().bitwise_and_(bits)


def _smallest_distinct(codes: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` smallest different values of the last dimension, sorted, `NO_CODE` where there are fewer."""
    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        codes = codes.sort(dim=-1).values
        codes[..., 1:] |= _where(codes[..., 1:] == codes[..., :-1], NO_CODE, torch.int64)
        return codes.topk(count, dim=-1, largest=False).values
    array = codes.contiguous().numpy()  # NumPy sorts int64 several times faster than torch does on CPU
    array.sort(axis=-1)
    codes = torch.from_numpy(array)
    codes[..., 1:] |= _where(codes[..., 1:] == codes[..., :-1], NO_CODE, torch.int64)
    array.sort(axis=-1)
    return codes[..., :count]


def _rank_float64(squared, offsets, visible, num_neighbors):
    """`rank_nearest` where distance and offset do not fit one integer: two stable sorts."""
    squared = squared.masked_fill(~visible, math.inf)
    order = offsets.argsort(dim=-1, stable=True)
    order = order.gather(-1, squared.gather(-1, order).argsort(dim=-1, stable=True))
    squared, offsets, found = (x.gather(-1, order) for x in (squared, offsets, visible))
    found[..., 1:] &= offsets[..., 1:] != offsets[..., :-1]
    first = (~found).int().argsort(dim=-1, stable=True)[..., :num_neighbors]
    squared, offsets, found = (x.gather(-1, first) for x in (squared, offsets, found))
    return offsets.masked_fill(~found, -1), squared.masked_fill(~found, math.inf)
