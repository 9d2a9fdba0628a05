"""`check_finite`: the three modes."""

import math

import pytest
import torch

from dfn_hf.modeling.liquid.finite_check import check_finite

BROKEN = torch.tensor([[1.0, math.nan], [math.inf, -2.0], [-math.inf, 0.0]])
WHOLE = torch.tensor([[1.0, -3e38], [0.0, 1e-40]])


def test_off_returns_the_input():
    assert check_finite(BROKEN, "off", "somewhere") is BROKEN


def test_zero_replaces_values_that_are_not_finite():
    found = check_finite(BROKEN, "zero", "somewhere")
    assert torch.equal(found, torch.tensor([[1.0, 0], [0, -2], [0, 0]]))


def test_zero_passes_gradients_of_finite_values_only():
    x = BROKEN.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(check_finite(x, "zero", "somewhere").sum(), x)
    assert torch.equal(gradient, BROKEN.isfinite().float())


def test_raise_names_sub_block_count_and_remedy():
    with pytest.raises(FloatingPointError) as error:
        check_finite(BROKEN, "raise", "decoder block 3, experts")
    for part in ("decoder block 3, experts: 3 of 6 values", "learning rate", "bfloat16", '`finite_check="zero"`'):
        assert part in str(error.value)


@pytest.mark.parametrize("mode", ["off", "zero", "raise"])
def test_finite_values_are_unchanged(mode):
    assert torch.equal(check_finite(WHOLE, mode, "somewhere"), WHOLE)
