"""Triton kernels of the box tree: `neighbor_search.search_tree` on a GPU, with an index in the "flat" layout.

A call alternates between two phases, in rounds:

- A block of entities enters the tree of each row that needs it. `locate_kernel` finds the leaf of each entity. Then
  `enter_kernel` runs twice, with a group of the block's entities per program: the first run counts the leaves that the
  cuts create, which gives each program the numbers of its new leaves; the second run writes the leaves.
- The queries that see the present trees are answered. `nearest_leaves_kernel` compares a tile of queries with a part
  of the leaves, and `search_kernel` merges the parts and ranks the members of the nearest leaves and the recents.

A decode step has one query per row and no rounds: `catch_up_kernel` enters all blocks but the last that a row needs,
one row per program. Usually there are none, and every 128 steps one block enters. The kernels read on the device which
rows need a block, so that a CUDA graph can hold a step.

Coordinates are int16, squared distances int32 and codes, by which candidates are ranked, int64. This file holds the
kernels of the first phase, `box_tree_query_triton` those of the second.

Shape letters: G rows, M queries of this call, N stored entities, P position_dim, L leaves of storage, K neighbours,
B leaves read, C parts of the leaves. Kernel parameters in capitals are compile-time constants.
"""

from typing import Any, NamedTuple

try:  # transformers requires every package imported outside a `try` on each machine that loads this file
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    raise

BEYOND = constexpr(2**16)  # larger than every coordinate
LOWEST_COORDINATE = constexpr(-(2**15))  # of the cell that contains all of space
HIGHEST_COORDINATE = constexpr(2**15 - 1)


class TreeSearch(NamedTuple):
    """Inputs and working memory of the kernels. The fields from `dims` on are compile-time constants.

    Attributes:
        queries: int16 `[G, M, P]`.
        keys: int16 `[G, N, P]`.
        past: int64 `[G]`, position of the first query.
        counts: int64 `[G]`, number of real queries of each row; None if all are real.
        counters, leaf_ids, leaf_boxes: see `box_tree.TreeIndex`.
        started: int32 `[G]`, entities in the trees before the call; None for a decode step.
        located: int32 `[G, BLOCK]`, leaf of each entity of the block that enters.
        created: int32 `[G, BLOCK + 2]`, new leaves by the first entity of the leaf that is cut, then the numbers of
            entities and of leaves before the block.
        near_codes, near_leaves: int64 and int32 `[G, width, C, B]`, nearest leaves of each part.
        length, stored, num_leaves: M, N, L.
        width, parts: number of queries with room in `near_codes`, and C.
        dims, window, neighbors, leaves_read: P, W, K, B.
        padded_dims, padded_neighbors, padded_leaves: P, K, B rounded up to powers of two.
        leaf_size, block, recent, entities_per_leaf, spare_leaves: constants of `box_tree`.
        lanes: `leaf_size + block` rounded up to a power of two.
    """

    queries: Any
    keys: Any
    past: Any
    counts: Any
    counters: Any
    leaf_ids: Any
    leaf_boxes: Any
    started: Any
    located: Any
    created: Any
    near_codes: Any
    near_leaves: Any
    length: int
    stored: int
    num_leaves: int
    width: int
    parts: int
    dims: Any
    window: Any
    neighbors: Any
    leaves_read: Any
    padded_dims: Any
    padded_neighbors: Any
    padded_leaves: Any
    leaf_size: Any
    block: Any
    recent: Any
    entities_per_leaf: Any
    spare_leaves: Any
    lanes: Any


@triton.jit
def real_queries(call, row):
    """Load (position of the row's first query, number of its real queries)."""
    count = call.length
    if call.counts is not None:
        count = tl.load(call.counts + row).to(tl.int32)
    return tl.load(call.past + row).to(tl.int32), count


@triton.jit
def needed_entities(call, row, round):
    """Compute how many entities of a row its tree must hold after a round, or in a decode step."""
    past, count = real_queries(call, row)
    seen = past + count - call.window
    needed = tl.where(count > 0, tl.maximum(seen - call.recent, 0) // call.block * call.block, 0)
    if call.started is not None:
        needed = tl.minimum(needed, tl.load(call.started + row) + round * call.block)
    return needed


@triton.jit
def answered_queries(call, row, round):
    """Compute (entities in the tree, first, end): queries first ≤ a < end of a row see its present tree.

    `end` is 0 for rows whose tree did not change in this round.
    """
    past, count = real_queries(call, row)
    entered = tl.load(call.counters + row * 4)
    first = entered + call.recent + call.window - 1 - past
    end = tl.minimum(first + call.block, count)
    if call.started is not None:
        end = tl.where(entered == tl.load(call.started + row) + round * call.block, end, 0)
    return entered, tl.where(entered > 0, tl.maximum(first, 0), 0), end


@triton.jit
def leaf_start(call, row, leaf):
    """Index of a leaf among the leaves of all rows."""
    return row * call.num_leaves + leaf


@triton.jit
def start_tree(call, row):
    """Give a tree its first leaf, without members."""
    slot, dim = tl.arange(0, call.leaf_size), tl.arange(0, call.padded_dims)
    tl.store(call.leaf_ids + leaf_start(call, row, 0) * call.leaf_size + slot, tl.zeros([call.leaf_size], tl.int32))
    cell = call.leaf_boxes + (leaf_start(call, row, 0) * 4 + 2) * call.dims + dim
    tl.store(cell, tl.full([call.padded_dims], LOWEST_COORDINATE, tl.int16), mask=dim < call.dims)
    tl.store(cell + call.dims, tl.full([call.padded_dims], HIGHEST_COORDINATE, tl.int16), mask=dim < call.dims)
    tl.debug_barrier()  # all threads have read the number of leaves
    tl.store(call.counters + row * 4 + 1, 1)


@triton.jit
def containing_leaves(call, row, entered, count, first, LEAVES: tl.constexpr):
    """Find the entities of the next block in the cells of leaves first ≤ n < first + LEAVES.

    Returns int32 `[BLOCK]`, the leaf of each entity; −1 if it lies in none of these cells.
    """
    leaf = first + tl.arange(0, LEAVES)[:, None]
    entity = entered + tl.arange(0, call.block)[None, :]
    exists = leaf < count
    position = call.keys + (row * call.stored + entity) * call.dims
    low = call.leaf_boxes + (leaf_start(call, row, leaf) * 4 + 2) * call.dims
    contains = exists & (entity >= 0)
    for dim in tl.static_range(call.dims):
        x = tl.load(position + dim)
        contains &= x >= tl.load(low + dim, mask=exists, other=0)
        contains &= x <= tl.load(low + call.dims + dim, mask=exists, other=0)
    return tl.max(tl.where(contains, leaf, -1), axis=0)


@triton.jit
def cut_cell(call, row, lower, upper, axis, threshold):
    """Divide the cell of leaf `lower` between `lower` and the new leaf `upper`."""
    dim = tl.arange(0, call.padded_dims)
    low = call.leaf_boxes + (leaf_start(call, row, lower) * 4 + 2) * call.dims + dim
    new_low = call.leaf_boxes + (leaf_start(call, row, upper) * 4 + 2) * call.dims + dim
    tl.debug_barrier()  # the cell may come from an earlier cut, written by other threads
    cell_low = tl.load(low, mask=dim < call.dims, other=0)
    cell_high = tl.load(low + call.dims, mask=dim < call.dims, other=0)
    tl.debug_barrier()  # all threads have read the cell
    tl.store(new_low, tl.where(dim == axis, threshold + 1, cell_low).to(tl.int16), mask=dim < call.dims)
    tl.store(new_low + call.dims, cell_high, mask=dim < call.dims)
    tl.store(low + call.dims, tl.where(dim == axis, threshold, cell_high).to(tl.int16), mask=dim < call.dims)


@triton.jit
def bounding_box(is_member, positions):
    """Lowest and highest coordinates `[padded_dims]` of the members among positions `[lanes, padded_dims]`."""
    low = tl.min(tl.where(is_member[:, None], positions, BEYOND), axis=0)
    return low, tl.max(tl.where(is_member[:, None], positions, -BEYOND), axis=0)


@triton.jit
def write_leaf(call, row, leaf, is_member, ids, positions):
    """Write the latest members of a leaf and their box; `ids` `[lanes]` ascend among the members."""
    lane, dim = tl.arange(0, call.lanes), tl.arange(0, call.padded_dims)
    rank = tl.cumsum(is_member.to(tl.int32), axis=0)
    size = tl.sum(is_member.to(tl.int32), axis=0)
    slot = rank - 1 - tl.maximum(size - call.leaf_size, 0)
    stays = is_member & (slot >= 0)
    members = call.leaf_ids + leaf_start(call, row, leaf) * call.leaf_size
    tl.store(members + slot, ids + 1, mask=stays)
    tl.store(members + lane, tl.zeros([call.lanes], tl.int32), mask=(lane >= size) & (lane < call.leaf_size))
    low, high = bounding_box(stays, positions)
    box = call.leaf_boxes + leaf_start(call, row, leaf) * 4 * call.dims + dim
    tl.store(box, low.to(tl.int16), mask=dim < call.dims)
    tl.store(box + call.dims, high.to(tl.int16), mask=dim < call.dims)


@triton.jit
def enter_leaf(call, row, leaf, entered, may_cut, next_leaf, WRITE: tl.constexpr):
    """Add entities of the next block to the leaf that `located` gives them, and cut it until all parts are small.

    A lane is a held member or an entity of the block. Part 0 keeps the number of the leaf, the other parts become the
    leaves from `next_leaf` on. Nothing is written without WRITE.

    Returns:
        Number of new leaves.
    """
    lane, dim = tl.arange(0, call.lanes), tl.arange(0, call.padded_dims)
    is_held, entity = lane < call.leaf_size, lane - call.leaf_size
    is_new = (entity >= 0) & (entity < call.block)
    members = call.leaf_ids + leaf_start(call, row, leaf) * call.leaf_size
    held = tl.load(members + lane, mask=is_held, other=0) - 1
    located = tl.load(call.located + row * call.block + entity, mask=is_new, other=-1)
    ids = tl.where(is_held, held, entered + entity)
    part = tl.where((is_held & (held >= 0)) | (located == leaf), 0, -1)
    at = call.keys + (row * call.stored + ids)[:, None] * call.dims + dim[None, :]
    positions = tl.load(at, mask=(part >= 0)[:, None] & (dim < call.dims)[None, :], other=0).to(tl.int32)

    parts, current = 1, 0
    while current < parts:
        is_member = part == current
        number = tl.where(current == 0, leaf, next_leaf + current - 1)
        low, high = bounding_box(is_member, positions)
        sides = tl.where(dim < call.dims, high - low, -1)
        side = tl.max(sides, axis=0)
        is_large = tl.sum(is_member.to(tl.int32), axis=0) > call.leaf_size
        if is_large & may_cut & (side > 0):
            axis = tl.min(tl.where(sides == side, dim, call.dims), axis=0)
            threshold = tl.sum(tl.where(dim == axis, low, 0), axis=0) + (side - 1) // 2
            along = tl.sum(tl.where((dim == axis)[None, :], positions, 0), axis=1)
            part = tl.where(is_member & (along > threshold), parts, part)
            if WRITE:
                cut_cell(call, row, number, next_leaf + parts - 1, axis, threshold)
            parts += 1
        else:
            if WRITE:
                write_leaf(call, row, number, is_member, ids, positions)
            current += 1
    return parts - 1


@triton.jit
def first_in_leaf(call, row, entity):
    """Return (leaf of an entity of the block, whether no earlier entity of the block lies in it)."""
    leaf = tl.load(call.located + row * call.block + entity)
    others = tl.arange(0, call.block)
    located = tl.load(call.located + row * call.block + others)
    return leaf, tl.min(tl.where(located == leaf, others, call.block), axis=0) == entity


@triton.jit
def within_budget(call, entered, count):
    """Return whether a tree with `count` leaves may cut leaves (`box_tree.leaf_budget`)."""
    return count <= entered // call.entities_per_leaf + call.spare_leaves


@triton.jit
def catch_up_kernel(call, LEAVES: tl.constexpr):
    """Enter all blocks but the last that a row needs; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    last = needed_entities(call, row, 0) - call.block
    entered, count = tl.load(call.counters + row * 4), tl.load(call.counters + row * 4 + 1)
    if (count == 0) & (entered < last):
        start_tree(call, row)
        count += 1
    while entered < last:
        located = tl.full([call.block], -1, tl.int32)
        for first in range(0, count, LEAVES):
            located = tl.maximum(located, containing_leaves(call, row, entered, count, first, LEAVES))
        tl.store(call.located + row * call.block + tl.arange(0, call.block), located)
        tl.debug_barrier()
        may_cut = within_budget(call, entered, count)
        for entity in range(call.block):
            leaf, is_first = first_in_leaf(call, row, entity)
            if is_first:
                count += enter_leaf(call, row, leaf, entered, may_cut, count, True)
        entered += call.block
        tl.debug_barrier()
    tl.store(call.counters + row * 4, entered)
    tl.store(call.counters + row * 4 + 1, count)


@triton.jit(do_not_specialize=["round"])
def locate_kernel(call, round, parts, LEAVES: tl.constexpr):
    """Compute `call.located`; each program compares the block with a part of a row's leaves."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    entered, count = tl.load(call.counters + row * 4), tl.load(call.counters + row * 4 + 1)
    if entered >= needed_entities(call, row, round):
        return
    if (count == 0) & (part == 0):  # the other programs of the row have no leaves, whether they read 0 or 1
        start_tree(call, row)
        count += 1
    entity = tl.arange(0, call.block)
    for first in range(part * LEAVES, count, parts * LEAVES):
        located = containing_leaves(call, row, entered, count, first, LEAVES)
        tl.store(call.located + row * call.block + entity, located, mask=located >= 0)


@triton.jit(do_not_specialize=["round"])
def enter_kernel(call, round, groups, WRITE: tl.constexpr, ENTITIES: tl.constexpr):
    """Enter the block in each row that needs it. A program enters the leaves of ENTITIES entities of the block.

    The first run (WRITE is False) computes `call.created`, the second one writes leaves and counters.
    """
    row = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    created = call.created + row * (call.block + 2)
    entity = tl.arange(0, call.block)
    if WRITE:
        entered, count = tl.load(created + call.block), tl.load(created + call.block + 1)
    else:
        entered, count = tl.load(call.counters + row * 4), tl.load(call.counters + row * 4 + 1)
        if group == 0:
            tl.store(created + call.block, entered)
            tl.store(created + call.block + 1, count)
    if entered >= needed_entities(call, row, round):
        return
    may_cut = within_budget(call, entered, count)
    if WRITE:
        new_leaves = tl.load(created + entity)
        if group == 0:
            tl.store(call.counters + row * 4, entered + call.block)
            tl.store(call.counters + row * 4 + 1, count + tl.sum(new_leaves, axis=0))
    for number in range(group * ENTITIES, tl.minimum((group + 1) * ENTITIES, call.block)):
        leaf, is_first = first_in_leaf(call, row, number)
        if WRITE:
            if is_first:
                before = tl.sum(tl.where(entity < number, new_leaves, 0), axis=0)
                enter_leaf(call, row, leaf, entered, may_cut, count + before, True)
        else:
            parts = 0
            if is_first:
                parts = enter_leaf(call, row, leaf, entered, may_cut, count, False)
            tl.store(created + number, parts)
