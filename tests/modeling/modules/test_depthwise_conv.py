"""The depthwise convolution against torch's."""

import pytest
import torch
from torch import nn

from dfn_hf.modeling.modules import depthwise_conv
from dfn_hf.modeling.modules.depthwise_conv import DepthwiseConv1d

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batch", "length", "kernel_size"), [(1, 1, 1), (2, 4, 4), (3, 61, 4), (1, 50, 7)])
def test_equals_the_convolution_of_torch(dtype, batch, length, kernel_size, monkeypatch):
    monkeypatch.setattr(depthwise_conv, "POSITION_CHUNK", 20)
    torch.manual_seed(0)
    ours = DepthwiseConv1d(5, kernel_size).to(dtype)
    torchs = nn.Conv1d(5, 5, kernel_size, groups=5, bias=False).double()
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(batch, 5, length).to(dtype)
    results = []
    for conv, inputs in ((ours, x.clone().requires_grad_()), (torchs, x.double().requires_grad_())):
        y = conv(inputs)
        (y.double() * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        results.append((y, inputs.grad, conv.weight.grad))
    assert results[0][0].dtype == dtype
    for found, expected in zip(*results, strict=True):
        scale = expected.abs().max().clamp(min=1)
        assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * scale
