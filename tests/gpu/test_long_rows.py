"""The Triton kernels on long rows. Requires a GPU."""

import pytest
import torch

from dfn_hf.modeling.ops.box_tree import BLOCK, RECENT, empty_tree_index
from dfn_hf.modeling.ops.flow_attention import flow_attention
from dfn_hf.modeling.ops.neighbor_search import search_tree
from tests.modeling.ops.test_box_tree import draw_positions

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="requires a GPU: the interpreter would take hours"
)

LENGTH, HEADS, POSITION_DIM, NUM_NEIGHBORS, WINDOW = 50_001, 4, 4, 16, 32
SEARCH = (NUM_NEIGHBORS, WINDOW, 8)


def search(queries, keys, **options):
    index = torch.arange(queries.shape[1], device=queries.device).expand(len(queries), -1)
    return search_tree(queries, index, keys, *SEARCH, **options)


def assert_same(found, expected):
    assert all(map(torch.equal, (x.cpu() for x in found), (x.cpu() for x in expected)))


@pytest.mark.parametrize("kind", ["uniform", "clusters", "one place", "drift on one axis", "walk"])
def test_neighbours_are_those_of_the_cpu(kind):
    queries, keys = draw_positions(kind, (HEADS, 15_001, POSITION_DIM), seed=0)
    assert_same(search(queries.cuda(), keys.cuda()), search(queries, keys))


@pytest.mark.parametrize("position_dim", [1, 4, 9])
def test_a_long_row_and_its_segments(position_dim):
    queries, keys = draw_positions("clusters", (1, LENGTH, position_dim), seed=1)
    reach = torch.arange(LENGTH)[None] % 9_999
    assert_same(search(queries.cuda(), keys.cuda()), search(queries, keys))
    assert_same(search(queries.cuda(), keys.cuda(), reach=reach.cuda()), search(queries, keys, reach=reach))


def test_chunks_of_ragged_rows():
    queries, keys = (x.cuda() for x in draw_positions("walk", (3, 6_000, POSITION_DIM), seed=2))
    expected = search(queries, keys)
    index = empty_tree_index("flat", 3, 6_000, POSITION_DIM, queries.device)
    past = torch.zeros(3, dtype=torch.int64, device=queries.device)
    for counts in ([1_500, 900, 10], [1, 1, 1], [700, 0, 3_000], [3_799, 5_099, 2_989]):
        counts = torch.tensor(counts, device=queries.device)
        place = past[:, None] + torch.arange(int(counts.max()), device=queries.device)
        part = queries.gather(1, place.clamp(max=5_999)[..., None].expand(-1, -1, POSITION_DIM))
        found = search_tree(part, place, keys, *SEARCH, counts=counts, index=index)
        for row, (first, count) in enumerate(zip(past.tolist(), counts.tolist(), strict=True)):
            assert_same([x[row, :count] for x in found], [x[row, first : first + count] for x in expected])
        past = past + counts
    assert past.tolist() == [6_000] * 3


def test_steps_in_a_cuda_graph():
    length, first = RECENT + 6 * BLOCK, RECENT + 2 * BLOCK
    queries, keys = (x.cuda() for x in draw_positions("clusters", (HEADS, length, POSITION_DIM), seed=3))
    expected = search(queries, keys)
    index = empty_tree_index("flat", HEADS, length, POSITION_DIM, queries.device)
    query, position = queries[:, first : first + 1].clone(), torch.full((HEADS, 1), first, device=queries.device)

    def step():
        return search_tree(query, position, keys, *SEARCH, index=index)

    step()  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for i in range(first, length):
        if i == length - 100:
            index.counters.zero_()  # as after a crop: the next step builds the trees again
        query.copy_(queries[:, i : i + 1])
        position.fill_(i)
        graph.replay()
        assert_same(found, [x[:, i : i + 1] for x in expected])


def on_gpu_and_without(monkeypatch, function, *tensors):
    """Return the results of the kernels on the GPU and of torch operations on the CPU."""
    found = function(*(x.cuda() for x in tensors))
    monkeypatch.setenv("DFN_HF_KERNELS", "0")
    return [x.cpu() for x in found], function(*tensors)


def draw_attention(value_dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, LENGTH, POSITION_DIM + 1)
    query, key = (torch.randn(shape, generator=generator) for _ in range(2))
    value, grad = (torch.randn(1, HEADS, LENGTH, 64, generator=generator).to(value_dtype) for _ in range(2))
    index = torch.arange(LENGTH)[None]
    # A few entities are neighbours of many.
    neighbors = (torch.rand(1, HEADS, LENGTH, NUM_NEIGHBORS, generator=generator) ** 4 * index[..., None]).long()
    neighbors = neighbors.masked_fill(neighbors > index[..., None] - WINDOW, -1)
    return query, key, value, torch.rand(HEADS, generator=generator), index, index % 9_999, neighbors, grad


def read_and_gradients(query, key, value, decay, index, reach, neighbors, grad):
    inputs = [x.detach().requires_grad_() for x in (query, key, value, decay)]
    y, lse = flow_attention(*inputs, index, reach, neighbors, WINDOW)
    return y, lse, *torch.autograd.grad([y, lse], inputs, [grad, torch.ones_like(lse)])


@pytest.mark.parametrize(("value_dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_attention_is_that_of_torch(value_dtype, tolerance, monkeypatch):
    found, expected = on_gpu_and_without(monkeypatch, read_and_gradients, *draw_attention(value_dtype))
    for x, wanted in zip(found, expected, strict=True):
        assert (x - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


def test_deterministic_gradients_are_reproducible():
    inputs = [x.cuda() for x in draw_attention(torch.bfloat16)]
    torch.use_deterministic_algorithms(True)
    try:
        found, again = (read_and_gradients(*inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, again))
