"""Second derivatives against finite differences, and `torch.func` against separate calls."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dfn_hf import LiquidConfig, LiquidForSeq2SeqLM
from dfn_hf.modeling.modules.depthwise_conv import DepthwiseConv1d
from dfn_hf.modeling.modules.rms_norm import RMSNorm
from dfn_hf.modeling.ops.band import by_key, by_offset, key_blocks
from dfn_hf.modeling.ops.flow_attention import flow_attention, flow_attention_plain
from tests.modeling.ops.test_flow_attention import draw_inputs
from tests.support.families import FAMILIES, VOCABULARY, draw_ids, draw_model


def attention_case():
    inputs = draw_inputs(0, length=7, window=3, num_neighbors=2)
    tensors = [inputs.pop(name).detach().requires_grad_() for name in ("query", "key", "value", "decay")]
    return lambda *tensors: flow_attention(*tensors, **inputs), tensors


def conv_case():
    conv = DepthwiseConv1d(3, 2)
    return lambda x, weight: functional_call(conv, {"weight": weight}, x), [
        torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True),
    ]


def norm_case():
    norm = RMSNorm(4, 1e-6)
    return lambda x, weight: functional_call(norm, {"weight": weight}, x), [
        torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    ]


def band_case(function, *shape):
    return lambda: (function, [torch.randn(*shape, dtype=torch.float64, requires_grad=True)])


CASES = {
    "flow attention": attention_case,
    "depthwise convolution": conv_case,
    "RMS norm": norm_case,
    "by offset": band_case(by_offset, 2, 3, 5),
    "by key": band_case(by_key, 2, 3, 3),
    "pairs": band_case(lambda x: key_blocks(x, 2, 2), 2, 6, 3),
}
cases = pytest.mark.parametrize("name", CASES)


@cases
def test_first_and_second_derivatives(name):
    function, inputs = CASES[name]()
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@cases
def test_vmap_equals_separate_calls(name):
    function, inputs = CASES[name]()
    stacked = [torch.stack([x.detach(), 2 * x.detach()], dim=-1) for x in inputs]

    def total(*inputs):
        outputs = function(*inputs)
        return sum(x.square().sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))

    mapped = vmap(grad(total, argnums=tuple(range(len(inputs)))), in_dims=-1)(*stacked)
    for entry in range(2):
        expected = grad(total, argnums=tuple(range(len(inputs))))(*(x[..., entry] for x in stacked))
        for one, other in zip(mapped, expected, strict=True):
            torch.testing.assert_close(one[entry], other, atol=1e-12, rtol=0)


def test_plain_flow_attention_equals_the_fast_one():
    inputs = draw_inputs(1, length=40, past=(3, 0), window=5, num_neighbors=4, room=2)
    for one, other in zip(flow_attention(**inputs), flow_attention_plain(**inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_second_derivatives_with_dropout_are_refused():
    inputs = draw_inputs(1)
    query = inputs["query"].requires_grad_()
    y, _ = flow_attention(**inputs, dropout=0.5)
    (gradient,) = torch.autograd.grad(y.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_dropout=0"):
        torch.autograd.grad(gradient.square().sum(), query)


@sdpa_kernel(SDPBackend.MATH)  # torch's fused attention has no second derivative
@pytest.mark.parametrize("family", ["dfn", "flownetwork"])
def test_hessian_vector_product_of_a_model(family):
    model = draw_model(family, 3).eval()
    ids = draw_ids(2, 20, 0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    torch.manual_seed(0)
    direction = [torch.randn_like(weight) for weight in weights]

    def gradient(create_graph=False):
        logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        found = torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]

    product = sum((g * v).sum() for g, v in zip(gradient(create_graph=True), direction, strict=True))
    found = torch.autograd.grad(product, weights, allow_unused=True)
    step = 1e-6
    with torch.no_grad():
        for weight, v in zip(weights, direction, strict=True):
            weight.add_(step * v)
    above = gradient()
    with torch.no_grad():
        for weight, v in zip(weights, direction, strict=True):
            weight.sub_(2 * step * v)
    below = gradient()
    for one, more, less in zip(found, above, below, strict=True):
        expected = (more - less) / (2 * step)
        one = torch.zeros_like(expected) if one is None else one
        assert (one - expected).norm() <= 1e-5 * max(1.0, expected.norm())


def per_row_loss(model, buffers):
    def loss(weights, row):
        inputs = {"input_ids": row[None], "labels": row[None], "use_cache": False}
        return functional_call(model, {**weights, **buffers}, kwargs=inputs).loss

    return loss


def draw_liquid(**options):
    torch.manual_seed(0)
    config = LiquidConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **options)
    return LiquidForSeq2SeqLM(config).double()


MODELS = {name: lambda name=name: draw_model(name, 3) for name in FAMILIES}
MODELS |= {"liquid": draw_liquid, "liquid without LSTM": lambda: draw_liquid(lstm_hidden_size=0)}
UNMAPPED = {"dfn-adaptive": "entity_sampling", "liquid": "lstm_hidden_size=0"}


@pytest.mark.parametrize("name", MODELS)
def test_per_row_gradients(name):
    model = MODELS[name]().eval()
    ids = draw_ids(3, 20, 0)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    loss = per_row_loss(model, dict(model.named_buffers()))
    expected = []
    for row in ids:
        model.zero_grad()
        loss(dict(model.named_parameters()), row).backward()
        found = grad(loss)(weights, row)
        expected.append(
            {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in model.named_parameters()}
        )
        for weight, gradient in expected[-1].items():
            torch.testing.assert_close(found[weight], gradient, atol=1e-12, rtol=0)
    mapped = vmap(grad(loss), in_dims=(None, 0))
    if name in UNMAPPED:
        with pytest.raises(RuntimeError, match=UNMAPPED[name]):
            mapped(weights, ids)
        return
    for weight, found in mapped(weights, ids).items():
        torch.testing.assert_close(found, torch.stack([each[weight] for each in expected]), atol=1e-12, rtol=0)


def test_forward_mode_names_the_operator():
    function, inputs = attention_case()
    inputs = tuple(x.detach() for x in inputs)
    with pytest.raises(RuntimeError, match="FlowAttention has no forward-mode derivative"):
        jvp(function, inputs, inputs)
