"""Triton kernels of the box tree that answer queries; `box_tree_triton` describes the calls.

A code holds a squared distance and, in its low half, what decides between equal distances: the age of a candidate, or
the age of a leaf's newest member. All codes of a query differ.

Shape letters: G rows, M queries of this call, K neighbours, B leaves read; Q queries of a program, T codes of a tile,
C parts of the leaves, S slots. Kernel parameters in capitals are compile-time constants.
"""

try:  # transformers requires every package imported outside a `try` on each machine that loads this file
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    raise

from .box_tree_triton import answered_queries, leaf_start

NOTHING = constexpr(2**63 - 1)  # sorts after every code
NO_CANDIDATE = constexpr((2**31 - 1) << 32)  # codes of candidates are smaller
NEWEST = constexpr(2**31 - 1)


@triton.jit
def empty_slots(QUERIES: tl.constexpr, USED: tl.constexpr, SLOTS: tl.constexpr):
    """Return codes `[QUERIES, SLOTS]` without candidates for `keep_nearest`, which leaves slots from USED on alone."""
    slot = tl.arange(0, SLOTS)[None, :].to(tl.int64)
    codes = tl.where(slot < USED, -slot + (NOTHING - 1), -1)  # distinct
    return tl.zeros([QUERIES, SLOTS], tl.int64) + codes, tl.full([QUERIES, SLOTS], -1, tl.int32)


@triton.jit
def keep_nearest(best, best_ids, codes, ids):
    """Return the smallest codes of `best` `[Q, S]` and `codes` `[Q, T]`, and their ids, in any order."""
    largest, smallest = tl.max(best, axis=1), tl.min(codes, axis=1)
    while tl.max((smallest < largest).to(tl.int32), axis=0) > 0:
        chosen = codes == smallest[:, None]
        chosen_ids = tl.max(tl.where(chosen, ids, -1), axis=1)
        replaced = (best == largest[:, None]) & (smallest < largest)[:, None]
        best = tl.where(replaced, smallest[:, None], best)
        best_ids = tl.where(replaced, chosen_ids[:, None], best_ids)
        codes = tl.where(chosen, NOTHING, codes)
        largest, smallest = tl.max(best, axis=1), tl.min(codes, axis=1)
    return best, best_ids


@triton.jit
def box_distances(call, row, place, real, leaf, exists):
    """Squared distances int32 `[Q, T]` of queries `[Q]` to the boxes of leaves `[T]`."""
    query = call.queries + (row * call.length + place) * call.dims
    low = call.leaf_boxes + leaf_start(call, row, leaf) * 4 * call.dims
    squared = tl.zeros([place.shape[0], leaf.shape[0]], tl.int32)
    for dim in tl.static_range(call.dims):
        x = tl.load(query + dim, mask=real, other=0).to(tl.int32)[:, None]
        lowest = tl.load(low + dim, mask=exists, other=0).to(tl.int32)[None, :]
        highest = tl.load(low + call.dims + dim, mask=exists, other=0).to(tl.int32)[None, :]
        outside = tl.maximum(tl.maximum(lowest - x, x - highest), 0)
        squared += outside * outside
    return squared


@triton.jit(do_not_specialize=["round"])
def nearest_leaves_kernel(call, round, tiles, QUERIES: tl.constexpr, LEAVES: tl.constexpr):
    """Compute `call.near_codes` and `call.near_leaves` for a tile of queries and a part of the leaves per program."""
    row = (tl.program_id(0) // (tiles * call.parts)).to(tl.int64)
    tile, part = tl.program_id(0) // call.parts % tiles, tl.program_id(0) % call.parts
    entered, first, end = answered_queries(call, row, round)
    if (entered == 0) | (first + tile * QUERIES >= end):
        return
    offset = tile * QUERIES + tl.arange(0, QUERIES)
    place = first + offset
    real = place < end
    count = tl.load(call.counters + row * 4 + 1)
    best, best_leaves = empty_slots(QUERIES, call.leaves_read, call.padded_leaves)
    for first_leaf in range(part * LEAVES, count, call.parts * LEAVES):
        leaf = first_leaf + tl.arange(0, LEAVES)
        squared = box_distances(call, row, place, real, leaf, leaf < count)
        near = squared <= (tl.max(best, axis=1) >> 32)[:, None]
        near &= real[:, None] & (leaf < count)[None, :]
        near_any = tl.max(near.to(tl.int32), axis=0) > 0
        if tl.max(near_any.to(tl.int32), axis=0) > 0:
            members = leaf_start(call, row, leaf)[:, None] * call.leaf_size + tl.arange(0, call.leaf_size)[None, :]
            newest = tl.max(tl.load(call.leaf_ids + members, mask=near_any[:, None], other=0), axis=1) - 1
            codes = (squared.to(tl.int64) << 32) | (-newest + NEWEST)[None, :]
            best, best_leaves = keep_nearest(best, best_leaves, tl.where(near, codes, NOTHING), leaf[None, :])
    slot = tl.arange(0, call.padded_leaves)[None, :]
    at = ((row * call.width + offset[:, None]) * call.parts + part) * call.leaves_read + slot
    mask = real[:, None] & (slot < call.leaves_read)
    tl.store(call.near_codes + at, tl.where(best < NO_CANDIDATE, best, NOTHING), mask=mask)
    tl.store(call.near_leaves + at, best_leaves, mask=mask)


@triton.jit
def candidate_codes(call, row, place, real, ids, exists):
    """Codes int64 `[Q, T]` of candidates: squared distance and age. `ids` and `exists` are `[Q or 1, T]`."""
    query = call.queries + (row * call.length + place) * call.dims
    key = call.keys + (row * call.stored + ids) * call.dims
    squared = tl.zeros([place.shape[0], ids.shape[1]], tl.int32)
    for dim in tl.static_range(call.dims):
        x = tl.load(query + dim, mask=real, other=0).to(tl.int32)[:, None]
        difference = x - tl.load(key + dim, mask=exists, other=0).to(tl.int32)
        squared += difference * difference
    age = (tl.load(call.past + row).to(tl.int32) + place)[:, None] - ids
    return (squared.to(tl.int64) << 32) | age


@triton.jit
def members_of_nearest_leaves(call, row, offset, real, CODES: tl.constexpr):
    """Merge the parts of `call.near_codes`; returns members `[Q, padded_leaves * leaf_size]`, −1 for none."""
    best, leaves = empty_slots(offset.shape[0], call.leaves_read, call.padded_leaves)
    num_codes = call.parts * call.leaves_read
    for first in range(0, num_codes, CODES):
        number = first + tl.arange(0, CODES)[None, :]
        at = (row * call.width + offset[:, None]) * num_codes + number
        mask = real[:, None] & (number < num_codes)
        codes = tl.load(call.near_codes + at, mask=mask, other=NOTHING)
        best, leaves = keep_nearest(best, leaves, codes, tl.load(call.near_leaves + at, mask=mask, other=-1))
    slot = tl.arange(0, call.leaf_size)[None, None, :]
    members = call.leaf_ids + leaf_start(call, row, leaves)[:, :, None] * call.leaf_size + slot
    ids = tl.load(members, mask=(leaves >= 0)[:, :, None] & (slot >= 0), other=0) - 1
    return tl.reshape(ids, [offset.shape[0], call.padded_leaves * call.leaf_size])


@triton.jit(do_not_specialize=["round"])
def search_kernel(call, indices, distances, round, tiles, QUERIES: tl.constexpr, CODES: tl.constexpr):
    """Find the K nearest: indices int64 and squared distances int32 `[G, M, K]`, a tile of queries per program."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    entered, first, end = answered_queries(call, row, round)
    offset = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)
    place = first + offset
    real = place < end
    if tl.max(real.to(tl.int32), axis=0) == 0:
        return
    best, best_ids = empty_slots(QUERIES, call.neighbors, call.padded_neighbors)
    if call.near_codes is not None:
        if entered > 0:
            ids = members_of_nearest_leaves(call, row, offset, real, CODES)
            codes = candidate_codes(call, row, place, real, ids, ids >= 0)
            best, best_ids = keep_nearest(best, best_ids, tl.where(ids >= 0, codes, NOTHING), ids)
    seen = tl.load(call.past + row).to(tl.int32) + place - call.window + 1
    for first_recent in range(entered, tl.max(tl.where(real, seen, 0), axis=0), CODES):
        ids = (first_recent + tl.arange(0, CODES))[None, :]
        visible = (ids < seen[:, None]) & real[:, None]
        codes = candidate_codes(call, row, place, real, ids, ids < call.stored)
        best, best_ids = keep_nearest(best, best_ids, tl.where(visible, codes, NOTHING), ids)

    code = tl.full([QUERIES], -1, tl.int64)
    for k in range(call.neighbors):
        code = tl.min(tl.where(best > code[:, None], best, NOTHING), axis=1)
        neighbor = tl.max(tl.where(best == code[:, None], best_ids, -1), axis=1)
        at = (row * call.length + place) * call.neighbors + k
        tl.store(indices + at, neighbor.to(tl.int64), mask=real)
        tl.store(distances + at, (code >> 32).to(tl.int32), mask=real)
