"""Causal cell lists as Triton kernels: what `neighbor_search.search_cells` finds in rows that have no past.

The entities of each (row, table) have been sorted by (cell, time). A query bisects its cell's run for the last entity
that has left its local window; that one and the w − 1 before it are its candidates. They stay in registers.

Positions are multiples of 2^-6 within the ball: sums of their products are exact in float64 and sums of their squared
differences in float32, in any order, fused or not. The lists are therefore those of torch, bit for bit.

Shape letters: G rows, M entities, P position_dim, L tables, A axes of a grid, w candidates per table, K neighbours,
Q queries of one program. Capitals of a kernel are constants that it is compiled for.
"""

from typing import Any, NamedTuple

try:  # what is imported outside a `try` transformers demands of every machine that loads this file
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    raise


class Search(NamedTuple):
    """What a search reads. The fields from `window` on are constants of the kernels; `padded` are powers of two.

    Attributes:
        queries, keys: float32 `[G, M, P]`.
        cells: int32 `[G, L, M]`, those of the queries.
        times: int32 `[G, L, M]`, entities by (cell, time).
        starts: int32 `[G, L, num_cells + 1]`, where in times the run of each cell starts.
        ends: int32 `[G, L, M]`, where the part of its cell's run that a query may read ends; by `ends_kernel`.
        reach: int64 `[G, M]`, how many of the entities just before it a query may see; or None.
        counts: int64 `[G]`, how many queries of the row are real; or None.
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
    """`CellGrids.cells`: positions float32 `[G, M, P]` → cells int32 `[G, L, M]`.

    rotation int32 `[L, A, P]`; shift float64 `[L, A]` and edges float64 `[L]` in its units; counts int32 `[L]`, cells
    per axis.
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
            turned = tl.load(rotation + line * DIMS + dim, mask=dim < DIMS, other=0).to(tl.float64)
            along = tl.sum(scaled * turned, axis=1) + tl.load(shift + line)
            coordinate = tl.floor(along / edge) + (count - 1) // 2
            coordinate = tl.minimum(tl.maximum(coordinate, 0.0), (count - 1).to(tl.float64))
            cell = cell * count + coordinate.to(tl.int32)
        tl.store(cells + (row * TABLES + table) * length + place, cell, mask=inside)


@triton.jit
def ends_kernel(search, blocks, BISECTIONS: tl.constexpr, BLOCK: tl.constexpr):
    """`search.ends`: how far entities of the query's cell have left its local window. One line is a row's table."""
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
    """Codes of the candidates of the queries at `place` int32 `[Q]` of a row: int64 `[Q, L, w]`, EMPTY_CODE for none.

    A code is the squared distance's bits, which sort as it does, before the age: codes are ranks, and are equal only
    for the same entity.
    """
    real = place < search.length
    if search.counts is not None:
        real &= place < tl.load(search.counts + row)
    table = tl.arange(0, search.padded_tables)[None, :]
    line = row * search.tables + table
    held = real[:, None] & (table < search.tables)
    cell = tl.load(search.cells + line * search.length + place[:, None], mask=held, other=0)
    first = tl.load(search.starts + line * (search.num_cells + 1) + cell, mask=held, other=0)
    end = tl.load(search.ends + line * search.length + place[:, None], mask=held, other=0)

    step = tl.arange(0, search.padded_candidates)[None, None, :]
    at = end[:, :, None] - 1 - step
    held = (step < search.candidates) & (at >= first[:, :, None])
    ids = tl.load(search.times + (line * search.length)[:, :, None] + at, mask=held, other=0)
    age = place[:, None, None] - ids
    if search.reach is not None:
        reach = tl.load(search.reach + row * search.length + place, mask=real, other=0)
        held &= age <= reach[:, None, None]
    squared = tl.zeros(ids.shape, tl.float32)
    positions = row * search.length * search.dims
    for dim in tl.static_range(search.dims):
        query = tl.load(search.queries + positions + place * search.dims + dim, mask=real, other=0.0)
        apart = query[:, None, None] - tl.load(search.keys + positions + ids * search.dims + dim, mask=held, other=0.0)
        squared += apart * apart
    codes = (squared.to(tl.int32, bitcast=True).to(tl.int64) << 32) | age
    return tl.where(held, codes, EMPTY_CODE)


@triton.jit
def search_kernel(search, indices, distances, blocks, NEIGHBORS: tl.constexpr, BLOCK: tl.constexpr):
    """The K nearest: indices int64 and squared distances float32 `[G, M, K]`, −1 and inf where there are fewer."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < search.length
    codes = candidate_codes(search, row, place)
    code = tl.full([BLOCK], -1, tl.int64)
    for k in range(NEIGHBORS):
        # The least above the last one: an entity that several tables propose comes once.
        above = tl.where(codes > code[:, None, None], codes, EMPTY_CODE)
        code = tl.min(tl.min(above, axis=2), axis=1)
        found = code < EMPTY_CODE
        squared = (code >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        at = (row * search.length + place) * NEIGHBORS + k
        tl.store(indices + at, tl.where(found, place - (code & 0xFFFFFFFF), -1), mask=inside)
        tl.store(distances + at, tl.where(found, squared, float("inf")), mask=inside)
