"""Triton kernels of the causal cell lists: `neighbor_search.search_cells` for rows without a past.

The entities of each (row, table) are sorted by (cell, time). A query bisects its cell's run for the last entity that
has left its local window; this entity and the w − 1 before it are its candidates. They stay in registers.

Positions are multiples of 2^-6 in a ball, so sums of products are exact in float64 and sums of squared differences are
exact in float32, in any order, fused or not. The lists therefore equal those of the torch form bit for bit.

Shape letters: G rows, M entities, P position_dim, L tables, A axes of a grid, w candidates per table, K neighbours,
Q queries per program. Kernel parameters in capitals are compile-time constants.
"""

from typing import Any, NamedTuple

try:  # transformers requires every package imported outside a `try` on each machine that loads this file
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    raise


class Search(NamedTuple):
    """Inputs of the kernels. The fields from `window` on are compile-time constants.

    Attributes:
        queries, keys: float32 `[G, M, P]`.
        cells: int32 `[G, L, M]`, cells of the queries.
        times: int32 `[G, L, M]`, entities sorted by (cell, time).
        starts: int32 `[G, L, num_cells + 1]`, index in `times` where the run of each cell starts.
        ends: int32 `[G, L, M]`, index in `times` where each query's candidates end; computed by `ends_kernel`.
        reach: int64 `[G, M]`, number of entities directly before a query that may be candidates; None for all.
        counts: int64 `[G]`, number of real queries of each row; None if all are real.
        length, num_cells: M and the largest number of cells of a table.
        window, dims, tables, candidates: W, P, L, w.
        padded_tables, padded_candidates: L and w rounded up to powers of two.
    """

    queries: Any
    keys: Any
    cells: Any
    times: Any
    starts: Any
    ends: Any
    reach: Any
    counts: Any
    length: int
    num_cells: int
    window: Any
    dims: Any
    tables: Any
    padded_tables: Any
    candidates: Any
    padded_candidates: Any


EMPTY_CODE = constexpr(2**63 - 1)


@triton.jit
def cells_kernel(
    positions,
    rotation,
    shift,
    edges,
    counts,
    cells,
    length,
    blocks,
    GRID: tl.constexpr,
    TABLES: tl.constexpr,
    AXES: tl.constexpr,
    DIMS: tl.constexpr,
    DIMS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute `CellGrids.cells`: cells int32 `[G, L, M]` of positions float32 `[G, M, P]`.

    rotation is int32 `[L, A, P]`; shift float64 `[L, A]` and edges float64 `[L]` are in units of rotated positions;
    counts int32 `[L]` are the cells per axis.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    dim = tl.arange(0, DIMS_PADDED)[None, :]
    at = positions + (row * length + place)[:, None] * DIMS + dim
    scaled = tl.load(at, mask=inside[:, None] & (dim < DIMS), other=0.0).to(tl.float64) * GRID
    for table in range(TABLES):
        edge, count = tl.load(edges + table), tl.load(counts + table)
        cell = tl.zeros([BLOCK], tl.int32)
        for axis in tl.static_range(AXES):
            line = table * AXES + axis
            direction = tl.load(rotation + line * DIMS + dim, mask=dim < DIMS, other=0).to(tl.float64)
            along = tl.sum(scaled * direction, axis=1) + tl.load(shift + line)
            coordinate = tl.floor(along / edge) + (count - 1) // 2
            coordinate = tl.minimum(tl.maximum(coordinate, 0.0), (count - 1).to(tl.float64))
            cell = cell * count + coordinate.to(tl.int32)
        tl.store(cells + (row * TABLES + table) * length + place, cell, mask=inside)


@triton.jit
def ends_kernel(search, blocks, BISECTIONS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute `search.ends` by bisection. A line is one table of one row."""
    line = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < search.length
    times = search.times + line * search.length
    bounds = search.starts + line * (search.num_cells + 1)
    bounds += tl.load(search.cells + line * search.length + place, mask=inside, other=0)
    low, high = tl.load(bounds), tl.load(bounds + 1)
    for _ in range(BISECTIONS):
        middle = (low + high) // 2
        time = tl.load(times + middle, mask=low < high, other=search.length)
        has_left = time <= place - search.window
        low, high = tl.where(has_left, middle + 1, low), tl.where(has_left, high, middle)
    tl.store(search.ends + line * search.length + place, low, mask=inside)


@triton.jit
def candidate_codes(search, row, place):
    """Compute the codes of the candidates of queries `place` int32 `[Q]` of a row: int64 `[Q, L, w]`.

    A code holds the bits of the squared distance, which sort like its value, and then the age. Codes sort in the order
    of the ranking and are equal only for the same entity. EMPTY_CODE stands for no candidate.
    """
    real = place < search.length
    if search.counts is not None:
        real &= place < tl.load(search.counts + row)
    table = tl.arange(0, search.padded_tables)[None, :]
    line = row * search.tables + table
    exists = real[:, None] & (table < search.tables)
    cell = tl.load(search.cells + line * search.length + place[:, None], mask=exists, other=0)
    first = tl.load(search.starts + line * (search.num_cells + 1) + cell, mask=exists, other=0)
    end = tl.load(search.ends + line * search.length + place[:, None], mask=exists, other=0)

    step = tl.arange(0, search.padded_candidates)[None, None, :]
    at = end[:, :, None] - 1 - step
    exists = (step < search.candidates) & (at >= first[:, :, None])
    ids = tl.load(search.times + (line * search.length)[:, :, None] + at, mask=exists, other=0)
    age = place[:, None, None] - ids
    if search.reach is not None:
        reach = tl.load(search.reach + row * search.length + place, mask=real, other=0)
        exists &= age <= reach[:, None, None]
    squared = tl.zeros(ids.shape, tl.float32)
    positions = row * search.length * search.dims
    for dim in tl.static_range(search.dims):
        query = tl.load(search.queries + positions + place * search.dims + dim, mask=real, other=0.0)
        difference = query[:, None, None] - tl.load(
            search.keys + positions + ids * search.dims + dim, mask=exists, other=0.0
        )
        squared += difference * difference
    codes = (squared.to(tl.int32, bitcast=True).to(tl.int64) << 32) | age
    return tl.where(exists, codes, EMPTY_CODE)


@triton.jit
def search_kernel(search, indices, distances, blocks, NEIGHBORS: tl.constexpr, BLOCK: tl.constexpr):
    """Find the K nearest: indices int64 and squared distances float32 `[G, M, K]`, −1 and inf if there are fewer."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < search.length
    codes = candidate_codes(search, row, place)
    code = tl.full([BLOCK], -1, tl.int64)
    for k in range(NEIGHBORS):
        # The smallest code above the previous one: an entity proposed by several tables is taken once.
        above = tl.where(codes > code[:, None, None], codes, EMPTY_CODE)
        code = tl.min(tl.min(above, axis=2), axis=1)
        found = code < EMPTY_CODE
        squared = (code >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        at = (row * search.length + place) * NEIGHBORS + k
        tl.store(indices + at, tl.where(found, place - (code & 0xFFFFFFFF), -1), mask=inside)
        tl.store(distances + at, tl.where(found, squared, float("inf")), mask=inside)
