"""Causal neighbour search: the K nearest predecessors of every entity.

Two methods share one ranking, by (squared distance, most recent first):

- `exact`: blockwise over all predecessors, O(n²) time and O(n) memory. It runs in torch.
- `tree`: over the most recent predecessors and the nearest leaves of a tree of bounding boxes (`box_tree`).
  `dispatch.search_backend` chooses between C, Triton and torch. All of them return the same lists, and one call over a
  sequence returns the lists of any sequence of calls with an index.

Shape letters: B batch, H heads, G = B * H rows, M queries of this call, N stored entities, P position_dim,
K neighbours.
"""

import math
from typing import Any

import torch

from .box_tree import GRID, TreeIndex, to_grid
from .box_tree_torch import search_tree_torch
from .custom_ops import custom_op, use_custom_ops
from .dispatch import search_backend
from .higher_order import KernelFunction
from .kernels.box_tree_cpu import crop_tree_cpu, search_tree_cpu, tree_library
from .neighbor_ranking import NO_DISTANCE, rank_nearest, squared_distances

EXACT_QUERIES = 2048  # queries that the exact search ranks together
EXACT_KEYS = 4096  # keys that it ranks together
MAX_POSITION = 255.0  # largest coordinate, in units of position


def nearest_predecessors(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    num_neighbors: int,
    *,
    window: int = 0,
    method: str = "tree",
    num_leaves: int = 8,
    segment_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the nearest predecessors of every entity by Euclidean distance.

    Positions are rounded to multiples of 1/64. A sequence of less than 1,024 entities is searched exactly by both
    methods. In longer ones the tree search may miss distant neighbours.

    Args:
        query_positions: float `[batch, heads, length, position_dim]`.
        key_positions: float, same shape.
        num_neighbors: K ≥ 0.
        window: candidates of entity i are j ≤ i − window; 0 includes the entity itself.
        method: "tree" ranks the candidates of the box tree (module docstring), "exact" all predecessors.
        num_leaves: leaves that the tree search reads per query. More leaves find more of the nearest predecessors.
        segment_ids: int `[batch, length]`; the entities with one id are a sequence of their own, as if they were alone
            in a row; negative ids are padding.

    Returns:
        (positions of the neighbours in their row, int64; squared distances, float32), both
        `[batch, heads, length, K]`, by distance, then most recent first; −1 and inf if there are fewer than K.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value; positions are not finite, or so large that their
            squared distances overflow.

    Example:
        >>> import torch
        >>> from dfn_hf.modeling.ops.neighbor_search import nearest_predecessors
        >>> positions = torch.tensor([0.0, 5.0, 0.5, 5.5]).view(1, 1, 4, 1)  # batch 1, head 1, length 4, 1 axis
        >>> indices, distances = nearest_predecessors(positions, positions, 1, window=1)
        >>> indices.flatten().tolist()
        [-1, 0, 0, 1]
        >>> distances.flatten().tolist()
        [inf, 25.0, 0.25, 0.25]
    """
    _check_search_arguments(query_positions, key_positions, num_neighbors, window, method, num_leaves, segment_ids)
    batch, heads, length, _ = query_positions.shape
    with torch.no_grad():
        query, key = (to_grid(x.detach()).flatten(0, 1) for x in (query_positions, key_positions))
        positions = torch.arange(length, device=query.device).expand(batch * heads, -1)
        reach, counts, order = positions, None, None
        if segment_ids is not None:
            order, reach, counts = (x.repeat_interleave(heads, dim=0) for x in _sort_segments(segment_ids))
            query, key = (x.gather(1, order[..., None].expand_as(x)) for x in (query, key))
        if method == "exact":
            indices, squared = search_exact(query, positions, key, num_neighbors, window, reach=reach)
        else:
            indices, squared = search_tree(
                query, positions, key, num_neighbors, window, num_leaves, reach=reach, counts=counts
            )
        if order is not None and counts is not None:
            indices, squared = _unsort_segments(indices, squared, order, counts)
        distances = (squared.double() / GRID**2).float().masked_fill(indices < 0, math.inf)
    shape = (batch, heads, length, num_neighbors)
    return indices.view(shape), distances.view(shape)


def _check_search_arguments(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    num_neighbors: int,
    window: int,
    method: str,
    num_leaves: int,
    segment_ids: torch.Tensor | None,
) -> None:
    """Raise a ValueError if an argument of `nearest_predecessors` has a wrong shape, dtype or value."""
    if query_positions.dim() != 4 or query_positions.shape != key_positions.shape:
        raise ValueError(
            "query_positions and key_positions must both be [batch, heads, length, position_dim], got "
            f"{list(query_positions.shape)} and {list(key_positions.shape)}."
        )
    batch, _, length, position_dim = query_positions.shape
    if position_dim < 1:
        raise ValueError("query_positions has position_dim 0; positions need at least one dimension.")
    if num_neighbors < 0 or window < 0:
        raise ValueError(f"num_neighbors and window must be ≥ 0, got {num_neighbors} and {window}.")
    if method not in ("tree", "exact"):
        raise ValueError(f'method must be "tree" or "exact", got {method!r}.')
    if num_leaves < 1:
        raise ValueError(f"num_leaves must be ≥ 1, got {num_leaves}.")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids must be [batch, length] = {[batch, length]}, got {list(segment_ids.shape)}.")
    for name, positions in (("query_positions", query_positions), ("key_positions", key_positions)):
        if not positions.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {positions.dtype}; convert it with .float().")
        if not positions.isfinite().all():
            raise ValueError(
                f"{name} contains values that are not finite: find their origin, for example a diverged model."
            )
    if query_positions.numel():
        _check_range(query_positions, key_positions)


def _check_range(query_positions: torch.Tensor, key_positions: torch.Tensor) -> None:
    """Raise a ValueError if positions do not fit in int16 or their squared distances do not fit in int32."""
    for name, positions in (("query_positions", query_positions), ("key_positions", key_positions)):
        largest = positions.abs().max().item()
        if largest > MAX_POSITION:
            raise ValueError(f"{name} must lie between −{MAX_POSITION} and {MAX_POSITION}, got ±{largest}: scale it.")
    both = torch.cat([query_positions.flatten(0, 2), key_positions.flatten(0, 2)]).float()
    diagonal = (both.amax(dim=0) - both.amin(dim=0) + 1 / GRID).square().sum().item()
    limit = NO_DISTANCE / GRID**2
    if diagonal >= limit:
        raise ValueError(
            "query_positions and key_positions span a box whose squared diagonal must be less than "
            f"{limit:.0f}, got {diagonal:.0f}: scale them."
        )


def _sort_segments(segment_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring the entities of each segment together, and padding to the end.

    Args:
        segment_ids: int `[B, M]`.

    Returns:
        (order of the entities `[B, M]`; number of entities before each in its segment, in this order `[B, M]`;
        entities of each row that are not padding `[B]`), int64.
    """
    segments = segment_ids.long()
    is_padding = segments < 0
    segments, order = segments.masked_fill(is_padding, torch.iinfo(torch.int64).max).sort(dim=-1, stable=True)
    positions = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    return order, positions - torch.searchsorted(segments, segments), (~is_padding).sum(dim=-1)


def _unsort_segments(
    indices: torch.Tensor, squared: torch.Tensor, order: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return results `[G, M, K]` in the order and with the positions before `_sort_segments`; none for padding."""
    rows, length, num_neighbors = indices.shape
    is_missing = (indices < 0) | (torch.arange(length, device=order.device) >= counts[:, None])[..., None]
    indices = order.gather(1, indices.clamp(min=0).flatten(1)).view_as(indices).masked_fill(is_missing, -1)
    place = order[..., None].expand(-1, -1, num_neighbors)
    return torch.empty_like(indices).scatter_(1, place, indices), torch.empty_like(squared).scatter_(1, place, squared)


def search_tree(
    query: torch.Tensor,
    query_index: torch.Tensor,
    key: torch.Tensor,
    num_neighbors: int,
    window: int,
    num_leaves: int,
    *,
    reach: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    index: TreeIndex | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the K nearest of each query's candidates in the box tree, and bring the index up to date.

    Query a of a row has position i = query_index[0] + a, and its candidates are among the entities up to i − window.
    A row may consist of several sequences (segments); a query sees its own only.

    Args:
        query: positions on the grid (`box_tree.to_grid`), int16 `[G, M, P]`. Squared distances must be less than
            2^31 − 1 grid points.
        query_index: int64 `[G, M]`, position i of each query in its row.
        key: int16 `[G, N, P]`, of past and new entities at their positions in the row.
        num_neighbors: K.
        window: W.
        num_leaves: B, number of leaves that each query reads.
        reach: int64 `[G, M]`, number of entities directly before i in its segment. A segment begins where it is 0.
            None, or an index: each row is one segment that begins at position 0.
        counts: int64 `[G]`, number of real queries of each row; the rest, at its end, is padding. None: all are real.
        index: the trees of the rows, updated in place. None for rows without a past, whose queries begin at position
            0.

    Returns:
        (positions int64 `[G, M, K]`, squared distances int32 `[G, M, K]`); −1 and `NO_DISTANCE` if there are fewer
        than K.
    """
    arguments: tuple[Any, ...] = (query, query_index, key, num_neighbors, window, num_leaves, reach, counts)
    if index is not None:
        arguments += (
            index.counters,
            index.leaf_ids,
            index.leaf_boxes,
            index.leaves,
            index.leaf_pages,
            index.cuts,
            index.pages,
        )
    if use_custom_ops():
        return _tree_operator(*arguments)
    return _search_tree(*arguments) if index is not None else _TreeFunction.apply(*arguments)


class _TreeFunction(KernelFunction):
    """`_search_tree` without an index, for the tensors of `torch.func.grad` and `vmap`."""

    @staticmethod
    def forward(*arguments):
        return _search_tree(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)


def _search_tree(
    query: torch.Tensor,
    query_index: torch.Tensor,
    key: torch.Tensor,
    num_neighbors: int,
    window: int,
    num_leaves: int,
    reach: torch.Tensor | None,
    counts: torch.Tensor | None,
    counters: torch.Tensor | None = None,
    leaf_ids: torch.Tensor | None = None,
    leaf_boxes: torch.Tensor | None = None,
    leaves: torch.Tensor | None = None,
    leaf_pages: torch.Tensor | None = None,
    cuts: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`search_tree` with the index as separate tensors, because an operator takes tensors only."""
    if query_index.numel() == 0 or num_neighbors == 0:
        return _empty_results(query, query_index, key, num_neighbors)
    index = None if counters is None else TreeIndex(counters, leaf_ids, leaf_boxes, leaves, leaf_pages, cuts, pages)
    arguments = (query, query_index, key, num_neighbors, window, num_leaves, reach, counts, index)
    backend = search_backend(query, index)
    if backend == "c":
        return search_tree_cpu(tree_library(query), *arguments)
    if backend == "triton":
        from .kernels.triton_launch import search_tree_triton

        return search_tree_triton(*arguments)
    return search_tree_torch(*arguments)


def _empty_results(query, query_index, key, num_neighbors, *others):
    shape = (*query_index.shape, num_neighbors)
    return query_index.new_empty(shape), query.new_empty(shape, dtype=torch.int32)


_tree_operator = custom_op(
    _search_tree,
    _empty_results,
    mutates_args=("counters", "leaf_ids", "leaf_boxes", "leaves", "leaf_pages", "cuts", "pages"),
)


def crop_tree(index: TreeIndex, base: torch.Tensor) -> None:
    """Take the latest entities out of trees that hold more than `base` int64 `[G]` entities (see `tree_base`).

    A tree that cannot be cropped is emptied. The next search builds it again.
    """
    library = None if index.pages is None else tree_library(base)
    if library is not None:
        crop_tree_cpu(library, index, base)
    else:
        index.counters.masked_fill_((index.counters[:, 0] > base)[:, None], 0)


def search_exact(
    query: torch.Tensor,
    query_index: torch.Tensor,
    key: torch.Tensor,
    num_neighbors: int,
    window: int,
    *,
    reach: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the K nearest of all predecessors, in O(N) memory. Arguments and results are those of `search_tree`."""
    arguments = query, query_index, key, num_neighbors, window, reach
    return _exact_operator(*arguments) if use_custom_ops() else _ExactFunction.apply(*arguments)


class _ExactFunction(KernelFunction):
    """`_search_exact` for the tensors of `torch.func.grad` and `vmap`."""

    @staticmethod
    def forward(*arguments):
        return _search_exact(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)


def _search_exact(
    query: torch.Tensor,
    query_index: torch.Tensor,
    key: torch.Tensor,
    num_neighbors: int,
    window: int,
    reach: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`search_exact` without optional arguments."""
    if query_index.numel() == 0 or num_neighbors == 0:
        return _empty_results(query, query_index, key, num_neighbors)
    rows, num_queries, _ = query.shape
    indices, distances = [], []
    step = max(1, EXACT_QUERIES // rows)
    for start in range(0, num_queries, step):
        part = slice(start, min(start + step, num_queries))
        position = query_index[:, part, None]
        ages = query_index.new_full((rows, part.stop - part.start, num_neighbors), -1)
        squared = query.new_full(ages.shape, NO_DISTANCE, dtype=torch.int32)
        # Reading the last visible key is impossible while exporting and would stall a GPU at every decode step.
        last_key = key.shape[1]
        if not torch.compiler.is_exporting() and (num_queries > 1 or query.device.type == "cpu"):
            last_key = min(last_key, int(position.max()) - window + 1)
        for first in range(0, last_key, EXACT_KEYS):
            ids = torch.arange(first, min(first + EXACT_KEYS, last_key), device=query.device)
            visible = ids <= position - window
            if reach is not None:
                visible &= ids >= position - reach[:, part, None]
            block = squared_distances(query[:, part, None], key[:, None, ids])
            squared = torch.cat([squared, block.masked_fill(~visible, NO_DISTANCE)], dim=-1)
            ages = torch.cat([ages, position - ids], dim=-1)
            ages, squared = rank_nearest(squared, ages, squared < NO_DISTANCE, num_neighbors)
        indices.append(torch.where(ages < 0, -1, position - ages))
        distances.append(squared)
    return torch.cat(indices, dim=1), torch.cat(distances, dim=1)


_exact_operator = custom_op(_search_exact, _empty_results)
