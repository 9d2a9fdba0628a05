"""API of the FlowNetwork paper: quick start, validation, and equality with the underlying causal model."""

import logging

import pytest
import torch

from dfn_hf import EnhancedFlowLayer, FlowNetworkForCausalLM, safe_tensor_to_int
from dfn_hf.modeling.flownetwork import configuration_flownetwork
from dfn_hf.modeling.flownetwork import paper_api as flownetwork

VOCABULARY = 40
HEADS = [(64, 8, 8), (65, 8, 5), (128, 12, 8)]  # d_model, requested heads, adjusted heads
STRICT = {"atol": 1e-10, "rtol": 0}
networks = pytest.mark.parametrize("network", [flownetwork.FlowNetwork, flownetwork.EnhancedFlowTransformer])


def make_network(network, d_model=16, num_layers=2, num_heads=2, **options):
    torch.manual_seed(0)
    return network(VOCABULARY, d_model, num_layers, num_heads=num_heads, **options).eval()


def make_layer(input_dim=16, output_dim=16, num_patterns=4, num_heads=2, **options):
    torch.manual_seed(0)
    return EnhancedFlowLayer(input_dim, output_dim, num_patterns, num_heads, **options).double().eval()


def draw_ids(batch, length, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_metrics(metrics, names):
    assert metrics.keys() == names
    for metric in metrics.values():
        assert metric.shape == () and metric.isfinite() and not metric.requires_grad


OF_A_LAYER = {"sparsity_kept", "pattern_entropy", "window_mean"}
OF_A_MODEL = OF_A_LAYER | {"memory_write_norm"}


@pytest.fixture
def log(caplog, monkeypatch):
    """Capture the log records of the package, which transformers does not propagate to the root logger."""
    for module in (configuration_flownetwork, flownetwork):
        monkeypatch.setattr(module, "logger", logging.getLogger(module.__name__ + ".test"))
    caplog.set_level(logging.DEBUG)
    return caplog


def test_quick_start():
    from dfn_hf import EnhancedFlowTransformer, FlowNetwork

    # fmt: off
    model = FlowNetwork(vocab_size=30000, d_model=512, num_layers=8, max_seq_len=2048)
    ids = torch.randint(0, 30000, (2, 128))
    logits, metrics = model(ids)
    # fmt: on

    assert logits.shape == (2, 128, 30000) and logits.isfinite().all()
    assert_metrics(metrics, OF_A_MODEL)
    assert model.causal_lm.config.num_hidden_layers == 8
    assert model.causal_lm.config.max_position_embeddings == 2048
    assert issubclass(EnhancedFlowTransformer, FlowNetwork)


# Heads


@networks
@pytest.mark.parametrize(("d_model", "requested", "taken"), HEADS)
def test_networks_adjust_their_heads(network, d_model, requested, taken, log):
    model = make_network(network, d_model, num_heads=requested)
    messages = [record.getMessage() for record in log.records]
    assert len(messages) == (requested != taken)
    assert all(str(number) in message for message in messages for number in (d_model, requested, taken))
    config = model.causal_lm.config
    assert (config.num_attention_heads, config.num_memory_heads, config.num_key_value_heads) == (taken,) * 3
    for length in (32, 128, 512):
        with torch.no_grad():
            logits, metrics = model(draw_ids(1, length))
        assert logits.shape == (1, length, VOCABULARY) and logits.isfinite().all()
        assert_metrics(metrics, OF_A_MODEL)
    assert len(log.records) == len(messages)


@pytest.mark.parametrize(("d_model", "requested", "taken"), HEADS)
def test_layers_adjust_their_heads(d_model, requested, taken, log):
    layer = make_layer(d_model, d_model, num_heads=requested)
    messages = [record.getMessage() for record in log.records]
    assert len(messages) == (requested != taken)
    assert all(str(number) in message for message in messages for number in (d_model, requested, taken))
    assert layer.layer.memory_attention.num_heads == taken
    for length in (32, 128, 512):
        x = draw(1, length, d_model)
        with torch.no_grad():
            out, metrics = layer(x)
        assert out.shape == x.shape and out.isfinite().all()
        assert_metrics(metrics, OF_A_LAYER)
    assert len(log.records) == len(messages)


# Networks


@networks
@pytest.mark.parametrize("cut", [1, 63, 64, 130])
def test_networks_are_causal(network, cut):
    model, ids = make_network(network).double(), draw_ids(2, 200)
    other = torch.cat([ids[:, :cut], draw_ids(2, 200 - cut, seed=1)], dim=1)
    with torch.no_grad():
        logits, changed = model(ids)[0], model(other)[0]
    assert torch.allclose(logits[:, :cut], changed[:, :cut], **STRICT)
    assert not torch.allclose(logits[:, cut:], changed[:, cut:], atol=1e-3)


@networks
def test_receptive_fields_of_the_networks(network):
    config = make_network(network).causal_lm.config
    assert config.block_type == {"FlowNetwork": "enhanced_flow"}.get(network.__name__, "flow_transformer")


@networks
@pytest.mark.parametrize("training", [False, True])
def test_logits_equal_those_of_causal_lm(network, training):
    model, ids = make_network(network, dropout=0.0).train(training), draw_ids(2, 70)
    logits, metrics = model(ids)
    outputs = model.causal_lm(ids, output_metrics=True)
    assert torch.allclose(logits, outputs.logits, atol=1e-6, rtol=0)
    assert metrics.keys() == outputs.metrics.keys()
    assert_metrics(metrics, OF_A_MODEL)
    assert (metrics["memory_write_norm"] > 0) == training


@networks
def test_every_weight_has_a_gradient(network):
    model, ids = make_network(network).train(), draw_ids(2, 200)
    model(ids)[0].square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_only_commit_memory_updates_the_bank():
    torch.manual_seed(0)
    model = flownetwork.FlowNetwork(vocab_size=50, d_model=16, num_layers=1, max_seq_len=64).train()
    bank = model.causal_lm.model.memory.memory_bank
    before = bank.clone()
    model(torch.randint(50, (2, 20)))
    assert torch.equal(bank, before)
    model.commit_memory()
    assert not torch.equal(bank, before)


@networks
def test_causal_lm_generates_saves_and_loads(network, tmp_path):
    model, ids = make_network(network), draw_ids(2, 70)
    made = model.causal_lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    for step in range(70, 75):
        with torch.no_grad():
            assert torch.equal(model(made[:, :step])[0][:, -1].argmax(dim=-1), made[:, step])
    model.causal_lm.save_pretrained(tmp_path)
    loaded = FlowNetworkForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.causal_lm(ids).logits)
    other = make_network(network)
    torch.nn.init.zeros_(other.causal_lm.model.embed_tokens.weight)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(ids)[0], model(ids)[0])


@networks
@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("name", ["vocab_size", "d_model", "num_layers", "max_seq_len", "num_patterns", "num_heads"])
def test_invalid_network_sizes_raise(network, name, size):
    with pytest.raises(ValueError, match=rf"`{name}` must be at least 1, got {size}"):
        network(**{"vocab_size": VOCABULARY, "d_model": 16, "num_layers": 1, name: size})


@networks
@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_invalid_dropout_raises(network, dropout):
    with pytest.raises(ValueError, match=rf"dropout` must lie in \[0, 1\), got {dropout}"):
        make_network(network, dropout=dropout)


# Layers


@pytest.mark.parametrize("memory_size", [0, 3])
@pytest.mark.parametrize("widths", [(10, 16), (16, 10), (12, 12)])
def test_layers_have_the_requested_output_width(widths, memory_size):
    layer, x = make_layer(*widths, memory_size=memory_size).train(), draw(2, 150, widths[0])
    out, metrics = layer(x)
    assert out.shape == (2, 150, widths[1]) and out.isfinite().all()
    assert_metrics(metrics, OF_A_LAYER)
    out.square().sum().backward()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in layer.parameters())


def test_equal_seeds_make_equal_layers(monkeypatch):
    """Uninitialised memory would differ between the layers or contain NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        layers = make_layer(10, 16), make_layer(10, 16)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*(layer.parameters() for layer in layers), strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


@pytest.mark.parametrize("per_row", [False, True])
def test_layers_attend_to_a_given_memory(per_row):
    layer, x = make_layer(10, 16), draw(2, 80, 10)
    memory = draw(2, 5, 16, seed=1) if per_row else draw(5, 16, seed=1)
    memory.requires_grad_()
    out, _ = layer(x, memory)
    for row in range(2):
        alone, _ = layer(x[row : row + 1], memory[row] if per_row else memory)
        assert torch.allclose(alone[0], out[row], **STRICT)
    assert not torch.allclose(out, layer(x)[0], atol=1e-3)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(layer(x, memory[..., order, :])[0], out, **STRICT)
    (gradient,) = torch.autograd.grad(out.square().sum(), memory)
    assert gradient.any(dim=-1).all()


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16)])
def test_layers_without_memory_raise(shape):
    layer = make_layer(memory_size=0)
    layer(draw(2, 9, 16))
    with pytest.raises(ValueError, match="`memory_size` is 0"):
        layer(draw(2, 9, 16), draw(*shape))


@pytest.mark.parametrize("memory_size", [0, 3])
def test_layers_are_causal(memory_size):
    layer, x = make_layer(memory_size=memory_size), draw(2, 150, 16)
    other = torch.cat([x[:, :70], draw(2, 80, 16, seed=1)], dim=1)
    out, changed = layer(x)[0], layer(other)[0]
    assert torch.allclose(out[:, :70], changed[:, :70], **STRICT)
    assert not torch.allclose(out[:, 70:], changed[:, 70:], atol=1e-3)


def test_dropout_is_active_in_training_only():
    layer, x = make_layer(dropout=0.5), draw(1, 20, 16)
    assert torch.equal(layer(x)[0], layer(x)[0])
    assert not torch.allclose(layer.train()(x)[0], layer(x)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(
            ({name: size}, rf"`{name}` must be at least 1, got {size}")
            for name in ("input_dim", "output_dim", "num_patterns", "num_heads", "flow_window")
            for size in (0, -1)
        ),
        ({"memory_size": -1}, "`memory_size` must be finite and not negative, got -1"),
        *(
            ({"base_sparsity": fraction}, rf"`base_sparsity` must lie in \(0, 1\], got {fraction}")
            for fraction in (0.0, -0.1, 1.1, float("nan"))
        ),
        ({"dropout": 1.0}, r"dropout` must lie in \[0, 1\), got 1.0"),
    ],
)
def test_invalid_layer_options_raise(options, words):
    with pytest.raises(ValueError, match=words):
        make_layer(**options)


@pytest.mark.parametrize("options", [{"base_sparsity": 1.0}, {"flow_window": 1}, {"num_patterns": 1}])
def test_layers_run_with_boundary_values(options):
    out, _ = make_layer(**options)(draw(2, 80, 16))
    assert out.isfinite().all()


# Conversion of tensors to numbers


@pytest.mark.parametrize(
    ("tensor", "number"),
    [
        (torch.tensor(3), 3),
        (torch.tensor([[-7]]), -7),
        (torch.tensor(2**53 + 1), 2**53 + 1),
        (torch.tensor(2.9), 2),
        (torch.tensor(-2.9), -2),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1),
        (torch.tensor(True), 1),
        (torch.tensor(4.0, requires_grad=True), 4),
    ],
)
def test_finite_numbers_are_converted(tensor, number, log):
    taken = safe_tensor_to_int(tensor, default=99)
    assert type(taken) is int and taken == number and not log.records


@pytest.mark.parametrize(
    "tensor",
    [*(torch.tensor(float(word)) for word in ("nan", "inf", "-inf")), torch.tensor([1, 2]), torch.tensor([])],
)
def test_other_tensors_give_the_default_and_are_logged(tensor, log):
    assert safe_tensor_to_int(tensor, default=99) == 99
    (record,) = log.records
    assert record.levelno == logging.WARNING
    assert "99" in record.getMessage() and str(list(tensor.shape)) in record.getMessage()
