"""Row layout: unpad, pad, positions and segment positions."""

import pytest
import torch

from dfn_hf.modeling.modules.row_layout import make_row_layout

CPU = torch.device("cpu")

MASKS = {
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
    "holes": [[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0]],
    "an empty row": [[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]],
}


@pytest.fixture(params=MASKS)
def mask(request):
    return torch.tensor(MASKS[request.param]).bool()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_unpad_keeps_the_order_and_pad_undoes_it(mask, trailing):
    columns = draw(2, 6, *trailing)
    rows = make_row_layout(2, 6, CPU, mask=mask)
    compact = rows.unpad(columns)
    for row in range(2):
        real = columns[row, mask[row]]
        assert torch.equal(compact[row, : len(real)], real)
        assert not compact[row, len(real) :].any()
    assert rows.lengths.tolist() == mask.sum(dim=1).tolist()
    expected = torch.where(mask.view(2, 6, *[1] * len(trailing)), columns, 0)
    assert torch.equal(rows.pad(compact), expected)


def test_padding_is_never_read(mask):
    columns = draw(2, 6, 3)
    columns[~mask] = float("nan")
    columns.requires_grad_()
    rows = make_row_layout(2, 6, CPU, mask=mask)
    compact = rows.unpad(columns)
    assert compact.isfinite().all()
    rows.pad(compact + 1).sum().backward()
    assert torch.equal(columns.grad, mask[..., None].expand(2, 6, 3).float())


@pytest.mark.parametrize("mask", [None, torch.ones(2, 6, dtype=torch.bool)])
def test_unpad_without_padding_returns_its_input(mask):
    rows = make_row_layout(2, 6, CPU, mask=mask)
    assert rows.mask is None and rows.order is None and rows.lengths is None
    columns = draw(2, 6, 3)
    assert rows.unpad(columns) is columns and rows.pad(columns) is columns
    assert rows.positions.tolist() == [list(range(6))] * 2
    assert torch.equal(rows.segment_positions, rows.positions)


def test_positions_continue_after_the_past(mask):
    aligned = make_row_layout(2, 6, CPU, mask=mask, aligned_past=4)
    assert aligned.positions.tolist() == [list(range(4, 10))] * 2
    ragged = make_row_layout(2, 6, CPU, mask=mask, past=torch.tensor([0, 7]), aligned_past=None)
    assert ragged.positions.tolist() == [list(range(6)), list(range(7, 13))]
    for rows in (aligned, ragged):
        assert torch.equal(rows.segment_positions, rows.positions)


def test_segment_positions_restart_with_each_segment():
    segments = torch.tensor([[5, 5, 5, 2, 2, 9], [0, 1, 1, 1, 1, 0]])
    rows = make_row_layout(2, 6, CPU, segment_ids=segments)
    assert rows.mask is None
    assert rows.segment_positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]]
    assert rows.segment.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 2]]


def test_negative_segments_and_masked_columns_are_padding():
    segments = torch.tensor([[-1, 3, -1, 3, 4, 4], [1, 1, 2, -5, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    rows = make_row_layout(2, 6, CPU, mask=mask, segment_ids=segments)
    assert rows.mask.tolist() == [[False, True, False, True, False, True], [True, True, True, False, True, True]]
    assert rows.lengths.tolist() == [3, 5]
    # Removing padding joins the parts of a segment.
    assert rows.segment_positions[0, :3].tolist() == [0, 1, 0] and rows.segment[0, :3].tolist() == [0, 0, 1]
    assert rows.segment_positions[1, :5].tolist() == [0, 1, 0, 1, 2] and rows.segment[1, :5].tolist() == [
        0,
        0,
        1,
        1,
        1,
    ]
