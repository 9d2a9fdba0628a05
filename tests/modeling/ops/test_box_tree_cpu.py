"""The box tree in C against its definition as loops and against the torch form."""

import platform
import random

import pytest
import torch

from dfn_hf.modeling.ops import box_tree
from dfn_hf.modeling.ops.box_tree import empty_tree_index, index_shapes, tree_base
from dfn_hf.modeling.ops.box_tree_torch import search_tree_torch
from dfn_hf.modeling.ops.kernels import box_tree_cpu
from dfn_hf.modeling.ops.kernels.box_tree_cpu import (
    TREE_SOURCE,
    crop_tree_cpu,
    search_tree_cpu,
    tree_library,
)
from dfn_hf.modeling.ops.kernels.c_compiler import compiled_library
from dfn_hf.modeling.ops.neighbor_search import search_exact
from tests.modeling.ops.test_box_tree import (
    KINDS,
    WHOLE,
    CachedSearch,
    assert_same,
    draw_positions,
    random_splits,
    search_in_loops,
)
from tests.support.tree_sizes import set_sizes_and_c

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(tree_library(torch.empty(0)) is None, reason="the C code needs a C compiler")

# An x86 processor also runs the code for the processors before it.
VARIANTS = {"native": (), "AVX2": ("-mno-avx512f",), "SSE2": ("-march=x86-64",)}


def small_library(monkeypatch, *flags, spare_leaves=256):
    """Return the C code with small blocks, and set the same sizes in Python."""
    set_sizes_and_c(monkeypatch, BLOCK=16, RECENT=32, SPARE_LEAVES=spare_leaves)
    library = compiled_library(TREE_SOURCE, *box_tree_cpu.TREE_FLAGS, *flags, functions=("search_tree", "crop_tree"))
    assert library is not None
    return library


@pytest.fixture
def library(monkeypatch):
    return small_library(monkeypatch)


def search_in_c(library, queries, keys, *sizes, limits=WHOLE):
    index = torch.arange(queries.shape[1]).expand(len(queries), -1)
    return search_tree_cpu(library, queries, index, keys, *sizes, *limits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_c_equals_the_loop(kind, variant, monkeypatch):
    flags = VARIANTS[variant] if platform.machine() in ("x86_64", "AMD64") else ()
    library = small_library(monkeypatch, *flags)
    choose = random.Random(kind + variant).choice
    for seed in range(4):
        shape = choose([1, 2]), choose([1, 40, 150, 260]), choose(range(1, 10))
        queries, keys = draw_positions(kind, shape, seed)
        sizes = choose(range(1, 41)), choose(range(10)), choose(range(1, 13))
        assert_same(search_in_c(library, queries, keys, *sizes), search_in_loops(queries, keys, *sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_c_equals_torch_in_deep_trees(kind, library):
    choose = random.Random(kind).choice
    for seed in range(6):
        shape = choose([1, 3]), choose([700, 1500]), choose([1, 2, 3, 4, 8, 9])
        queries, keys = draw_positions(kind, shape, seed)
        sizes = choose([1, 16, 17, 33]), choose([0, 5, 32]), choose([1, 4, 8, 9])
        index = torch.arange(shape[1]).expand(shape[0], -1)
        expected = search_tree_torch(queries, index, keys, *sizes, *WHOLE)
        assert_same(search_in_c(library, queries, keys, *sizes), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_c_equals_torch_with_the_sizes_of_the_model(kind):
    queries, keys = draw_positions(kind, (2, 1700, 4), seed=0)
    index = torch.arange(1700).expand(2, -1)
    expected = search_tree_torch(queries, index, keys, 16, 32, 8, *WHOLE)
    assert_same(search_in_c(tree_library(queries), queries, keys, 16, 32, 8), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_c_keeps_the_budget_of_leaves(kind, monkeypatch):
    library = small_library(monkeypatch, spare_leaves=1)
    queries, keys = draw_positions(kind, (1, 600, 2), seed=1)
    index = empty_tree_index("paged", 1, 600, 2, CPU)
    found = search_in_c(library, queries, keys, 5, 3, 4, limits=(None, None, index))
    assert_same(found, search_in_loops(queries, keys, 5, 3, 4))
    entered, leaves, pages, _ = index.counters[0].tolist()
    assert entered == tree_base(600 - 3)
    assert leaves <= box_tree.leaf_budget(entered) + box_tree.BLOCK
    assert pages <= index_shapes("paged", 600, 2)["pages"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_all_leaves_give_the_exact_neighbors(kind, library):
    queries, keys = draw_positions(kind, (2, 400, 3), seed=2)
    index = torch.arange(400).expand(2, -1)
    found = search_in_c(library, queries, keys, 16, 3, 400)
    assert_same(found, search_exact(queries, index, keys, 16, 3))


class CachedSearchInC(CachedSearch):
    def __init__(self, library, rows, capacity, position_dim, *sizes):
        super().__init__(rows, capacity, position_dim, *sizes)
        self.library = library
        self.index = empty_tree_index("paged", rows, capacity, position_dim, CPU)

    def search(self, *arguments):
        return search_tree_cpu(self.library, *arguments)

    def crop(self, lengths):
        self.past = torch.minimum(self.past, lengths)
        crop_tree_cpu(self.library, self.index, tree_base(self.past - self.window + 1))

    def check(self, queries, keys, counts):
        """Append, and compare the result with that of one call for the whole rows."""
        before, expected = self.past, search_in_c(self.library, queries, keys, *self.sizes)
        for row, found in enumerate(self.append(queries, keys, counts)):
            part = slice(int(before[row]), int(before[row] + counts[row]))
            assert_same(found, [x[row, part] for x in expected])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["steps", "random"])
def test_calls_with_an_index_equal_one_call(kind, split, library):
    lengths = [330, 400, 90]
    queries, keys = draw_positions(kind, (3, 400, 3), seed=5)
    search = CachedSearchInC(library, 3, 410, 3, 5, 3, 2)
    counts_per_call = {
        "steps": [(torch.tensor(lengths) > step).long() for step in range(400)],
        "random": list(random_splits(lengths, random.Random(kind).choice)),
    }
    expected = search_in_c(library, queries, keys, 5, 3, 2)
    for counts in counts_per_call[split]:
        before = search.past
        for row, found in enumerate(search.append(queries, keys, counts)):
            part = slice(int(before[row]), int(before[row] + counts[row]))
            assert_same(found, [x[row, part] for x in expected])
    assert search.past.tolist() == lengths


@pytest.mark.parametrize("kind", KINDS)
def test_calls_after_crops_equal_one_call(kind, library):
    choose = random.Random(kind).choice
    search = CachedSearchInC(library, 2, 700, 3, 6, 2, 3)
    _, keys = draw_positions(kind, (2, 700, 3), seed=6)
    cropped = rebuilt = False
    for round_number in range(20):
        queries, new_keys = draw_positions(kind, (2, 700, 3), seed=7 + round_number)
        keys = torch.where((torch.arange(700) < search.past[:, None])[..., None], keys, new_keys)
        search.check(queries, keys, torch.tensor([choose(range(min(180, 701 - n))) for n in search.past.tolist()]))
        entered = search.index.counters[:, 0].clone()
        search.crop(torch.tensor([max(0, n - choose(range(120))) for n in search.past.tolist()]))
        now = search.index.counters[:, 0]
        cropped |= bool(((now < entered) & (now > 0)).any())
        rebuilt |= bool(((now < entered) & (now == 0)).any())
    assert cropped or kind in ("one place", "two places")  # their trees have lost entities
    assert rebuilt or kind not in ("one place", "two places")


def test_repeated_crops_do_not_fill_the_index(library):
    queries, keys = draw_positions("clusters", (1, 500, 4), seed=8)
    search = CachedSearchInC(library, 1, 500, 4, 4, 0, 2)
    search.append(queries, keys, torch.tensor([400]))
    for seed in range(300):
        _, new_keys = draw_positions("clusters", (1, 500, 4), seed)
        keys = torch.cat([keys[:, :360], new_keys[:, 360:]], dim=1)
        search.crop(torch.tensor([360]))
        search.append(queries, keys, torch.tensor([100]))
    assert search.index.counters[0, 2] <= search.index.pages.shape[1]
    search.crop(torch.tensor([360]))
    search.check(queries, keys, torch.tensor([140]))


def test_padding_has_no_neighbors_and_changes_none(library):
    queries, keys = draw_positions("clusters", (3, 200, 3), seed=9)
    whole, counts = search_in_c(library, queries, keys, 5, 2, 3), torch.tensor([200, 0, 161])
    is_real = torch.arange(200) < counts[:, None]
    queries, keys = (x.masked_fill(~is_real[..., None], -9000) for x in (queries, keys))
    indices, squared = search_in_c(library, queries, keys, 5, 2, 3, limits=(None, counts, None))
    assert torch.equal(indices, whole[0].masked_fill(~is_real[..., None], -1))
    assert torch.equal(squared, whole[1].masked_fill(~is_real[..., None], 2**31 - 1))


@pytest.mark.parametrize("kind", ["clusters", "one place", "walk"])
def test_segments_are_sequences_of_their_own(kind, library):
    lengths = [190, 1, 3, 170, 36]
    queries, keys = draw_positions(kind, (1, 400, 2), seed=10)
    reach = torch.cat([torch.arange(length) for length in lengths])[None]
    indices, squared = search_in_c(library, queries, keys, 6, 1, 2, limits=(reach, None, None))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone, distances = search_in_c(library, queries[:, part], keys[:, part], 6, 1, 2)
        assert torch.equal(indices[:, part], torch.where(alone < 0, -1, alone + start))
        assert torch.equal(squared[:, part], distances)
        start += length
