"""Experts and router against a loop over tokens and experts; effect of the router loss."""

import math

import pytest
import torch

from dfn_hf import LiquidConfig, MoELayer
from dfn_hf.modeling.modules.row_layout import make_row_layout

CPU = torch.device("cpu")
SIZE = 8
STRICT = {"atol": 1e-10, "rtol": 0}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(num_experts=5, num_experts_per_tok=2, experts_implementation="eager", **fields):
    fields = {"moe_intermediate_size": 12, "router_entropy_coef": 0.7, "router_aux_loss_coef": 0.3, **fields}
    config = LiquidConfig(
        hidden_size=SIZE,
        num_attention_heads=1,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        experts_implementation=experts_implementation,
        **fields,
    )
    torch.manual_seed(0)
    layer = MoELayer(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    return layer.double()


def run(layer, x, lengths=None):
    mask = None if lengths is None else torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
    return layer(x, make_row_layout(*x.shape[:2], CPU, mask=mask))


def entropy(probability):
    return -sum(p * math.log(p) for p in probability.tolist() if p > 0)


def route_by_loop(layer, entity):
    """Return the weights of the experts that one entity `[D]` uses, and the probabilities of all experts."""
    config = layer.config
    probability = (layer.gate.weight @ entity + layer.gate.bias).softmax(dim=0)
    count = config.num_experts_per_tok
    if config.dynamic_experts and config.num_experts > 1:
        doubt = entropy(probability) / math.log(config.num_experts)
        count = max(1, min(config.num_experts, math.floor(count * (1 + doubt) + 1e-6)))
    chosen = sorted(range(config.num_experts), key=lambda expert: -probability[expert].item())[:count]
    total = sum(probability[expert] for expert in chosen) if config.normalize_expert_weights else 1
    return {expert: probability[expert] / total for expert in chosen}, probability


def expert_by_loop(experts, number, entity):
    inner = experts.up_proj[number] @ entity + experts.up_proj_bias[number]
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return experts.down_proj[number] @ inner + experts.down_proj_bias[number]


def mix_by_loop(layer, row):
    """Mix experts for one row `[length, D]`."""
    outputs = []
    for entity in row:
        weights, _ = route_by_loop(layer, entity)
        outputs.append(sum(weight * expert_by_loop(layer.experts, j, entity) for j, weight in weights.items()))
    return torch.stack(outputs)


def loss_by_loop(layer, row):
    """Compute the router loss of one row `[length, D]`; the load has the gradient of the mean probability."""
    config = layer.config
    routes = [route_by_loop(layer, entity) for entity in row]
    mean = sum(probability for _, probability in routes) / len(row)
    loss = config.router_entropy_coef * (math.log(config.num_experts) + (mean * mean.log()).sum())
    for expert in range(config.num_experts):
        load = sum(expert in weights for weights, _ in routes) / len(row)
        if load > config.max_expert_load:
            straight_through = load + mean[expert] - mean[expert].detach()
            loss = loss + config.router_aux_loss_coef * (straight_through - config.max_expert_load)
    return loss


SETTINGS = {
    "one of five": {"num_experts_per_tok": 1},
    "two of five": {},
    "four of five": {"num_experts_per_tok": 4},
    "all": {"num_experts_per_tok": 5},
    "a fixed number": {"dynamic_experts": False},
    "not normalised": {"normalize_expert_weights": False},
    "two": {"num_experts": 2, "num_experts_per_tok": 1},
    "one": {"num_experts": 1, "num_experts_per_tok": 1},
}
settings = pytest.mark.parametrize("setting", SETTINGS)


# Outputs


@settings
def test_equals_the_loop(setting):
    layer, x = make_layer(**SETTINGS[setting]), draw(2, 13, SIZE)
    with torch.no_grad():
        y, _, routing = run(layer, x)
        assert torch.allclose(y, torch.stack([mix_by_loop(layer, row) for row in x]), **STRICT)
        assert torch.allclose(routing.logits, layer.gate(x), **STRICT)
        for row in range(2):
            for i in range(13):
                weights, _ = route_by_loop(layer, x[row, i])
                used = routing.weights[row, i] > 0
                assert routing.index[row, i, used].tolist() == list(weights)
                assert torch.allclose(routing.weights[row, i, used], torch.stack(list(weights.values())), **STRICT)


@settings
def test_gradients_equal_those_of_the_loop(setting):
    layer, x = make_layer(**SETTINGS[setting]), draw(2, 13, SIZE).requires_grad_()
    scale, wanted = draw(2, 13, SIZE, seed=1), [x, *layer.experts.parameters()]
    if layer.config.num_experts > 1:
        wanted += layer.gate.parameters()
    y = run(layer, x)[0], torch.stack([mix_by_loop(layer, row) for row in x])
    for one, other in zip(*(torch.autograd.grad((one * scale).sum(), wanted) for one in y), strict=True):
        assert torch.allclose(one, other, **STRICT)


def outputs_and_gradients(layer, x):
    x = x.detach().requires_grad_()
    y, loss, _ = run(layer, x, lengths=[x.shape[1], 9])
    scale = draw(*y.shape, seed=1).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * scale).sum() + loss.sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("setting", ["one of five", "two of five", "all", "one"])
@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [("batched_mm", torch.float64, 1e-10), ("grouped_mm", torch.float32, 2e-6)],  # there is no float64 kernel
)
def test_implementations_are_equal(implementation, dtype, tolerance, setting):
    results = []
    for name in ("eager", implementation):
        layer = make_layer(experts_implementation=name, **SETTINGS[setting]).to(dtype)
        assert layer.config._experts_implementation == name
        results.append(outputs_and_gradients(layer, draw(2, 13, SIZE).to(dtype)))
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1)


def test_every_expert_and_the_gate_have_a_gradient():
    layer = make_layer()
    y, _, _ = run(layer, draw(2, 40, SIZE))
    (y * draw(*y.shape, seed=1)).sum().backward()
    for parameter in layer.parameters():
        of_each_expert = parameter.grad.reshape(5, -1)
        assert of_each_expert.abs().amax(dim=1).min() > 1e-4


# Number of experts


def set_gate(layer, logits):
    """Set equal logits for all entities."""
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.copy_(torch.tensor(logits))
    return layer


@pytest.mark.parametrize("num_experts_per_tok", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_number_of_experts_at_lowest_and_highest_entropy(num_experts_per_tok, dtype):
    layer, x = make_layer(num_experts_per_tok=num_experts_per_tok).to(dtype), draw(2, 4, SIZE).to(dtype)
    _, _, sure = run(set_gate(layer, [0.0, 0, 60, 0, 0]), x)
    columns = min(5, 2 * num_experts_per_tok)
    assert sure.index.shape[-1] == columns and (sure.index[..., 0] == 2).all()
    assert ((sure.weights > 0).sum(dim=-1) == num_experts_per_tok).all()
    _, _, unsure = run(set_gate(layer, [1.0] * 5), x)
    assert ((unsure.weights > 0).sum(dim=-1) == columns).all()
    assert torch.allclose(unsure.weights, torch.ones(()).to(dtype) / columns)


def test_number_of_experts_grows_with_entropy():
    layer, x = make_layer(num_experts_per_tok=2), draw(1, 1, SIZE)
    counts = []
    for logit in (20.0, 4.0, 1.5, 0.0):
        counts.append(int((run(set_gate(layer, [logit, 0, 0, 0, 0]), x)[2].weights > 0).sum()))
    assert counts == sorted(counts) and counts[0] == 2 and counts[-1] == 4 and 3 in counts


def test_static_number_of_experts():
    layer = make_layer(dynamic_experts=False)
    _, _, routing = run(set_gate(layer, [1.0] * 5), draw(2, 4, SIZE))
    assert routing.index.shape[-1] == 2 and (routing.weights > 0).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_sum_to_1_if_normalized(normalize):
    layer, x = make_layer(normalize_expert_weights=normalize), draw(2, 13, SIZE)
    _, _, routing = run(layer, x)
    used = routing.weights > 0
    total = routing.weights.sum(dim=-1)
    assert (used.sum(dim=-1) < routing.index.shape[-1]).any()
    if normalize:
        assert torch.allclose(total, torch.ones(()).double(), **STRICT)
    else:
        probability = routing.logits.softmax(dim=-1).gather(-1, routing.index)
        assert torch.equal(routing.weights[used], probability[used]) and (total < 1 - 1e-6).all()


# Padding


def test_padding_is_not_routed():
    layer, x = make_layer(), draw(3, 13, SIZE)
    lengths = [13, 5, 0]
    y, loss, routing = run(layer, x, lengths)
    for row, length in enumerate(lengths):
        assert not routing.weights[row, length:].any() and not y[row, length:].any()
        if length:
            alone, its_loss, _ = run(layer, x[row : row + 1, :length])
            assert torch.allclose(y[row, :length], alone[0], **STRICT)
            assert torch.allclose(loss[row], its_loss[0], **STRICT)
    assert loss[2] == 0 and loss[:2].all()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_padding_has_no_gradient(implementation):
    layer = make_layer(experts_implementation=implementation).float()
    x = draw(3, 13, SIZE).float().requires_grad_()
    y, loss, _ = run(layer, x, [13, 5, 0])
    (gradient,) = torch.autograd.grad(1e6 * y.sum() + loss.sum(), x)
    assert gradient.isfinite().all()
    assert gradient[1, :5].any() and not gradient[1, 5:].any() and not gradient[2].any()


# Router loss


@settings
def test_loss_equals_the_loop(setting):
    layer, x = make_layer(**SETTINGS[setting]), draw(3, 13, SIZE)
    lengths = [13, 1, 6]
    _, loss, _ = run(layer, x, lengths)
    expected = torch.stack([loss_by_loop(layer, row[:length]) for row, length in zip(x, lengths, strict=True)])
    assert torch.allclose(loss, expected, **STRICT)
    found, wanted = (torch.autograd.grad(one.sum(), list(layer.gate.parameters())) for one in (loss, expected))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, **STRICT)
        assert layer.config.num_experts == 1 or one.any()


def test_balanced_load_has_a_lower_loss():
    layer = make_layer(num_experts=4, num_experts_per_tok=1)
    with torch.no_grad():
        layer.gate.weight.copy_(20 * torch.eye(4, SIZE))
        layer.gate.bias.zero_()
    experts = torch.tensor([[0, 1, 2, 3] * 3, [0, 0, 0, 1] * 3, [0] * 12])
    _, loss, _ = run(layer, torch.nn.functional.one_hot(experts, SIZE).double())
    assert abs(loss[0]) < 1e-6 and loss[0] + 0.1 < loss[1] and loss[1] + 0.1 < loss[2]
    assert loss[2].item() == pytest.approx(0.7 * math.log(4) + 0.3 * (1 - 1.5 / 4), abs=1e-5)


@pytest.mark.parametrize("term", ["router_entropy_coef", "router_aux_loss_coef"])
def test_training_on_each_term_balances_the_load(term):
    layer = make_layer(**{"num_experts_per_tok": 1, "router_entropy_coef": 0, "router_aux_loss_coef": 0, term: 1.0})
    with torch.no_grad():
        layer.gate.weight *= 0.1
        layer.gate.bias.copy_(torch.tensor([1.0, 0, 0, 0, 0]))
    x, optimizer = draw(4, 30, SIZE), torch.optim.SGD(layer.gate.parameters(), lr=0.5)

    def highest_load():
        _, loss, routing = run(layer, x)
        return loss.mean(), max(float((routing.index[..., 0] == expert).double().mean()) for expert in range(5))

    first_loss, first_load = highest_load()
    for _ in range(40):
        optimizer.zero_grad()
        highest_load()[0].backward()
        optimizer.step()
    last_loss, last_load = highest_load()
    assert first_load > 0.9 and last_load < 0.5 and last_loss < 0.5 * first_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_any_scale_have_finite_gradients(dtype):
    layer = set_gate(make_layer(), [0.0, 0, 2000, -2000, 0]).to(dtype)
    x = draw(2, 5, SIZE).to(dtype).requires_grad_()
    y, loss, _ = run(layer, x, [5, 3])
    (y.sum() + loss.sum()).backward()
    assert y.isfinite().all() and loss.isfinite().all() and x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_router_is_at_least_float32():
    layer, x = make_layer().bfloat16(), draw(2, 5, SIZE).bfloat16()
    y, loss, routing = run(layer, x)
    assert y.dtype == torch.bfloat16
    assert loss.dtype == routing.logits.dtype == routing.weights.dtype == torch.float32


def test_autocast_does_not_affect_the_router():
    layer, x = make_layer().float(), draw(2, 5, SIZE).float()
    _, expected, routing = run(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        y, loss, same = run(layer, x)
    assert torch.equal(same.logits, routing.logits) and torch.equal(same.index, routing.index)
    assert torch.equal(loss, expected) and y.isfinite().all()
