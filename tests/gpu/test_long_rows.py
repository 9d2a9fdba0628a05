"""The Triton kernels on rows of a length that only a GPU gets through."""

import pytest
import torch

from dfn_hf.modeling.ops.cell_grid import ball_cells_per_axis, geometric_cell_sizes
from dfn_hf.modeling.ops.cell_lists import CellGrids, grid_constants
from dfn_hf.modeling.ops.flow_attention import flow_attention
from dfn_hf.modeling.ops.neighbor_search import search_cells
from tests.modeling.ops.test_neighbor_search import assert_same, draw_positions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels' interpreter takes hours for these")

LENGTH, HEADS, POSITION_DIM, NUM_NEIGHBORS, WINDOW, NUM_TABLES, CANDIDATES = 50_001, 4, 4, 16, 32, 16, 8


def search(queries, keys, **options):
    sizes = geometric_cell_sizes(NUM_TABLES)
    constants = (x.to(queries.device) for x in grid_constants(POSITION_DIM, NUM_TABLES, 0))
    grids = CellGrids(*constants, sizes, ball_cells_per_axis(POSITION_DIM, sizes))
    query_cells, key_cells = (grids.cells(x, on_grid=True) for x in (queries, keys))
    index = torch.arange(LENGTH, device=queries.device).expand(HEADS, -1)
    return search_cells(
        queries, query_cells, index, keys, key_cells, NUM_NEIGHBORS, WINDOW, CANDIDATES, reach=index % 9_999,
        table_offsets=grids.table_offsets,
    )  # fmt: skip


def on_gpu_and_without(monkeypatch, function, *tensors):
    """What the kernels give and what torch does on the CPU."""
    found = function(*(x.cuda() for x in tensors))
    monkeypatch.setenv("DFN_HF_KERNELS", "0")
    return [x.cpu() for x in found], function(*tensors)


@pytest.mark.parametrize("kind", ["spread", "few"])
def test_neighbours_are_those_of_torch(kind, monkeypatch):
    positions = draw_positions((HEADS, LENGTH, POSITION_DIM), 0, kind=kind)
    assert_same(*on_gpu_and_without(monkeypatch, search, *positions))


def draw_attention(value_dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, LENGTH, POSITION_DIM + 1)
    query, key = (torch.randn(shape, generator=generator) for _ in range(2))
    value, grad = (torch.randn(1, HEADS, LENGTH, 64, generator=generator).to(value_dtype) for _ in range(2))
    index = torch.arange(LENGTH)[None]
    # A few entities are read by very many.
    neighbors = (torch.rand(1, HEADS, LENGTH, NUM_NEIGHBORS, generator=generator) ** 4 * index[..., None]).long()
    neighbors = neighbors.masked_fill(neighbors > index[..., None] - WINDOW, -1)
    return query, key, value, torch.rand(HEADS, generator=generator), index, index % 9_999, neighbors, grad


def read_and_gradients(query, key, value, fading, index, reach, neighbors, grad):
    inputs = [x.detach().requires_grad_() for x in (query, key, value, fading)]
    y, total = flow_attention(*inputs, index, reach, neighbors, WINDOW)
    return y, total, *torch.autograd.grad([y, total], inputs, [grad, torch.ones_like(total)])


@pytest.mark.parametrize(("value_dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_attention_is_that_of_torch(value_dtype, tolerance, monkeypatch):
    found, expected = on_gpu_and_without(monkeypatch, read_and_gradients, *draw_attention(value_dtype))
    for x, wanted in zip(found, expected, strict=True):
        assert (x - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


def test_deterministic_gradients_are_the_same_bits_each_time():
    inputs = [x.cuda() for x in draw_attention(torch.bfloat16)]
    torch.use_deterministic_algorithms(True)
    try:
        found, again = (read_and_gradients(*inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, again))
