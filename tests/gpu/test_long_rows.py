"""The Triton kernels on long rows. Requires a GPU."""

import pytest
import torch

from dfn_hf.modeling.ops.cell_grid import ball_cells_per_axis, geometric_cell_sizes
from dfn_hf.modeling.ops.cell_lists import CellGrids, grid_constants
from dfn_hf.modeling.ops.flow_attention import flow_attention
from dfn_hf.modeling.ops.neighbor_search import search_cells
from tests.modeling.ops.test_neighbor_search import assert_same, draw_positions

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="requires a GPU: the interpreter would take hours"
)

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
    """Return the results of the kernels on the GPU and of torch operations on the CPU."""
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
