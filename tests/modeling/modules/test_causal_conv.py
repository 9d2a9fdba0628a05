"""The short causal convolution against nn.Conv1d, across segments and calls."""

import pytest
import torch
from torch import nn

from dfn_hf.modeling.modules.cache import FlowCacheLayer
from dfn_hf.modeling.modules.causal_conv import CausalConv
from dfn_hf.modeling.modules.row_layout import make_row_layout

CPU = torch.device("cpu")
CHANNELS = 3


@pytest.fixture(params=[1, 2, 4])
def conv(request):
    torch.manual_seed(request.param)
    return CausalConv(CHANNELS, request.param).double()


def convolved_alone(conv, x):
    """Convolve one segment `[length, channels]` with a padded nn.Conv1d."""
    kernel = conv.kernel_size
    plain = nn.Conv1d(CHANNELS, CHANNELS, kernel, groups=CHANNELS, padding=kernel - 1, bias=False).double()
    plain.load_state_dict(conv.conv.state_dict())
    return plain(x.T[None])[0, :, : len(x)].T


def draw(batch, length):
    x = torch.randn(batch, length, CHANNELS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.requires_grad_()


@pytest.mark.parametrize("length", [1, 2, 17])
def test_equals_a_left_padded_convolution(conv, length):
    x = draw(2, length)
    y = conv(x, make_row_layout(2, length, CPU))
    assert y.shape == x.shape
    for row in range(2):
        assert torch.allclose(y[row], convolved_alone(conv, x[row]), atol=1e-12)


def test_segments_are_convolved_separately(conv):
    segments = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 3], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    x = draw(2, 10)
    y = conv(x, make_row_layout(2, 10, CPU, segment_ids=segments))
    pieces = [convolved_alone(conv, piece) for piece in x[0].split([3, 1, 5, 1])] + [convolved_alone(conv, x[1])]
    expected = torch.cat(pieces).view(2, 10, CHANNELS)
    assert torch.allclose(y, expected, atol=1e-12)
    found, wanted = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("counts_per_call", [[[1, 1]] * 9, [[4, 4], [5, 5]], [[3, 0], [0, 5], [1, 1], [5, 3]]])
def test_calls_with_a_cache_equal_one_call(conv, counts_per_call):
    x = draw(2, 9).detach()
    whole = conv(x, make_row_layout(2, 9, CPU))
    state, done = FlowCacheLayer(), [0, 0]
    for counts in counts_per_call:
        width = max(counts)
        mask = torch.arange(width) < torch.tensor(counts)[:, None]
        state.start_forward(2, width, CPU)
        rows = make_row_layout(2, width, CPU, mask=mask, past=state.lengths, aligned_past=state.aligned)
        state.set_layout(rows)
        new = torch.zeros(2, width, CHANNELS, dtype=x.dtype)
        for row, count in enumerate(counts):
            new[row, :count] = x[row, done[row] : done[row] + count]
        y = conv(new, rows, state)
        state.finish_forward()
        for row, count in enumerate(counts):
            assert torch.allclose(y[row, :count], whole[row, done[row] : done[row] + count], atol=1e-12)
            done[row] += count
    assert done == [9, 9]
