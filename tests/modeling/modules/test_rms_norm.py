"""RMSNorm: its backward pass and its dtypes."""

import pytest
import torch
from torch.nn import functional as F

from dfn_hf.modeling.modules.rms_norm import RMSNorm


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 5, 8), (0, 4)])
def test_equals_torch_with_gradients(shape):
    torch.manual_seed(0)
    states = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(shape[-1], eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    towards = torch.randn(shape, dtype=torch.float64)
    found, expected = norm(states), F.rms_norm(states, shape[-1:], norm.weight, 1e-3)
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    for one, other in zip(
        torch.autograd.grad(found, [states, norm.weight], towards),
        torch.autograd.grad(expected, [states, norm.weight], towards),
        strict=True,
    ):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_bfloat16_is_computed_in_float32():
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    states = torch.randn(4, 16).bfloat16()
    expected = norm.bfloat16()(states.float()).bfloat16()
    assert torch.equal(norm(states), expected)


def test_gradient_does_not_depend_on_autocast():
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-6)
    states, towards = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    (expected,) = torch.autograd.grad(norm(states), states, towards)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(norm(states), states, towards)
    assert torch.equal(found, expected)


def test_zeros_stay_zero():
    states = torch.zeros(2, 8, requires_grad=True)
    normed = RMSNorm(8, eps=1e-6)(states)
    normed.sum().backward()
    assert not normed.any()
    assert states.grad.isfinite().all()
