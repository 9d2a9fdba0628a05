"""Tests that `torch.compile` preserves generated tokens, loss and gradients."""

import pytest
import torch

from tests.support.marks import first_quickly
from tests.support.small_models import make_small_model

FAMILIES = first_quickly(["dfn", "flownetwork", "dfn-adaptive", "liquid"], 2)
BACKENDS = first_quickly(["aot_eager", "inductor"])  # the second compiles C++


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch._dynamo.reset()

    def test_generated_tokens(self, family, backend):
        model = make_small_model(family, num_hidden_layers=1)
        ids = torch.randint(3, 50, (2, 9))
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
        model.forward = torch.compile(model.forward, backend=backend)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)

    def test_loss_and_gradients(self, family, backend):
        # In float64, because gradients amplify rounding differences. Rotations and the loss are in float32.
        model = make_small_model(family, num_hidden_layers=1).double()
        ids = torch.randint(3, 50, (2, 21))
        losses, gradients = [], []
        for forward in (model, torch.compile(model, backend=backend)):
            model.zero_grad()
            loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
        assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
        for name, gradient in gradients[0].items():
            bound = 1e-6 * max(1, float(gradient.abs().max()))
            assert torch.allclose(gradients[1][name], gradient, rtol=0, atol=bound), name
