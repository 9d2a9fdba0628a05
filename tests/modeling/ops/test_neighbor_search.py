"""The neighbour search: `nearest_predecessors`, exact search and the choice of a backend for `search_tree`."""

import random

import pytest
import torch

from dfn_hf.modeling.ops import neighbor_search
from dfn_hf.modeling.ops.box_tree import BLOCK, GRID, RECENT, empty_tree_index, index_layout
from dfn_hf.modeling.ops.neighbor_ranking import NO_DISTANCE, rank_nearest, squared_distances
from dfn_hf.modeling.ops.neighbor_search import nearest_predecessors, search_exact, search_tree
from dfn_hf.modeling.ops.neighbor_search_reference import search_exact_loop, search_tree_loop
from tests.modeling.ops.test_box_tree import KINDS, as_tensors, draw_positions

METHODS = ("exact", "tree")
LONG = RECENT + 3 * BLOCK  # with a window of 0, the last queries search a tree of three blocks


def draw_floats(shape, seed, kind="clusters"):
    """Draw queries and keys `[batch, heads, length, position_dim]` on the grid, so that distances often tie."""
    batch, heads, length, position_dim = shape
    return [(x.float() / GRID).view(shape) for x in draw_positions(kind, (batch * heads, length, position_dim), seed)]


def search_in_loops(queries, keys, num_neighbors, window=0, method="exact", num_leaves=8):
    """Return `nearest_predecessors` of positions on the grid by its definition."""
    indices, squared = [], []
    for query, key in zip(*((x * GRID).round().long().flatten(0, 1).tolist() for x in (queries, keys)), strict=True):
        if method == "exact":
            lists = search_exact_loop(query, key, num_neighbors, window)
        else:
            lists = search_tree_loop(query, key, num_neighbors, window, num_leaves)
        found = as_tensors(lists, num_neighbors)
        indices.append(found[0])
        squared.append((found[1] / GRID**2).masked_fill(found[0] < 0, float("inf")))
    return tuple(torch.stack(x).view(*queries.shape[:3], num_neighbors) for x in (indices, squared))


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


# Lists


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
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
def test_short_sequences_have_exact_neighbors(kind, method, shape, num_neighbors, window):
    queries, keys = draw_floats(shape, 0, kind)
    found = nearest_predecessors(queries, keys, num_neighbors, window=window, method=method)
    assert_same(found, search_in_loops(queries, keys, num_neighbors, window))


@pytest.mark.parametrize("method", METHODS)
def test_long_sequences_equal_the_loop(method):
    queries, keys = draw_floats((1, 1, LONG, 2), 1)
    found = nearest_predecessors(queries, keys, 6, window=1, method=method, num_leaves=2)
    assert_same(found, search_in_loops(queries, keys, 6, 1, method, num_leaves=2))


def test_more_leaves_find_more():
    queries, keys = draw_floats((1, 2, LONG, 6), 2, "uniform")
    last = slice(RECENT + 2 * BLOCK, None)  # these queries search the tree
    sums = [
        nearest_predecessors(queries, keys, 8, num_leaves=num_leaves)[1][:, :, last].sum()
        for num_leaves in (1, 4, 1000)
    ]
    exact = nearest_predecessors(queries, keys, 8, method="exact")[1][:, :, last].sum()
    assert sums[0] > sums[1] > sums[2] == exact


def test_positions_off_the_grid_are_rounded():
    queries, keys = torch.randn(2, 2, 2, 40, 5, generator=torch.Generator().manual_seed(3))
    on_grid = [(x * GRID).round() / GRID for x in (queries, keys)]
    for method in METHODS:
        found = nearest_predecessors(queries, keys, 7, window=2, method=method)
        assert_same(found, nearest_predecessors(*on_grid, 7, window=2, method=method))


def test_exact_search_does_not_depend_on_chunk_sizes(monkeypatch):
    queries, keys = draw_floats((2, 2, 37, 2), 4)
    monkeypatch.setattr(neighbor_search, "EXACT_QUERIES", 12)
    monkeypatch.setattr(neighbor_search, "EXACT_KEYS", 5)
    found = nearest_predecessors(queries, keys, 6, window=4, method="exact")
    assert_same(found, search_in_loops(queries, keys, 6, 4))


# Segments


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("window", [0, 3])
def test_interleaved_and_padded_segments(method, window):
    queries, keys = draw_floats((2, 2, 40, 2), 5)
    ids = torch.tensor([-7, -1, 0, 5, 2**40, 2**40 + 2**33])
    segment_ids = ids[torch.randint(len(ids), (2, 40), generator=torch.Generator().manual_seed(5))]
    found = nearest_predecessors(queries, keys, 6, window=window, method=method, segment_ids=segment_ids)
    expected = torch.full((2, 2, 40, 6), -1), torch.full((2, 2, 40, 6), float("inf"))
    for row in range(2):
        for segment in ids[2:].tolist():
            places = (segment_ids[row] == segment).nonzero()[:, 0]
            indices, squared = search_in_loops(
                queries[row : row + 1, :, places], keys[row : row + 1, :, places], 6, window
            )
            expected[0][row, :, places] = torch.where(indices[0] < 0, -1, places[indices[0].clamp(min=0)])
            expected[1][row, :, places] = squared[0]
    assert_same(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_reach_separates_segments(method):
    queries, keys = draw_positions("walk", (2, 30, 2), 6)
    reach = torch.stack([torch.arange(30) % 7, torch.arange(30)])
    index = torch.arange(30).expand(2, -1)
    arguments = (queries, index, keys, 4, 2)
    found = search_exact(*arguments, reach=reach)
    if method == "tree":
        assert_same(search_tree(*arguments, 3, reach=reach), found)
    for row, starts in enumerate([range(0, 30, 7), [0]]):
        for start in starts:
            part = slice(start, start + 7 if row == 0 else 30)
            indices, squared = as_tensors(
                search_exact_loop(queries[row, part].tolist(), keys[row, part].tolist(), 4, 2), 4
            )
            assert torch.equal(found[0][row, part], torch.where(indices < 0, -1, indices + start))
            assert torch.equal(found[1][row, part], squared)


# Calls with an index, in each layout


@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("kind", ["clusters", "drift", "two places"])
def test_calls_with_an_index_equal_one_call_in_torch(kind, switch, monkeypatch):
    queries, keys = draw_positions(kind, (2, LONG, 3), 7)
    positions = torch.arange(LONG).expand(2, -1)
    monkeypatch.setenv("DFN_HF_KERNELS", "0")
    expected = search_tree(queries, positions, keys, 5, 4, 3)
    monkeypatch.setenv("DFN_HF_KERNELS", switch)
    layout = index_layout(queries.device, 3)
    assert layout == {"0": "flat", "1": "paged"}[switch]
    index, ends = empty_tree_index(layout, 2, LONG, 3, queries.device), [0, 700, 701, 1100, 1101, 1102, LONG]
    for start, end in zip(ends, ends[1:], strict=False):
        found = search_tree(queries[:, start:end], positions[:, start:end], keys, 5, 4, 3, index=index)
        assert_same(found, [x[:, start:end] for x in expected])


# Ranking


def test_ranking_breaks_ties_by_recency():
    choose = random.Random(0).choice
    squared = torch.tensor([[choose([0, 4, 9, 2**30]) for _ in range(20)] for _ in range(50)], dtype=torch.int32)
    ages = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(row)) for row in range(50)])
    visible = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)) < 0.4
    for num_neighbors in (0, 6, 25):
        found = rank_nearest(squared, ages, visible, num_neighbors)
        for row in range(50):
            candidates = zip(squared[row].tolist(), ages[row].tolist(), visible[row].tolist(), strict=True)
            ranked = sorted((distance, age) for distance, age, is_visible in candidates if is_visible)[:num_neighbors]
            expected = as_tensors([ranked], num_neighbors)
            assert_same([x[row] for x in found], [x[0] for x in expected])


def test_squared_distances_are_exact():
    queries, keys = torch.tensor([[16320, -16320]]).short(), torch.tensor([[-16320, 16320]]).short()
    assert squared_distances(queries, keys).tolist() == [2 * 32640**2]
    assert 2 * 32640**2 < NO_DISTANCE


# Inputs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_give_the_same_neighbors(method, dtype):
    queries, keys = (x.to(dtype) for x in draw_floats((1, 2, 30, 3), 8))
    found = nearest_predecessors(queries, keys, 4, method=method)
    assert found[1].dtype == torch.float32
    assert_same(found, nearest_predecessors(queries.float(), keys.float(), 4, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_search_has_no_gradient_and_does_not_change_inputs(method):
    queries, keys = (x.requires_grad_() for x in draw_floats((1, 1, 20, 2), 9))
    before = queries.detach().clone(), keys.detach().clone()
    _, distances = nearest_predecessors(queries, keys, 3, method=method)
    assert not distances.requires_grad
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3)])
def test_empty_input(method, shape):
    positions = torch.zeros(shape)
    for segment_ids in (None, torch.zeros(shape[0], shape[2]).long()):
        found = nearest_predecessors(positions, positions, 4, method=method, segment_ids=segment_ids)
        assert [x.shape for x in found] == [(*shape[:3], 4)] * 2
        assert [x.dtype for x in found] == [torch.int64, torch.float32]


@pytest.mark.parametrize("method", METHODS)
def test_zero_neighbors(method):
    positions = draw_floats((1, 2, 9, 3), 10)[0]
    indices, distances = nearest_predecessors(positions, positions, 0, method=method)
    assert indices.shape == distances.shape == (1, 2, 9, 0)


def test_only_padding_has_no_neighbors():
    positions = torch.zeros(1, 1, 4, 2)
    for method in METHODS:
        indices, distances = nearest_predecessors(
            positions, positions, 2, method=method, segment_ids=torch.full((1, 4), -1)
        )
        assert (indices == -1).all() and distances.isinf().all()


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_positions(method):
    positions = torch.tensor([[255.0, 255.0], [-255.0, -255.0]]).view(1, 1, 2, 2)
    indices, distances = nearest_predecessors(positions, positions, 2, method=method)
    assert indices.tolist() == [[[[0, -1], [1, 0]]]]
    assert distances[0, 0, 1].tolist() == [0.0, 2 * 510.0**2]


GOOD = torch.zeros(1, 2, 5, 3)
WIDE = torch.linspace(-255, 255, 5)[None, None, :, None].expand(1, 2, 5, 3)


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
        ((GOOD, GOOD, 2, {"method": "quick"}), ["method", "'quick'", '"tree"']),
        ((GOOD, GOOD, 2, {"num_leaves": 0}), ["num_leaves", "0"]),
        ((GOOD, GOOD, 2, {"segment_ids": torch.zeros(1, 4).long()}), ["segment_ids", "[1, 5]", "[1, 4]"]),
        ((GOOD, GOOD + float("nan"), 2), ["key_positions", "not finite"]),
        ((GOOD - float("inf"), GOOD, 2), ["query_positions", "not finite"]),
        ((GOOD, GOOD + 256.0, 2), ["key_positions", "255", "256"]),
        ((GOOD - 1e9, GOOD, 2), ["query_positions", "255", "1000000000"]),
        ((WIDE, GOOD, 2), ["squared diagonal", "524288", "780"]),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_errors_name_the_argument(method, arguments, parts):
    *positional, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError) as error:
        nearest_predecessors(*positional, **{"method": method, **options})
    for part in parts:
        assert part in str(error.value)
