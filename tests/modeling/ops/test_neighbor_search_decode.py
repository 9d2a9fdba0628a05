"""A decode step returns the lists and the chains of `search_cells` bit for bit."""

import pytest
import torch

from dfn_hf.modeling.ops.cell_grid import ball_cells_per_axis
from dfn_hf.modeling.ops.cell_lists import CellChains, CellGrids, grid_constants
from dfn_hf.modeling.ops.neighbor_search import search_cells
from dfn_hf.modeling.ops.neighbor_search_decode import search_step

ROWS, LENGTH = 3, 60


def draw_positions(generator, position_dim, dtype):
    """Draw positions `[G, N, P]` on a coarse grid, so that there are many ties and duplicates."""
    positions = torch.randn(ROWS, LENGTH, position_dim, generator=generator, dtype=torch.float64)
    return ((positions * 2).round() / 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reach", [None, 13])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("position_dim", "num_neighbors", "window", "candidates", "sizes"),
    [
        (1, 1, 1, 1, [2.0]),
        (2, 5, 4, 3, [4.0, 2.0, 1.0]),
        (4, 16, 8, 8, [8.0, 4.0, 2.0, 1.0]),
        (2, 30, 2, 4, [4.0, 1.0]),
    ],
)
def test_lists_and_chains(position_dim, num_neighbors, window, candidates, sizes, padded, reach, dtype):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (draw_positions(generator, position_dim, dtype) for _ in range(2))
    constants = grid_constants(position_dim, len(sizes), 0)
    grids = CellGrids(*constants, sizes, ball_cells_per_axis(position_dim, sizes))
    query_cells, key_cells = grids.cells(queries), grids.cells(keys)
    both = [
        CellChains(
            torch.full((ROWS, grids.table_offsets[-1]), -1, dtype=torch.int32),
            torch.full((ROWS, LENGTH, len(sizes)), -1, dtype=torch.int32),
            grids.table_offsets,
        )
        for _ in range(2)
    ]
    rows, index = torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    found_any = False
    for step in range(LENGTH):
        counts = torch.randint(2, (ROWS,), generator=generator) if padded else None
        call = (queries[rows, index][:, None], query_cells[rows, index][:, None], index[:, None], keys, key_cells)
        call += (num_neighbors, window, candidates)
        seen = None if reach is None else index[:, None].clamp(max=reach)
        first_slots = grids.make_constants()[-1]
        results = (
            search_cells(*call, chains=both[0], reach=seen, counts=counts),
            search_step(*call, both[1].newest, both[1].links, first_slots, reach=seen, counts=counts),
        )
        for expected, result in zip(*results, strict=True):
            assert result.dtype == expected.dtype and torch.equal(result, expected), step
        assert torch.equal(both[1].newest, both[0].newest) and torch.equal(both[1].links, both[0].links)
        found_any |= bool((results[1][0] >= 0).any())
        index = index + (1 if counts is None else counts)
    assert found_any
