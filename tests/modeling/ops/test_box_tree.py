"""The box tree in torch against its definition as loops."""

import random

import pytest
import torch

from dfn_hf.modeling.ops import box_tree, box_tree_torch
from dfn_hf.modeling.ops.box_tree import (
    BLOCK,
    GRID_LIMIT,
    LEAF_SIZE,
    RECENT,
    empty_tree_index,
    index_shapes,
    leaf_budget,
    to_grid,
    tree_base,
)
from dfn_hf.modeling.ops.box_tree_torch import search_tree_torch
from dfn_hf.modeling.ops.neighbor_ranking import NO_DISTANCE
from dfn_hf.modeling.ops.neighbor_search import search_exact
from dfn_hf.modeling.ops.neighbor_search_reference import enter, first_leaves, search_exact_loop, search_tree_loop
from tests.support.tree_sizes import set_sizes

WHOLE = (None, None, None)  # reach, counts and index of rows that are searched at once


# Positions


def draw_uniform(shape, generator):
    return torch.randint(-200, 200, shape, generator=generator)


def draw_clusters(shape, generator):
    rows, length, position_dim = shape
    centres = torch.randint(-500, 500, (rows, 5, position_dim), generator=generator)
    cluster = torch.randint(5, (rows, length, 1), generator=generator).expand(shape)
    return centres.gather(1, cluster) + torch.randint(-3, 4, shape, generator=generator)


def draw_one_place(shape, generator):
    return torch.full(shape, 7)


def draw_two_places(shape, generator):
    return torch.randint(2, (*shape[:2], 1), generator=generator).expand(shape) * 300 - 20


def draw_drift(shape, generator):
    return torch.arange(shape[1])[:, None] * 2 + torch.randint(-4, 5, shape, generator=generator)


def draw_drift_on_one_axis(shape, generator):
    positions = torch.full(shape, 5)
    positions[..., 0] = torch.arange(shape[1])
    return positions


def draw_walk(shape, generator):
    return torch.randint(-5, 6, shape, generator=generator).cumsum(dim=1)


def draw_geometric(shape, generator):
    return 2 ** torch.randint(13, shape, generator=generator)


KINDS = {
    "uniform": draw_uniform,
    "clusters": draw_clusters,
    "one place": draw_one_place,
    "two places": draw_two_places,
    "drift": draw_drift,
    "drift on one axis": draw_drift_on_one_axis,
    "walk": draw_walk,
    "geometric": draw_geometric,
}


def draw_positions(kind, shape, seed):
    """Draw queries near keys, and keys, int16 `[rows, length, position_dim]`."""
    generator = torch.Generator().manual_seed(seed)
    keys = KINDS[kind](shape, generator)
    queries = keys + torch.randint(-9, 10, shape, generator=generator)
    return queries.short(), keys.short()


# Definition


@pytest.fixture
def small_trees(monkeypatch):
    set_sizes(monkeypatch, LEAF_SIZE=4, BLOCK=8, RECENT=12)


def as_tensors(lists, num_neighbors):
    """Return lists of (squared distance, id) as (indices, squared distances), filled up to K."""
    filled = [found + [(NO_DISTANCE, -1)] * (num_neighbors - len(found)) for found in lists]
    both = torch.tensor(filled).view(len(lists), num_neighbors, 2)
    return both[..., 1], both[..., 0].int()


def search_in_loops(queries, keys, num_neighbors, window, num_leaves):
    """Return `search_tree` of whole rows by its definition."""
    rows = [
        as_tensors(search_tree_loop(query, key, num_neighbors, window, num_leaves), num_neighbors)
        for query, key in zip(queries.tolist(), keys.tolist(), strict=True)
    ]
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def search_at_once(queries, keys, *sizes, limits=WHOLE):
    index = torch.arange(queries.shape[1]).expand(len(queries), -1)
    return search_tree_torch(queries, index, keys, *sizes, *limits)


def assert_same(found, expected):
    assert [x.dtype for x in found] == [torch.int64, torch.int32]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_torch_equals_the_loop(kind, seed, monkeypatch):
    choose = random.Random(f"{kind}{seed}").choice
    for case in range(5):
        sizes = {"LEAF_SIZE": choose([2, 4, 16]), "BLOCK": choose([4, 8, 16]), "RECENT": choose([4, 12, 20])}
        set_sizes(monkeypatch, **sizes, SPARE_LEAVES=choose([0, 2, 256]))
        shape = choose([1, 2, 3]), choose([1, 9, 60, 150, 250]), choose(range(1, 10))
        queries, keys = draw_positions(kind, shape, seed=10 * seed + case)
        sizes = choose(range(1, 41)), choose(range(10)), choose(range(1, 13))
        assert_same(search_at_once(queries, keys, *sizes), search_in_loops(queries, keys, *sizes))


@pytest.mark.parametrize("kind", ["clusters", "drift on one axis"])
def test_torch_equals_the_loop_with_the_sizes_of_the_model(kind):
    queries, keys = draw_positions(kind, (1, 1500, 3), seed=0)
    assert_same(search_at_once(queries, keys, 16, 5, 3), search_in_loops(queries, keys, 16, 5, 3))


def test_a_loop_over_a_tree_by_hand(monkeypatch):
    """Entities 0 to 7 are in the tree when the last query searches, 8 to 11 are recent."""
    set_sizes(monkeypatch, LEAF_SIZE=2, BLOCK=4, RECENT=4)
    keys = [[x] for x in (0, 100, 1, 101, 2, 50, 3, 51, 60, 60, 60, 60)]
    leaves = first_leaves(1)
    for entered in (0, 4):
        leaves = enter(leaves, keys, entered)
    assert [leaf.members for leaf in leaves] == [[0, 2], [4, 6], [5], [7], [1, 3]]
    assert [leaf.cell for leaf in leaves] == [[(None, 1)], [(2, 24)], [(25, 50)], [(51, 75)], [(76, None)]]
    assert [leaf.box for leaf in leaves] == [[(0, 1)], [(2, 3)], [(50, 50)], [(51, 51)], [(100, 101)]]
    found = search_tree_loop([[1]] * 12, keys, 3, 0, 1)
    assert found[11] == [(0, 2), (1, 0), (59**2, 11)]
    assert search_exact_loop([[1]] * 12, keys, 3, 0)[11] == [(0, 2), (1, 4), (1, 0)]


def test_small_chunks_give_the_same_neighbors(small_trees, monkeypatch):
    queries, keys = draw_positions("clusters", (3, 120, 3), seed=1)
    expected = search_at_once(queries, keys, 6, 2, 3)
    for size in (1, 100, 1000):
        monkeypatch.setattr(box_tree_torch, "QUERY_CHUNK", size)
        assert_same(search_at_once(queries, keys, 6, 2, 3), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_neighbors", [1, LEAF_SIZE])
def test_all_leaves_give_the_exact_neighbors(kind, num_neighbors, monkeypatch):
    set_sizes(monkeypatch, BLOCK=8, RECENT=12)
    queries, keys = draw_positions(kind, (2, 300, 3), seed=2)
    index = torch.arange(300).expand(2, -1)
    found = search_at_once(queries, keys, num_neighbors, 3, 10**6)
    assert_same(found, search_exact(queries, index, keys, num_neighbors, 3))


def test_short_sequences_are_searched_exactly():
    queries, keys = draw_positions("uniform", (1, RECENT + BLOCK + 6, 2), seed=3)
    index = torch.arange(len(queries[0]))[None]
    found, exact = search_at_once(queries, keys, 8, 4, 1), search_exact(queries, index, keys, 8, 4)
    last = RECENT + BLOCK + 2  # the last query that sees less than RECENT + BLOCK entities
    assert torch.equal(found[0][:, : last + 1], exact[0][:, : last + 1])
    assert not torch.equal(found[0], exact[0])


# Budget


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_bounds_the_leaves(kind, monkeypatch):
    set_sizes(monkeypatch, LEAF_SIZE=2, BLOCK=8, RECENT=12, SPARE_LEAVES=1)
    queries, keys = draw_positions(kind, (1, 500, 2), seed=4)
    index, capacity = make_index(1, 500, 2), index_shapes("flat", 500, 2)["leaf_ids"][0]
    search_at_once(queries, keys, 4, 0, 2, limits=(None, None, index))
    entered, count = index.counters[0, :2].tolist()
    assert entered == box_tree.tree_base(500)
    assert count <= box_tree.leaf_budget(entered) + box_tree.BLOCK <= capacity
    if kind in ("uniform", "clusters", "drift"):
        assert count > box_tree.leaf_budget(entered)  # reached


# Calls with an index


def make_index(rows, capacity, position_dim):
    return empty_tree_index("flat", rows, capacity, position_dim, torch.device("cpu"))


class CachedSearch:
    """Searches ragged rows call by call, with an index and storage as in a cache."""

    search = staticmethod(search_tree_torch)

    def __init__(self, rows, capacity, position_dim, *sizes):
        self.sizes, self.window = sizes, sizes[1]
        self.index = make_index(rows, capacity, position_dim)
        self.stored = torch.zeros(rows, capacity, position_dim, dtype=torch.int16)
        self.past = torch.zeros(rows, dtype=torch.int64)

    def append(self, queries, keys, counts):
        """Append the next `counts` entities of each row of `queries` and `keys`, which hold whole rows."""
        offsets = torch.arange(int(counts.max()))
        index = self.past[:, None] + offsets
        place = index.clamp(max=queries.shape[1] - 1)[..., None].expand(-1, -1, queries.shape[-1])
        for row, (first, count) in enumerate(zip(self.past.tolist(), counts.tolist(), strict=True)):
            self.stored[row, first : first + count] = keys[row, first : first + count]
        arguments = queries.gather(1, place), index, self.stored, *self.sizes, index.clone(), counts, self.index
        found = self.search(*arguments)
        self.past = self.past + counts
        return [[x[row, :count] for x in found] for row, count in enumerate(counts.tolist())]

    def crop(self, lengths):
        self.past = torch.minimum(self.past, lengths)
        base = box_tree.tree_base(self.past - self.window + 1)
        self.index.counters[self.index.counters[:, 0] > base] = 0


def random_splits(lengths, choose):
    """Yield counts per row until all rows have their length."""
    left = torch.tensor(lengths)
    while left.any():
        size = choose([1, 1, 2, 7, 30, 90])
        counts = torch.minimum(left, torch.tensor([choose([size, size, 1, 0]) for _ in lengths]))
        if counts.any():
            yield counts
        left = left - counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["steps", "random", "one chunk after a step"])
def test_calls_with_an_index_equal_one_call(kind, split, small_trees):
    lengths = [130, 200, 40]
    queries, keys = draw_positions(kind, (3, 200, 2), seed=5)
    expected = search_at_once(queries, keys, 5, 3, 2)
    search = CachedSearch(3, 210, 2, 5, 3, 2)
    counts_per_call = {
        "steps": [(torch.tensor(lengths) > step).long() for step in range(200)],
        "random": list(random_splits(lengths, random.Random(kind).choice)),
        "one chunk after a step": [torch.ones(3).long(), torch.tensor(lengths) - 1],
    }
    for counts in counts_per_call[split]:
        before = search.past
        for row, found in enumerate(search.append(queries, keys, counts)):
            part = slice(int(before[row]), int(before[row] + counts[row]))
            assert_same(found, [x[row, part] for x in expected])
    assert search.past.tolist() == lengths


@pytest.mark.parametrize("kind", KINDS)
def test_calls_after_crops_equal_one_call(kind, small_trees):
    choose = random.Random(kind).choice
    search = CachedSearch(2, 150, 3, 6, 2, 2)
    _, keys = draw_positions(kind, (2, 150, 3), seed=6)
    rebuilt = False
    for round_number in range(8):
        queries, new_keys = draw_positions(kind, (2, 150, 3), seed=7 + round_number)
        kept = torch.arange(150) < search.past[:, None]
        keys = torch.where(kept[..., None], keys, new_keys)
        counts = torch.tensor([choose(range(150 - past + 1)) for past in search.past.tolist()])
        before, expected = search.past, search_at_once(queries, keys, 6, 2, 2)
        for row, found in enumerate(search.append(queries, keys, counts)):
            part = slice(int(before[row]), int(before[row] + counts[row]))
            assert_same(found, [x[row, part] for x in expected])
        search.crop(torch.tensor([choose(range(length + 1)) for length in search.past.tolist()]))
        rebuilt |= bool((search.index.counters[:, 0] == 0).any() & (search.index.leaf_ids != 0).any())
    assert rebuilt


def test_an_index_behind_the_row_catches_up(small_trees):
    queries, keys = draw_positions("walk", (2, 100, 2), seed=8)
    expected = search_at_once(queries, keys, 4, 1, 2)
    index = torch.arange(90, 100).expand(2, -1)
    found = search_tree_torch(queries[:, 90:], index, keys, 4, 1, 2, None, None, make_index(2, 100, 2))
    assert_same(found, [x[:, 90:] for x in expected])


def test_short_rows_need_no_leaves():
    queries, keys = draw_positions("uniform", (2, 50, 2), seed=8)
    index = make_index(2, 0, 2)
    assert index.leaf_ids.shape == (2, 0, LEAF_SIZE) and index.leaf_boxes.shape == (2, 0, 4, 2)
    found = search_at_once(queries, keys, 4, 1, 2, limits=(None, None, index))
    assert_same(found, search_at_once(queries, keys, 4, 1, 2))


# Padding and segments


def test_padding_has_no_neighbors_and_changes_none(small_trees):
    queries, keys = draw_positions("clusters", (3, 100, 3), seed=9)
    whole = search_at_once(queries, keys, 5, 2, 3)
    counts = torch.tensor([100, 0, 61])
    is_real = torch.arange(100) < counts[:, None]
    noise = torch.full_like(keys, -9000)
    queries, keys = (torch.where(is_real[..., None], x, noise) for x in (queries, keys))
    indices, squared = search_at_once(queries, keys, 5, 2, 3, limits=(None, counts, None))
    assert torch.equal(indices, whole[0].masked_fill(~is_real[..., None], -1))
    assert torch.equal(squared, whole[1].masked_fill(~is_real[..., None], NO_DISTANCE))


@pytest.mark.parametrize("kind", ["clusters", "one place", "walk"])
def test_segments_are_sequences_of_their_own(kind, small_trees):
    lengths = [[90, 1, 3, 70, 60], [200, 20], [7, 150]]
    counts = torch.tensor([sum(row) for row in lengths])
    queries, keys = draw_positions(kind, (3, 230, 2), seed=10)
    reach = torch.zeros(3, 230, dtype=torch.int64)
    expected = torch.full((3, 230, 5), -1), torch.full((3, 230, 5), NO_DISTANCE, dtype=torch.int32)
    for row, segments in enumerate(lengths):
        first = 0
        for length in segments:
            part = slice(first, first + length)
            reach[row, part] = torch.arange(length)
            indices, squared = search_in_loops(queries[row : row + 1, part], keys[row : row + 1, part], 5, 3, 2)
            expected[0][row, part] = torch.where(indices[0] < 0, -1, indices[0] + first)
            expected[1][row, part] = squared[0]
            first += length
    assert_same(search_at_once(queries, keys, 5, 3, 2, limits=(reach, counts, None)), expected)


# Grid and sizes


def test_positions_are_rounded_and_limited():
    positions = torch.tensor([0.0, 1 / 64, 1 / 128, 3 / 128, -2.0, 1e9, -1e9, float("nan"), float("inf")])
    steps = [0, 1, 0, 2, -128, GRID_LIMIT, -GRID_LIMIT, 0, GRID_LIMIT]
    assert to_grid(positions).tolist() == steps
    assert to_grid(positions).dtype == torch.int16
    assert to_grid(torch.tensor([200.0], dtype=torch.bfloat16)).tolist() == [12800]


@pytest.mark.parametrize(("seen", "base"), [(-5, 0), (0, 0), (1023, 0), (1024, 128), (1151, 128), (1152, 256)])
def test_tree_base_of_numbers_and_tensors(seen, base):
    assert (LEAF_SIZE, BLOCK, RECENT) == (16, 128, 896)
    assert tree_base(seen) == base
    assert tree_base(torch.tensor([seen])).tolist() == [base]


@pytest.mark.parametrize("position_dim", [1, 4, 5])
def test_shapes_of_an_index(position_dim):
    leaves = 8000 // 8 + 512
    assert leaf_budget(8000) == leaves - 256
    pairs = (position_dim + 1) // 2
    assert index_shapes("flat", 8000, position_dim) == {
        "counters": (4,),
        "leaf_ids": (leaves, 16),
        "leaf_boxes": (leaves, 4, position_dim),
    }
    assert index_shapes("paged", 8000, position_dim) == {
        "counters": (4,),
        "leaves": (leaves, 16 + 16 * pairs),
        "leaf_pages": (leaves,),
        "cuts": (leaves, 3),
        "pages": (leaves // 5 + 16, 32 * pairs + 64),
    }
