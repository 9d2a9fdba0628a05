"""The causal neighbour search against loops: exact search, cell lists and chains."""

import random

import pytest
import torch

from dfn_hf import DFNConfig, DFNForCausalLM
from dfn_hf.modeling.modules.cache import CACHE_NAME
from dfn_hf.modeling.ops import neighbor_search
from dfn_hf.modeling.ops.cell_grid import GRID, ball_cells_per_axis, check_cell_sizes, geometric_cell_sizes
from dfn_hf.modeling.ops.cell_lists import CellChains, CellGrids, grid_constants, start_chains
from dfn_hf.modeling.ops.kernels import neighbor_search_cpu
from dfn_hf.modeling.ops.kernels.neighbor_search_cpu import search_library
from dfn_hf.modeling.ops.neighbor_search import (
    nearest_predecessors,
    nearest_predecessors_reference,
    rank_nearest,
    search_cells,
    search_exact,
)

METHODS = ("exact", "cells")


def draw_positions(shape, seed, dtype=torch.float32, kind="spread"):
    """Draw queries and keys `[batch, heads, length, position_dim]` on the grid, so that distances often tie."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    if kind == "same":
        queries, keys = torch.full(shape, 0.5, dtype=dtype), torch.full(shape, 0.25, dtype=dtype)
    elif kind == "few":  # the corners of a cube: duplicates
        queries, keys = queries.sign(), keys.sign()
    return (queries * GRID).round() / GRID, (keys * GRID).round() / GRID


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


# Exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["spread", "same", "few"])
@pytest.mark.parametrize(
    ("shape", "num_neighbors", "window"),
    [
        ((2, 3, 31, 4), 5, 0),
        ((1, 2, 17, 1), 40, 3),
        ((1, 1, 1, 2), 2, 0),
        ((1, 1, 1, 2), 2, 1),
        ((2, 1, 13, 3), 1, 20),
    ],
)
def test_exact_equals_the_loop(dtype, kind, shape, num_neighbors, window):
    queries, keys = draw_positions(shape, 0, dtype, kind)
    found = nearest_predecessors(queries, keys, num_neighbors, window=window, method="exact")
    assert_same(found, nearest_predecessors_reference(queries, keys, num_neighbors, window=window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_equals_the_loop_off_the_grid(dtype):
    queries, keys = torch.randn(2, 2, 2, 40, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found = nearest_predecessors(queries, keys, 7, window=2, method="exact")
    assert_same(found, nearest_predecessors_reference(queries, keys, 7, window=2))


def test_exact_equals_the_loop_over_many_blocks(monkeypatch):
    monkeypatch.setattr(neighbor_search, "QUERY_CHUNK", 12)
    monkeypatch.setattr(neighbor_search, "KEY_CHUNK", 5)
    queries, keys = draw_positions((2, 2, 37, 2), 3, kind="few")
    found = nearest_predecessors(queries, keys, 6, window=4, method="exact")
    assert_same(found, nearest_predecessors_reference(queries, keys, 6, window=4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("window", [0, 3])
def test_segments_interleaved_and_padded(method, window):
    queries, keys = draw_positions((2, 2, 40, 2), 4)
    # Ids with equal low 32 bits must stay different as sort keys.
    ids = torch.tensor([-7, -1, 0, 5, 2**40, 2**40 + 2**33])
    segments = ids[torch.randint(len(ids), (2, 40), generator=torch.Generator().manual_seed(5))]
    # One cell holds every entity, and all of them are candidates.
    everything = {"num_tables": 1, "cell_sizes": [1000.0], "candidates_per_table": 40}
    found = nearest_predecessors(
        queries, keys, 6, window=window, method=method, segment_ids=segments, **everything, seed=seed_without_cuts(2)
    )
    assert_same(found, nearest_predecessors_reference(queries, keys, 6, window=window, segment_ids=segments))


def seed_without_cuts(position_dim):
    """Return a seed whose grid has no cell wall near the origin."""
    for seed in range(100):
        shift = grid_constants(position_dim, 1, seed)[1]
        if ((shift > 100) & (shift < 900)).all():
            return seed
    raise AssertionError("none of the first 100 seeds")


# Cells


def cell_lists(grids, queries, keys, window, candidates_per_table, num_neighbors, segments=None):
    """Reference loop for one row `[M, P]`: rank the union over tables of the last w entities in the query's cell."""
    query_cells, key_cells = grids.cells(queries).tolist(), grids.cells(keys).tolist()
    indices, distances = [], []
    for i in range(len(queries)):
        candidates = set()
        for table, cell in enumerate(query_cells[i]):
            run = [
                j
                for j in range(i - window + 1)
                if key_cells[j][table] == cell and (segments is None or 0 <= segments[i] == segments[j])
            ]
            candidates.update(run[-candidates_per_table:])
        squared = {j: (queries[i] - keys[j]).square().sum().item() for j in candidates}
        ranked = sorted(candidates, key=lambda j: (squared[j], i - j))[:num_neighbors]
        missing = num_neighbors - len(ranked)
        indices.append(ranked + [-1] * missing)
        distances.append([squared[j] for j in ranked] + [float("inf")] * missing)
    return torch.tensor(indices), torch.tensor(distances, dtype=queries.dtype)


def open_grids(position_dim, cell_sizes, seed):
    """Return the grids of `nearest_predecessors`."""
    cells_per_axis = [neighbor_search.MAX_CELLS_PER_AXIS] * len(cell_sizes)
    return CellGrids(*grid_constants(position_dim, len(cell_sizes), seed), list(cell_sizes), cells_per_axis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["spread", "same", "few"])
@pytest.mark.parametrize(
    ("position_dim", "num_tables", "candidates", "num_neighbors", "window"),
    [(1, 1, 1, 1, 0), (2, 3, 4, 6, 2), (4, 5, 3, 20, 1), (5, 2, 50, 3, 0)],
)
def test_cells_give_the_nearest_distinct_candidates(
    dtype, kind, position_dim, num_tables, candidates, num_neighbors, window
):
    queries, keys = draw_positions((2, 2, 45, position_dim), 6, dtype, kind)
    segments = torch.arange(45).expand(2, -1) % 3 - 1
    grids = open_grids(position_dim, geometric_cell_sizes(num_tables), seed=2)
    for segment_ids in (None, segments):
        found = nearest_predecessors(
            queries, keys, num_neighbors, window=window, num_tables=num_tables,
            candidates_per_table=candidates, seed=2, segment_ids=segment_ids,
        )  # fmt: skip
        for row in range(2):
            for head in range(2):
                expected = cell_lists(
                    grids, queries[row, head], keys[row, head], window, candidates, num_neighbors,
                    None if segment_ids is None else segment_ids[row].tolist(),
                )  # fmt: skip
                assert_same([x[row, head] for x in found], expected)


def test_cell_search_does_not_depend_on_chunk_sizes(monkeypatch):
    queries, keys = draw_positions((2, 3, 50, 3), 7)
    expected = nearest_predecessors(queries, keys, 4, window=1)
    monkeypatch.setattr(neighbor_search, "QUERY_CHUNK", 18)
    monkeypatch.setattr(neighbor_search, "SORT_CHUNK", 700)
    assert_same(nearest_predecessors(queries, keys, 4, window=1), expected)


def test_cell_search_returns_distinct_past_entities():
    queries, keys = draw_positions((2, 2, 300, 4), 8)
    indices, distances = nearest_predecessors(queries, keys, 12, window=5)
    index = torch.arange(300)[:, None]
    found = indices >= 0
    assert (indices <= index - 5)[found].all()
    ordered = torch.where(found, indices, -1 - torch.arange(12)).sort(dim=-1).values
    assert (ordered[..., 1:] != ordered[..., :-1]).all()
    assert torch.equal(found, distances.isfinite())
    real = found.all(dim=-1)
    assert real[..., 100:].float().mean() > 0.9
    assert (distances.diff(dim=-1)[real] >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_lists_do_not_depend_on_later_entities(method):
    queries, keys = draw_positions((1, 2, 80, 4), 9)
    expected = nearest_predecessors(queries, keys, 5, window=2, method=method)
    for stop in (1, 2, 33, 79):
        prefix = nearest_predecessors(queries[:, :, :stop], keys[:, :, :stop], 5, window=2, method=method)
        assert_same([x[:, :, :stop] for x in expected], prefix)
        other_queries, other_keys = queries.clone(), keys.clone()
        other_queries[:, :, stop:], other_keys[:, :, stop:] = 0, queries[:, :, stop:]
        changed = nearest_predecessors(other_queries, other_keys, 5, window=2, method=method)
        assert_same([x[:, :, :stop] for x in changed], prefix)


@pytest.mark.parametrize("method", METHODS)
def test_identical_positions_give_the_most_recent(method):
    queries, keys = draw_positions((1, 1, 60, 4), 0, kind="same")
    indices, _ = nearest_predecessors(keys, keys, 6, window=3, method=method, candidates_per_table=6)
    expected = torch.arange(60)[:, None] - 3 - torch.arange(6)
    assert torch.equal(indices[0, 0], torch.where(expected < 0, -1, expected))


def test_every_cell_of_the_ball_lies_inside_the_grid():
    for position_dim in (1, 2, 4, 8):
        sizes = geometric_cell_sizes(5)
        radius = 2 * position_dim**0.5
        directions = torch.randn(2000, position_dim, generator=torch.Generator().manual_seed(0))
        points = radius * directions / directions.norm(dim=-1, keepdim=True)
        for seed in range(5):
            rotation, shift = grid_constants(position_dim, 5, seed)
            counts = ball_cells_per_axis(position_dim, sizes)
            cells = CellGrids(rotation, shift, sizes, counts).cells(points)
            unclamped = CellGrids(rotation, shift, sizes, [count + 20 for count in counts]).cells(points)
            for table in range(5):
                assert len(cells[:, table].unique()) == len(unclamped[:, table].unique())


# C: the default, without AVX-512, and with ring buffers for short calls too

C_FORMS = {"default": (), "without AVX-512": ("-U__AVX512F__",), "rings": ("-DSHORT=1",)}


def choose_form(form, monkeypatch):
    if form != "torch":
        monkeypatch.setattr(neighbor_search_cpu, "SEARCH_FLAGS", (*neighbor_search_cpu.SEARCH_FLAGS, *C_FORMS[form]))


# Chains


def searched_in_chunks(queries, keys, counts_per_call, num_neighbors, window, candidates, grids, numbered=False):
    """Search ragged rows call by call, with chains and storage as in a cache; return lists by position in the row."""
    rows, length, _ = queries.shape
    capacity = length + 10
    num_tables = len(grids.cell_sizes)
    chains = CellChains(
        torch.full((rows, grids.table_offsets[-1]), -1, dtype=torch.int32),
        torch.full((rows, capacity, num_tables), -1, dtype=torch.int32),
        grids.table_offsets,
    )
    stored, cells = torch.zeros(rows, capacity, queries.shape[-1]), torch.zeros(rows, capacity, num_tables).int()
    past = torch.zeros(rows, dtype=torch.int64)
    indices = torch.full((rows, length, num_neighbors), -1)
    distances = torch.full((rows, length, num_neighbors), float("inf"))
    for counts in counts_per_call:
        counts = torch.as_tensor(counts).expand(rows)
        width = int(counts.max())
        index = past[:, None] + torch.arange(width)
        new_queries = queries.gather(1, index.clamp(max=length - 1)[..., None].expand(-1, -1, queries.shape[-1]))
        for row in range(rows):
            new = slice(int(past[row]), int(past[row] + counts[row]))
            stored[row, new], cells[row, new] = keys[row, new], grids.cells(keys[row, new])
        found = search_cells(
            new_queries, grids.cells(new_queries), index, stored, cells, num_neighbors, window, candidates,
            counts=counts, chains=chains, table_offsets=grids.table_offsets if numbered else None,
        )  # fmt: skip
        for row in range(rows):
            for step in range(int(counts[row])):
                indices[row, past[row] + step], distances[row, past[row] + step] = (
                    found[0][row, step],
                    found[1][row, step],
                )
        past = past + counts
    return (indices, distances), chains, cells, past


SPLITS = {
    "one": [40],
    "steps": [1] * 40,
    "chunks": [7, 1, 1, 20, 11],
    "wider than the rest": [3, 37],
    "ragged": [[5, 0, 12], [1, 1, 1], [0, 9, 0], [20, 13, 2], [1, 1, 1]],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["spread", "same", "few"])
@pytest.mark.parametrize(("window", "candidates", "num_tables"), [(1, 3, 3), (5, 1, 1), (4, 16, 2)])
@pytest.mark.parametrize("form", ["torch", *C_FORMS])
def test_chains_give_the_lists_of_one_call(split, kind, window, candidates, num_tables, form, monkeypatch):
    choose_form(form, monkeypatch)
    queries, keys = (x[:, 0] for x in draw_positions((3, 1, 40, 2), 10, kind=kind))
    sizes = geometric_cell_sizes(num_tables)
    grids = CellGrids(*grid_constants(2, num_tables, 1), sizes, ball_cells_per_axis(2, sizes))
    index = torch.arange(40).expand(3, -1)
    whole = search_cells(queries, grids.cells(queries), index, keys, grids.cells(keys), 4, window, candidates)
    found, _, _, past = searched_in_chunks(queries, keys, SPLITS[split], 4, window, candidates, grids, form != "torch")
    for row in range(3):
        assert_same([x[row, : past[row]] for x in found], [x[row, : past[row]] for x in whole])


@pytest.mark.parametrize("counts", [None, [40, 3, 17]])
def test_start_chains_equals_chains_of_single_steps(counts):
    queries, keys = (x[:, 0] for x in draw_positions((3, 1, 40, 2), 10))
    sizes = geometric_cell_sizes(3)
    grids = CellGrids(*grid_constants(2, 3, 1), sizes, ball_cells_per_axis(2, sizes))
    found, expected, cells, _ = searched_in_chunks(queries, keys, [counts or 40], 4, 5, 3, grids)
    chains = CellChains(torch.full_like(expected.newest, -1), torch.full_like(expected.links, -1), grids.table_offsets)
    start_chains(chains, cells[:, :40], 5, None if counts is None else torch.tensor(counts))
    assert torch.equal(chains.newest, expected.newest)
    assert torch.equal(chains.links, expected.links)
    assert (chains.links >= 0).any()


@pytest.mark.parametrize("kind", ["spread", "same", "few"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 29, 4), (2, 300, 5), (5, 64, 8)])
@pytest.mark.parametrize(
    ("num_tables", "candidates", "num_neighbors", "window"), [(1, 1, 1, 0), (3, 5, 4, 3), (16, 8, 16, 32)]
)
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("form", ["default", "without AVX-512"])
def test_c_returns_the_same_lists(
    kind, shape, num_tables, candidates, num_neighbors, window, limited, form, monkeypatch
):
    choose_form(form, monkeypatch)
    rows, length, position_dim = shape
    queries, keys = (x[:, 0] for x in draw_positions((rows, 1, length, position_dim), 19, kind=kind))
    sizes = geometric_cell_sizes(num_tables)
    grids = CellGrids(*grid_constants(position_dim, num_tables, 2), sizes, ball_cells_per_axis(position_dim, sizes))
    assert search_library(queries) is not None
    cells = [grids.cells(x) for x in (queries, keys)]
    for positions, expected in zip((queries, keys), cells, strict=True):
        assert torch.equal(grids.cells(positions, on_grid=True), expected)
    index = torch.arange(length).expand(rows, -1)
    options = {}
    if limited:
        options = {"reach": index % 17, "counts": torch.arange(rows) * length // rows}
    arguments = (queries, cells[0], index, keys, cells[1], num_neighbors, window, candidates)
    expected = search_cells(*arguments, **options)
    assert_same(search_cells(*arguments, **options, table_offsets=grids.table_offsets), expected)


@pytest.mark.parametrize("kind", ["spread", "same", "few"])
def test_undo_restores_the_chains_of_a_shorter_row(kind):
    queries, keys = (x[:, 0] for x in draw_positions((3, 1, 40, 2), 11, kind=kind))
    sizes = geometric_cell_sizes(3)
    grids = CellGrids(*grid_constants(2, 3, 1), sizes, ball_cells_per_axis(2, sizes))
    window = 4
    shorter = torch.tensor([33, 2, 17])
    _, chains, cells, _ = searched_in_chunks(queries, keys, [[20, 20, 12], [20, 2, 8]], 4, window, 3, grids)
    _, expected, _, _ = searched_in_chunks(queries, keys, [shorter.tolist()], 4, window, 3, grids)
    chains.undo(cells, (shorter - window).clamp(min=0), torch.tensor([40, 22, 20]) - window)
    assert torch.equal(chains.newest, expected.newest)
    for row, entered in enumerate((shorter - window).clamp(min=0).tolist()):
        assert torch.equal(chains.links[row, :entered], expected.links[row, :entered])
    before = chains.newest.clone()
    chains.undo(cells, shorter, shorter)
    assert torch.equal(chains.newest, before)


@pytest.mark.parametrize("method", METHODS)
def test_reach_limits_the_candidates(method):
    queries, keys = (x[:, 0] for x in draw_positions((2, 1, 30, 2), 12))
    index = torch.arange(30).expand(2, -1)
    reach = torch.minimum(index, torch.tensor([[6], [40]]))
    if method == "exact":
        indices, _ = search_exact(queries, index, keys, 4, 2, reach=reach)
    else:
        grids = open_grids(2, [1000.0], seed_without_cuts(2))
        cells = [grids.cells(x) for x in (queries, keys)]
        indices, _ = search_cells(queries, cells[0], index, keys, cells[1], 4, 2, 30, reach=reach)
    for row in range(2):
        for i in range(30):
            visible = range(max(0, i - int(reach[row, i])), i - 1)
            ranked = sorted(visible, key=lambda j: ((queries[row, i] - keys[row, j]).square().sum().item(), i - j))[:4]
            assert indices[row, i].tolist() == ranked + [-1] * (4 - len(ranked))


# Ranking


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranking_breaks_ties_by_recency_and_drops_repeats(dtype):
    rng = random.Random(0)
    offsets = torch.tensor([[rng.randrange(1, 9) for _ in range(20)] for _ in range(50)])
    by_offset = torch.tensor([rng.choice([0.0, 1.0, 2.5]) for _ in range(9)], dtype=dtype)
    visible = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    nearest, squared = rank_nearest(by_offset[offsets], offsets, visible, 6)
    for row in range(50):
        seen = {int(offset) for offset, ok in zip(offsets[row], visible[row], strict=True) if ok}
        ranked = sorted(seen, key=lambda offset: (by_offset[offset], offset))[:6]
        missing = [-1] * (6 - len(ranked))
        assert nearest[row].tolist() == ranked + missing
        assert squared[row, : len(ranked)].tolist() == by_offset[ranked].tolist()
        assert squared[row, len(ranked) :].isinf().all()


# Inputs


@pytest.mark.parametrize(
    ("arguments", "name"), [((0,), "num_tables"), ((3, 1.0, 2.0), "finest"), ((3, 1.0, 0.0), "finest")]
)
def test_invalid_cell_sizes_raise(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        geometric_cell_sizes(*arguments)


@pytest.mark.parametrize("method", METHODS)
def test_search_is_reproducible_and_leaves_the_global_random_state(method):
    queries, keys = draw_positions((1, 2, 50, 4), 13)
    before = torch.get_rng_state()
    first = nearest_predecessors(queries, keys, 4, method=method, candidates_per_table=2, num_tables=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert_same(nearest_predecessors(queries, keys, 4, method=method, candidates_per_table=2, num_tables=2), first)


def test_seeds_give_different_grids():
    queries, keys = draw_positions((1, 1, 300, 4), 14)
    lists = [nearest_predecessors(queries, keys, 8, seed=seed, num_tables=2)[0] for seed in (0, 1)]
    assert not torch.equal(*lists)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_to_float32(method, dtype):
    queries, keys = (x.to(dtype) for x in draw_positions((1, 2, 30, 3), 15))
    indices, distances = nearest_predecessors(queries, keys, 4, method=method)
    assert distances.dtype == torch.float32
    assert_same((indices, distances), nearest_predecessors(queries.float(), keys.float(), 4, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_search_has_no_gradient_and_does_not_change_inputs(method):
    queries, keys = (x.requires_grad_() for x in draw_positions((1, 1, 20, 2), 16))
    before = queries.detach().clone(), keys.detach().clone()
    _, distances = nearest_predecessors(queries, keys, 3, method=method)
    assert not distances.requires_grad
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3)])
def test_empty_input(method, shape):
    positions = torch.zeros(shape)
    indices, distances = nearest_predecessors(positions, positions, 4, method=method)
    assert indices.shape == distances.shape == (*shape[:3], 4)
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("method", METHODS)
def test_zero_neighbors(method):
    positions = draw_positions((1, 2, 9, 3), 17)[0]
    indices, distances = nearest_predecessors(positions, positions, 0, method=method)
    assert indices.shape == distances.shape == (1, 2, 9, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e4, 1e18])
def test_positions_outside_the_grid(method, scale):
    queries, keys = (scale * x for x in draw_positions((1, 1, 20, 2), 18))
    found = nearest_predecessors(queries, keys, 30, method=method, candidates_per_table=30)
    expected = nearest_predecessors_reference(queries, keys, 30)
    if method == "exact":
        assert_same(found, expected)
    else:
        assert (found[0] <= torch.arange(20)[:, None]).all() and (found[0] >= 0).any()


GOOD = torch.zeros(1, 2, 5, 3)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((GOOD[0], GOOD[0], 2), ["query_positions", "key_positions", "[2, 5, 3]"]),
        ((GOOD, GOOD[:, :1], 2), ["key_positions", "[1, 1, 5, 3]"]),
        ((GOOD[..., :0], GOOD[..., :0], 2), ["position_dim 0"]),
        ((GOOD.long(), GOOD.long(), 2), ["query_positions", "torch.int64"]),
        ((GOOD, GOOD.long(), 2), ["key_positions", "torch.int64"]),
        ((GOOD, GOOD, -1), ["num_neighbors", "-1"]),
        ((GOOD, GOOD, 2, {"window": -3}), ["window", "-3"]),
        ((GOOD, GOOD, 2, {"method": "quick"}), ["method", "'quick'", '"cells"']),
        ((GOOD, GOOD, 2, {"num_tables": 0}), ["num_tables", "0"]),
        ((GOOD, GOOD, 2, {"candidates_per_table": -2}), ["candidates_per_table", "-2"]),
        ((GOOD, GOOD, 2, {"cell_sizes": [1.0]}), ["cell_sizes", "num_tables=8", "1"]),
        ((GOOD, GOOD, 2, {"num_tables": 2, "cell_sizes": [1.0, 0.0]}), ["cell_sizes", "0.0"]),
        ((GOOD, GOOD, 2, {"num_tables": 1, "cell_sizes": [float("nan")]}), ["cell_sizes", "nan"]),
        ((GOOD, GOOD, 2, {"num_tables": 1, "cell_sizes": [float("inf")]}), ["cell_sizes", "inf"]),
        ((GOOD, GOOD, 2, {"segment_ids": torch.zeros(1, 4).long()}), ["segment_ids", "[1, 5]", "[1, 4]"]),
        ((GOOD, GOOD + float("nan"), 2), ["key_positions", "not finite"]),
        ((GOOD - float("inf"), GOOD, 2), ["query_positions", "not finite"]),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_errors_name_the_argument(method, arguments, parts):
    *positional, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError) as error:
        nearest_predecessors(*positional, **{"method": method, **options})
    for part in parts:
        assert part in str(error.value)


def test_cell_sizes_run_from_coarse_to_fine():
    sizes = geometric_cell_sizes(8)
    assert sizes[0] == 8.0 and sizes[-1] == pytest.approx(0.35)
    ratios = torch.tensor(sizes[1:]) / torch.tensor(sizes[:-1])
    assert torch.allclose(ratios, ratios[:1].expand_as(ratios))
    assert geometric_cell_sizes(1) == [8.0]
    assert check_cell_sizes([2, 1], 2, 1) == [2, 1]


def test_cached_calls_with_one_candidate_per_table_run_in_torch(monkeypatch):
    """Several tables with one candidate each gave a tensor whose strides `view` refused."""
    monkeypatch.setenv("DFN_HF_KERNELS", "0")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DFNConfig(**sizes, local_window=3, num_neighbors=4, num_tables=3, candidates_per_table=1)
    model = DFNForCausalLM(config).double().eval()
    ids = torch.randint(0, 40, (2, 40))
    with torch.no_grad():
        start = model(ids[:, :25])
        end = model(ids[:, 25:], **{CACHE_NAME: start[CACHE_NAME]})
        assert torch.allclose(torch.cat([start.logits, end.logits], dim=1), model(ids).logits, rtol=0, atol=1e-9)
