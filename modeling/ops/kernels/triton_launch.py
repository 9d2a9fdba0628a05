"""Launches the Triton kernels of the neighbour search and of flow attention. Importing it requires Triton.

Block sizes are estimates for an H200, not measurements.

Shape letters: B batch, H heads, G = B * H rows, M queries, N stored entities, E query/key features, D value features,
P position_dim, K neighbours.
"""

from dataclasses import dataclass

import torch

try:  # transformers requires every package imported outside a `try` on each machine that loads this file
    import triton
except ImportError:
    raise

from ..box_tree import (
    BLOCK,
    ENTITIES_PER_LEAF,
    LEAF_SIZE,
    RECENT,
    SPARE_LEAVES,
    TreeIndex,
    empty_tree_index,
    tree_base,
)
from ..box_tree_torch import search_segments
from ..neighbor_ranking import NO_DISTANCE
from .box_tree_query_triton import nearest_leaves_kernel, search_kernel
from .box_tree_triton import (
    TreeSearch,
    catch_up_kernel,
    constexpr,
    enter_kernel,
    locate_kernel,
)
from .flow_attention_triton import (
    Attention,
    StridedRows,
    backward_keys_kernel,
    backward_neighbors_kernel,
    backward_queries_kernel,
    forward_kernel,
)

CODES = 1024  # candidate codes that a program of the search holds
LOCATED_LEAVES = 32  # leaves that a program compares with a block at once
ENTITIES = 8  # entities of a block per program of enter_kernel
PROGRAMS = 2048  # programs that fill a GPU
QUERIES = 16  # queries per program of the attention kernels, the minimum of a matrix product
KEYS = 16  # entities per program of backward_keys_kernel
PAIRS = 16  # queries per iteration of backward_neighbors_kernel
TILE = 32  # entities of the local window, or queries of an entity, per iteration


def search_tree_triton(
    query: torch.Tensor,
    query_index: torch.Tensor,
    key: torch.Tensor,
    num_neighbors: int,
    window: int,
    num_leaves: int,
    reach: torch.Tensor | None,
    counts: torch.Tensor | None,
    index: TreeIndex | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`neighbor_search.search_tree` with at least one query and one neighbour; updates a "flat" `index` in place.

    A call with one query per row or without an index and segments never waits for the GPU, so that a CUDA graph can
    hold it.
    """
    if index is None and reach is not None:
        length = query.shape[1]
        counts = query_index.new_full((len(query),), length) if counts is None else counts
        return search_segments(
            _search_rows_triton, query, key[:, :length], num_neighbors, window, num_leaves, reach, counts
        )
    return _search_rows_triton(query, query_index[:, 0], key, num_neighbors, window, num_leaves, counts, index)


def _search_rows_triton(
    query: torch.Tensor,
    past: torch.Tensor,
    key: torch.Tensor,
    num_neighbors: int,
    window: int,
    num_leaves: int,
    counts: torch.Tensor | None,
    index: TreeIndex | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`box_tree_torch._search_rows`. Without an index, the rows start at position 0."""
    rows, length, position_dim = query.shape
    is_new = index is None
    if index is None:
        index = empty_tree_index("flat", rows, tree_base(length - window), position_dim, query.device)
    has_leaves = index.leaf_ids.shape[1] > 0
    rounds, first_width = 0, length
    started = index.counters[:, 0].clone() if has_leaves and length > 1 else None
    if started is not None and is_new:
        rounds, first_width = tree_base(length - window) // BLOCK, min(length, RECENT + BLOCK + window - 1)
    elif started is not None:
        rounds, first_width = _rounds(past, counts, started, length, window)
    call = _TreeCall.prepare(query, past, key, num_neighbors, window, num_leaves, counts, index, started)
    with torch.cuda.device_of(query):
        if has_leaves and length == 1:
            catch_up_kernel[(rows,)](call.search, LOCATED_LEAVES)
            call.enter(0)
        call.answer(0, first_width, in_trees=has_leaves and not is_new)
        for number in range(1, rounds + 1):
            call.enter(number)
            call.answer(number, min(length, BLOCK), in_trees=True)
    return call.indices, call.distances


def _rounds(
    past: torch.Tensor, counts: torch.Tensor | None, started: torch.Tensor, length: int, window: int
) -> tuple[int, int]:
    """Return (blocks that enter the row with the most, most queries of a row that see the trees as they are)."""
    counts = torch.full_like(past, length) if counts is None else counts
    ends = started + (RECENT + BLOCK + window - 1) - past
    width = torch.minimum(ends, counts) - (ends - BLOCK).clamp(min=0) * (started > 0)
    blocks = (tree_base(past + counts - window) - started) // BLOCK * (counts > 0)
    rounds, first_width = torch.stack([blocks, width]).amax(dim=1).tolist()
    return max(rounds, 0), max(first_width, 0)


def _num_parts(programs: int, num_leaves: int, leaf_tile: int) -> int:
    """Return among how many programs to divide the leaves of storage, so that the GPU is full."""
    return max(1, min(PROGRAMS // programs, -(-num_leaves // leaf_tile)))


@dataclass
class _TreeCall:
    """The launches of one `search_tree_triton`.

    Attributes:
        search: the inputs of the kernels.
        indices, distances: the results.
        query_tile, leaf_tile: queries per program, and leaves per iteration.
    """

    search: TreeSearch
    indices: torch.Tensor
    distances: torch.Tensor
    query_tile: int
    leaf_tile: int

    @classmethod
    def prepare(cls, query, past, key, num_neighbors, window, num_leaves, counts, index, started):
        """Allocate the results and the working memory; the arguments are those of `_search_rows_triton`."""
        rows, length, dims = query.shape
        assert all(x.is_contiguous() for x in (index.counters, index.leaf_ids, index.leaf_boxes))
        stored_leaves = index.leaf_ids.shape[1]
        num_leaves = min(num_leaves, max(stored_leaves, 1))
        padded_leaves = triton.next_power_of_2(num_leaves)
        query_tile = min(16, triton.next_power_of_2(length), max(1, CODES // (LEAF_SIZE * padded_leaves)))
        leaf_tile = max(1, CODES // query_tile)
        width = -(-min(length, BLOCK) // query_tile) * query_tile
        parts = _num_parts(rows * width // query_tile, stored_leaves, leaf_tile)

        def memory(*shape, dtype=torch.int32):
            return torch.empty(rows, *shape, dtype=dtype, device=query.device) if stored_leaves else None

        search = TreeSearch(
            queries=query.contiguous(),
            keys=key.contiguous(),
            past=past.contiguous(),
            counts=None if counts is None else counts.contiguous(),
            counters=index.counters,
            leaf_ids=index.leaf_ids,
            leaf_boxes=index.leaf_boxes,
            started=started,
            located=memory(BLOCK),
            created=memory(BLOCK + 2),
            near_codes=memory(width, parts, num_leaves, dtype=torch.int64),
            near_leaves=memory(width, parts, num_leaves),
            length=length,
            stored=key.shape[1],
            num_leaves=stored_leaves,
            width=width,
            parts=parts,
            dims=constexpr(dims),
            window=constexpr(window),
            neighbors=constexpr(num_neighbors),
            leaves_read=constexpr(num_leaves),
            padded_dims=constexpr(triton.next_power_of_2(dims)),
            padded_neighbors=constexpr(triton.next_power_of_2(num_neighbors)),
            padded_leaves=constexpr(padded_leaves),
            leaf_size=constexpr(LEAF_SIZE),
            block=constexpr(BLOCK),
            recent=constexpr(RECENT),
            entities_per_leaf=constexpr(ENTITIES_PER_LEAF),
            spare_leaves=constexpr(SPARE_LEAVES),
            lanes=constexpr(triton.next_power_of_2(LEAF_SIZE + BLOCK)),
        )
        indices = past.new_full((rows, length, num_neighbors), -1)
        distances = torch.full_like(indices, NO_DISTANCE, dtype=torch.int32)
        return cls(search, indices, distances, query_tile, leaf_tile)

    def enter(self, number: int) -> None:
        """Enter one block in each row that needs one more in this round."""
        rows, groups = len(self.indices), -(-BLOCK // ENTITIES)
        parts = _num_parts(rows, self.search.num_leaves, LOCATED_LEAVES)
        locate_kernel[(rows * parts,)](self.search, number, parts, LOCATED_LEAVES)
        for write in (False, True):
            enter_kernel[(rows * groups,)](self.search, number, groups, write, ENTITIES)

    def answer(self, number: int, width: int, in_trees: bool) -> None:
        """Search for at most `width` queries per row, those that see the present trees."""
        if width == 0:
            return
        rows, tiles = len(self.indices), -(-width // self.query_tile)
        if in_trees:
            near_tiles = min(tiles, self.search.width // self.query_tile)
            nearest_leaves_kernel[(rows * near_tiles * self.search.parts,)](
                self.search, number, near_tiles, self.query_tile, self.leaf_tile
            )
        search_kernel[(rows * tiles,)](
            self.search, self.indices, self.distances, number, tiles, self.query_tile, self.leaf_tile
        )


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
