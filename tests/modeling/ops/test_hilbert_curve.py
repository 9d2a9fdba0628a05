"""The Hilbert curve visits every cell once, and consecutive cells are adjacent."""

import pytest
import torch

from dfn_hf.modeling.ops.hilbert_curve import LAST_KEY, Box, hilbert_keys


@pytest.mark.parametrize(("axes", "bits"), [(1, 6), (2, 5), (3, 3), (4, 2), (5, 1)])
def test_curve_visits_every_cell_and_consecutive_cells_are_adjacent(axes, bits):
    cells = torch.cartesian_prod(*[torch.arange(2**bits)] * axes).view(-1, axes)
    keys = hilbert_keys(cells, bits)
    ordered, order = keys.sort()
    assert torch.equal(ordered, torch.arange(2 ** (axes * bits)))
    assert (cells[order].diff(dim=0).abs().sum(dim=-1) == 1).all()


def test_one_axis_keeps_its_order():
    places = torch.rand(1, 100, 1, dtype=torch.float64)
    keys = Box.around(places, torch.ones(1, 100, dtype=torch.bool)).keys(places)
    assert torch.equal(keys.argsort(), places[..., 0].argsort())


@pytest.mark.parametrize("side", [7, 16, 30])
def test_steps_on_a_grid_are_short(side):
    axis = torch.linspace(-1, 1, side)
    places = torch.cartesian_prod(axis, axis)[None]
    keys = Box.around(places, torch.ones(1, side**2, dtype=torch.bool)).keys(places)
    assert keys.unique().numel() == side**2
    steps = places[0, keys[0].argsort()].diff(dim=0).norm(dim=-1) * (side - 1) / 2
    assert steps.mean() < 1.2


def test_box_ignores_padding_and_other_rows():
    torch.manual_seed(0)
    places = torch.randn(2, 9, 3, dtype=torch.float64)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, 4:] = False
    both = Box.around(places, real)
    for row in range(2):
        alone = places[row : row + 1, real[row]]
        box = Box.around(alone, torch.ones(alone.shape[:2], dtype=torch.bool))
        for shift in (0.0, 1 / 3):
            assert torch.equal(both.keys(places, shift)[row, real[row]], box.keys(alone, shift)[0])
    assert both.keys(places).max() < LAST_KEY


def test_box_of_equal_points():
    places = torch.full((1, 3, 2), 0.25)
    keys = Box.around(places, torch.ones(1, 3, dtype=torch.bool)).keys(places)
    assert (keys == 0).all()


def test_point_outside_has_the_key_of_the_nearest_point_inside():
    places = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    box = Box.around(places, torch.ones(1, 2, dtype=torch.bool))
    outside = torch.tensor([[[-3.0, 0.5], [0.2, 9.0]]])
    assert torch.equal(box.keys(outside), box.keys(outside.clamp(0, 1)))
