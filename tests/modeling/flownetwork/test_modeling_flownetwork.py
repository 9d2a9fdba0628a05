"""FlowNetwork beyond the invariants: layer, receptive field, memory bank, heads and errors."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import DynamicCache

from dfn_hf import FlowNetworkConfig, FlowNetworkForCausalLM, FlowNetworkForSequenceClassification, FlowNetworkModel
from dfn_hf.modeling.flownetwork.modeling_flownetwork import FlowNetworkLayer
from dfn_hf.modeling.flownetwork.routing import FlowLayer
from dfn_hf.modeling.modules.cache import CACHE_NAME
from dfn_hf.modeling.modules.row_layout import make_row_layout
from dfn_hf.modeling.modules.windowed_attention import RotaryEmbedding
from tests.support.families import VOCABULARY, draw_ids

CPU = torch.device("cpu")
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "num_patterns": 3,
    "base_sparsity": 0.4,
    "flow_window": 6,
    "min_flow_window": 2,
    "memory_size": 3,
    "num_memory_heads": 2,
    "memory_chunk": 4,
    "initializer_range": 0.5,
}
STRICT = {"atol": 1e-10, "rtol": 0}
block_types = pytest.mark.parametrize("block_type", ["enhanced_flow", "flow_transformer"])


def make_model(model_class=FlowNetworkForCausalLM, **fields):
    torch.manual_seed(0)
    return model_class(FlowNetworkConfig(**{**TINY, **fields})).double().eval()


def bank_of(model):
    return model.base_model.memory.memory_bank


LEFT_PADDED = torch.ones(2, 20, dtype=torch.int64)
LEFT_PADDED[0, :7] = 0


# A layer


@block_types
def test_layer_equals_its_equations(block_type):
    model = make_model(FlowNetworkModel, block_type=block_type)
    layer, rows, states = model.layers[0], make_row_layout(2, 20, CPU), torch.randn(2, 20, 16).double()
    rotary = model.rotary(states, rows.segment_positions)
    with torch.no_grad():
        found, _, _, _ = layer(states, bank_of(model), rotary, rows)
        u = layer.input_norm(states)
        matrix, _ = FlowLayer.forward(layer.flow, u, layer.router(u))
        flow = layer.flow.apply(matrix, u)
        if block_type == "enhanced_flow":
            read, _ = layer.attention(u + flow, rotary, rows, None, False)
        else:
            read = layer.attention(u, rotary, rows, None, False)[0] + flow
        expected = states + layer.out_proj(read * F.silu(layer.gate_proj(u + flow)))
        normed = layer.memory_norm(expected)
        slots, layout = layer.sequence_memory(normed, rows)
        expected = expected + layer.memory_attention(normed, bank_of(model), slots, layout)
        expected = expected + layer.mlp(layer.mlp_norm(expected))
    assert torch.allclose(found, expected, **STRICT)


@pytest.mark.parametrize("memory_size", [0, 3])
def test_layer_with_another_input_width_projects_its_residual(memory_size):
    config = FlowNetworkConfig(**TINY | {"memory_size": memory_size})
    torch.manual_seed(0)
    layer, x, rows = (
        FlowNetworkLayer(config, input_size=10).double(),
        torch.randn(2, 9, 10).double(),
        make_row_layout(2, 9, CPU),
    )
    for memory in [layer.router.context, *([layer.sequence_memory] if memory_size else [])]:
        memory.reset_parameters(1.0)
    for norm in (layer.input_norm, layer.mlp_norm, *([layer.memory_norm] if memory_size else [])):
        torch.nn.init.ones_(norm.weight)
    bank = torch.randn(2, 5, 16).double() if memory_size else None
    rotary = tuple(x.double() for x in RotaryEmbedding(config)(x, rows.segment_positions))
    states, _, _, _ = layer(x, bank, rotary, rows)
    assert states.shape == (2, 9, 16)
    states.square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


def test_layers_of_two_widths_run_under_autocast():
    config, rows, states = (
        FlowNetworkConfig(**TINY, attn_implementation="sdpa"),
        make_row_layout(2, 9, CPU),
        torch.randn(2, 9, 10),
    )
    bank, rotary = torch.randn(5, 16), RotaryEmbedding(config)(states, rows.segment_positions)
    for width in (10, 16):
        layer = FlowNetworkLayer(config, input_size=width)
        for memory in (layer.router.context, layer.sequence_memory):
            memory.reset_parameters(1.0)
        with torch.autocast("cpu", torch.bfloat16):
            states, _, _, _ = layer(states, bank, rotary, rows)
        assert states.dtype == torch.float32 and states.isfinite().all()


# Receptive field


def gradient_of_the_last_logits(model, length):
    embeddings = model.get_input_embeddings()(draw_ids(1, length, 0)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits[0, -1].square().sum(), embeddings)
    return gradient[0].abs().amax(dim=-1)


@pytest.mark.parametrize("num_hidden_layers", [1, 3])
@pytest.mark.parametrize("window", [2, 6])
def test_full_attention_has_a_larger_receptive_field(num_hidden_layers, window):
    length, reach = 40, num_hidden_layers * (window - 1)
    # No chunk closes, so that the router's context is empty.
    options = {"memory_size": 0, "memory_chunk": length, "flow_window": window, "num_hidden_layers": num_hidden_layers}
    windowed = gradient_of_the_last_logits(make_model(**options), length)
    # In each layer the flow covers one window, and the attention to its result covers another one.
    far, farther = length - 1 - reach, length - 1 - 2 * reach
    assert windowed[far:].all() and windowed[farther:far].any() and not windowed[:farther].any()
    assert gradient_of_the_last_logits(make_model(block_type="flow_transformer", **options), length).all()


@pytest.mark.parametrize("memory_size", [0, 3])
def test_router_context_and_memory_depend_on_all_closed_chunks(memory_size):
    # Keep all entities: a single kept entity has weight 1, which gives the router no gradient.
    model = make_model(num_hidden_layers=1, memory_size=memory_size, base_sparsity=1.0)
    assert gradient_of_the_last_logits(model, 40).all()


@block_types
@pytest.mark.parametrize("memory_size", [0, 3])
@pytest.mark.parametrize("length", [1, 32, 128, 512])
def test_runs_at_any_length(block_type, memory_size, length):
    model = make_model(block_type=block_type, memory_size=memory_size)
    ids = draw_ids(2, length, 0)
    outputs = model(ids, labels=ids, use_cache=False)
    assert outputs.logits.shape == (2, length, VOCABULARY) and outputs.logits.isfinite().all()
    if length > 1:
        outputs.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# The memory bank


def test_eval_and_generate_do_not_change_the_bank():
    model = make_model()
    ids = draw_ids(2, 20, 0)
    before = bank_of(model).clone()
    outputs = model(ids, labels=ids, use_cache=False)
    outputs.loss.backward()
    assert outputs.metrics["memory_write_norm"] == 0
    for training in (False, True):
        model.train(training).generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert model.model.memory.staged is None
    model.commit_memory()
    assert torch.equal(bank_of(model), before)


def train_step(model, ids, **inputs):
    outputs = model(ids, labels=ids, use_cache=False, **inputs)
    outputs.loss.backward()
    return outputs


def expected_bank(model, states):
    """Return the bank after an update with final states `[number, D]`, from the equation."""
    bank, decay = bank_of(model), model.config.memory_bank_decay
    assignment = (4 * states @ bank.T / math.sqrt(states.shape[-1])).softmax(dim=-1)
    return decay * bank + (1 - decay) * (assignment.T @ states) / assignment.sum(dim=0)[:, None]


@block_types
def test_commit_writes_the_staged_states_once(block_type):
    model = make_model(block_type=block_type, memory_bank_decay=0.7).train()
    ids = draw_ids(2, 20, 0)
    before = bank_of(model).clone()
    outputs = train_step(model, ids, attention_mask=LEFT_PADDED, output_hidden_states=True)
    assert torch.equal(bank_of(model), before)
    expected = expected_bank(model, outputs.hidden_states[-1][LEFT_PADDED.bool()].detach())
    norm = outputs.metrics["memory_write_norm"]
    assert torch.allclose(norm, (expected - before).norm(), **STRICT) and norm > 0.1
    for _ in range(2):
        model.commit_memory()
        assert torch.allclose(bank_of(model), expected, **STRICT) and model.model.memory.staged is None
    assert not bank_of(model).requires_grad and bank_of(model).grad_fn is None


def test_updates_affect_only_later_batches():
    model, ids = make_model().train(), draw_ids(2, 20, 0)
    first = train_step(model, ids)
    assert torch.equal(train_step(model, ids).logits, first.logits)
    model.commit_memory()
    assert not torch.allclose(train_step(model, ids).logits, first.logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_commit_before_the_backward_pass_keeps_the_gradients(checkpointing):
    gradients = []
    for early in (False, True):
        model, ids = make_model().train(), draw_ids(2, 20, 0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(ids, labels=ids, use_cache=False).loss
        if early:
            model.commit_memory()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_stage_once(reentrant):
    banks = []
    for checkpointing in (False, True):
        model, ids = make_model().train(), draw_ids(2, 20, 0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        train_step(model, ids)
        train_step(model, ids.flip(1), attention_mask=LEFT_PADDED)
        model.commit_memory()
        banks.append(bank_of(model))
    assert torch.equal(*banks)


def test_accumulated_micro_batches_equal_one_batch():
    whole, pieces, ids = make_model().train(), make_model().train(), draw_ids(8, 20, 0)
    train_step(whole, ids)
    for row in ids:
        train_step(pieces, row[None])
    whole.commit_memory()
    pieces.commit_memory()
    assert torch.allclose(bank_of(whole), bank_of(pieces), **STRICT)
    assert not torch.allclose(bank_of(whole), bank_of(make_model()))


def test_bank_is_saved_and_stays_fp32(tmp_path):
    model, ids = make_model().float().train(), draw_ids(2, 20, 0)
    train_step(model, ids)
    model.commit_memory()
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = FlowNetworkForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert bank_of(loaded).dtype == torch.float32 and torch.equal(bank_of(loaded), bank_of(model))
        assert loaded.lm_head.weight.dtype == dtype
        train_step(loaded.train(), ids)
        loaded.commit_memory()
        assert bank_of(loaded).dtype == torch.float32 and not torch.equal(bank_of(loaded), bank_of(model))


def test_adapters_train_without_changing_the_bank():
    model, ids = make_model(), draw_ids(2, 40, 0)
    before = bank_of(model).clone()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)).double().train()
    train_step(adapted, ids)
    learnt = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for part in ("attention.q_proj", "query_maps", "pattern_selector", "route_proj", "memory_attention.v_proj", "mlp"):
        assert any(part in name for name in learnt)
    assert all(parameter.grad.any() for name, parameter in learnt.items() if "lora_B" in name)
    adapted.commit_memory()
    assert torch.equal(bank_of(model), before) and model.model.memory.staged is None


def test_memory_size_0():
    model, ids = make_model(memory_size=0).train(), draw_ids(2, 20, 0)
    assert not [name for name in model.state_dict() if "memory" in name]
    outputs = train_step(model, ids)
    assert outputs.metrics.keys() == {"sparsity_kept", "pattern_entropy", "window_mean"}
    model.commit_memory()
    model.eval().generate(ids, max_new_tokens=3, pad_token_id=0)


# Metrics


@block_types
@pytest.mark.parametrize("training", [False, True])
def test_metrics_are_scalars_without_gradients(block_type, training):
    model, ids = make_model(block_type=block_type).train(training), draw_ids(2, 20, 0)
    metrics = model(ids, attention_mask=LEFT_PADDED, output_metrics=True).metrics
    assert ("metrics" in model(ids)) == training
    assert metrics.keys() == {"sparsity_kept", "pattern_entropy", "window_mean", "memory_write_norm"}
    for value in metrics.values():
        assert isinstance(value, torch.Tensor) and value.shape == () and not value.requires_grad
    assert 0 < metrics["sparsity_kept"] < 1 and 2 <= metrics["window_mean"] <= 6
    assert 0 < metrics["pattern_entropy"] <= math.log(2)


def test_metrics_are_means_over_layers_and_real_tokens():
    model, ids = make_model(), draw_ids(2, 20, 0)
    with torch.no_grad():
        outputs = model(ids, attention_mask=LEFT_PADDED, output_flows=True, output_metrics=True)
    real = LEFT_PADDED.bool()
    windows = torch.stack([flows.window[real].mean() for flows in outputs.flows])
    assert torch.allclose(outputs.metrics["window_mean"], windows.mean(), **STRICT)
    place = LEFT_PADDED.cumsum(dim=1)
    kept = []
    for flows in outputs.flows:
        reachable = torch.minimum(place.clamp(max=6), flows.window)
        kept.append(((flows.matrix > 0).sum(dim=-1) / reachable)[real].mean())
    assert torch.allclose(outputs.metrics["sparsity_kept"], torch.stack(kept).mean(), **STRICT)


# Flows


@block_types
def test_flows_equal_the_matrices_of_the_layers(block_type):
    model, ids = make_model(FlowNetworkModel, block_type=block_type), draw_ids(2, 20, 0)
    with torch.no_grad():
        for layer in range(2):
            outputs = model(ids, output_flows=True, output_hidden_states=True)
            flows, u = outputs.flows[layer], model.layers[layer].input_norm(outputs.hidden_states[layer])
            routing = model.layers[layer].router(u)
            matrix, _ = FlowLayer.forward(model.layers[layer].flow, u, routing)
            assert flows.matrix.shape == (2, 20, 20) and torch.allclose(flows.matrix, matrix, **STRICT)
            assert torch.allclose(flows.window, routing[0], **STRICT)
            assert torch.allclose(flows.fraction, routing[1], **STRICT)


def test_flows_are_between_columns():
    model, ids = make_model(), draw_ids(2, 20, 0)
    with torch.no_grad():
        flows = model(ids, attention_mask=LEFT_PADDED, output_flows=True).flows
        alone = model(ids[:1, 7:], output_flows=True).flows
        cache, parts = DynamicCache(config=model.config), []
        for piece, seen in ((ids[:, :12], 12), (ids[:, 12:], 20)):
            outputs = model(piece, LEFT_PADDED[:, :seen], past_key_values=cache, output_flows=True)
            parts.append(outputs.flows)
    for layer in range(2):
        whole = flows[layer]
        assert torch.allclose(whole.matrix[:1, 7:, 7:], alone[layer].matrix, **STRICT)
        assert not whole.matrix[0, :7].any() and not whole.matrix[0, :, :7].any()
        assert not whole.window[0, :7].any() and not whole.fraction[0, :7].any()
        assert torch.allclose(parts[0][layer].matrix, whole.matrix[:, :12, :12], **STRICT)
        assert torch.allclose(parts[1][layer].matrix, whole.matrix[:, 12:], **STRICT)
        assert torch.allclose(parts[1][layer].window, whole.window[:, 12:], **STRICT)


# Compilation


@pytest.fixture
def compiled():
    """Compile the model as one graph; a graph break is an error."""
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.reset()


@block_types
@pytest.mark.parametrize("inputs", [{}, {"use_cache": False}, {"attention_mask": LEFT_PADDED}])
def test_forward_pass_is_one_graph(block_type, inputs, compiled):
    model, ids = make_model(block_type=block_type, num_hidden_layers=1), draw_ids(2, 20, 0)
    with torch.no_grad():
        inputs = inputs | {"output_metrics": True}
        expected, found = model(ids, **inputs), compiled(model)(ids, **inputs)
    assert torch.allclose(found.logits, expected.logits, **STRICT)
    assert torch.allclose(found.metrics["sparsity_kept"], expected.metrics["sparsity_kept"], **STRICT)


@block_types
def test_training_step_is_one_graph(block_type, compiled):
    model, ids = make_model(block_type=block_type, num_hidden_layers=1).train(), draw_ids(2, 20, 0)
    results = []
    for step in (model, compiled(model)):
        model.zero_grad()
        for _ in range(2):  # the second pass starts with staged statistics
            step(ids, attention_mask=LEFT_PADDED, labels=ids, use_cache=False).loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append([*gradients, *model.model.memory.staged])
        model.model.memory.staged = None
    assert all(torch.allclose(one, other, **STRICT) for one, other in zip(*results, strict=True))


# Initial statistics


def test_initial_loss_is_that_of_a_uniform_distribution():
    torch.manual_seed(0)
    model = FlowNetworkForCausalLM(FlowNetworkConfig(num_hidden_layers=2)).eval()
    ids = torch.randint(4096, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(ids, labels=ids).loss == pytest.approx(math.log(4096), rel=0.15)
    bank = bank_of(model)
    assert bank.std() == pytest.approx(1, rel=0.05) and bank.mean().abs() < 0.05
    for layer in model.model.layers:
        just_before = torch.zeros_like(layer.flow.profile)
        just_before[:, 1] = 9
        profile = layer.flow.profile.detach() + 4 - just_before
        assert (profile[:, 1] == 0).all() and profile[:, 2:].std() == pytest.approx(1, rel=0.25)
        assert (layer.flow.intensity_proj.bias == 2).all()
        for memory in (layer.sequence_memory, layer.router.context):
            assert torch.allclose(memory.decay_logit.sigmoid(), torch.tensor(0.9))


# Generation


@block_types
def test_left_padded_rows_generate_as_if_alone(block_type):
    model, ids = make_model(block_type=block_type), draw_ids(3, 20, 3)
    mask = torch.ones_like(ids)
    mask[0, :13] = mask[1, :1] = 0
    options = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], **options)
        assert torch.equal(together[row, 20:], alone[0, -15:])


def test_cache_is_accepted_under_both_names():
    model, ids, results = make_model(), draw_ids(2, 8, 0), []
    with torch.no_grad():
        for name in ("past_key_values", "cache"):
            state = DynamicCache(config=model.config)
            model(ids, **{name: state})
            results.append(model(ids, **{name: state}))
            assert results[-1][CACHE_NAME] is state and state.get_seq_length() == 16
    assert torch.equal(results[0].logits, results[1].logits)


@pytest.mark.parametrize("implementation", ["static", "quantized"])
def test_caches_of_fixed_size_raise(implementation):
    with pytest.raises(ValueError, match=rf"'{implementation}' cannot hold.*\"dynamic\""):
        make_model().generate(draw_ids(1, 8, 0), cache_implementation=implementation, max_new_tokens=2, pad_token_id=0)


@block_types
@pytest.mark.parametrize("part", ["embed_tokens.weight", "layers.0.router.route_proj.weight", "layers.1.flow.profile"])
def test_diverged_model_returns_nan(block_type, part):
    model, ids = make_model(block_type=block_type).train(), draw_ids(2, 20, 0)
    before = bank_of(model).clone()
    with torch.no_grad():
        model.model.get_parameter(part).fill_(math.nan)
    outputs = model(ids, labels=ids, use_cache=True)
    assert outputs.loss.isnan()
    outputs.loss.backward()
    model.commit_memory()
    assert torch.equal(bank_of(model), before)
    assert model(ids[:, :1], past_key_values=outputs.past_key_values).logits.isnan().all()


@block_types
def test_empty_rows_do_not_affect_other_rows(block_type):
    model, ids, mask = make_model(block_type=block_type), draw_ids(2, 20, 10), torch.ones(2, 20)
    mask[0] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all() and torch.allclose(logits[1:], model(ids[1:]).logits, **STRICT)


# Classification


@pytest.mark.parametrize("side", ["left", "right"])
def test_classification_uses_the_last_real_token(side):
    model = make_model(FlowNetworkForSequenceClassification, num_labels=3, pad_token_id=0)
    ids = draw_ids(2, 20, 7)
    alone = torch.cat([model(ids[:1, :13]).logits, model(ids[1:]).logits])
    kept = slice(0, 13) if side == "right" else slice(7, 20)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0] = mask[0] = 0
    padded[0, kept], mask[0, kept] = ids[0, :13], 1
    assert torch.allclose(model(padded, attention_mask=mask).logits, alone, **STRICT)
    if side == "right":  # the pad token gives the same result
        assert torch.allclose(model(padded).logits, alone, **STRICT)


@pytest.mark.parametrize(
    ("fields", "labels", "loss"),
    [
        ({"num_labels": 3}, torch.tensor([2, 0]), F.cross_entropy),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0]).double(), lambda x, y: F.mse_loss(x[:, 0], y)),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.tensor([[1.0, 0, 1], [0, 0, 1]]).double(),
            F.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_classification_losses_train_the_memory(fields, labels, loss):
    model = make_model(FlowNetworkForSequenceClassification, pad_token_id=0, **fields).train()
    before = bank_of(model).clone()
    outputs = model(draw_ids(2, 20, 8), labels=labels)
    assert torch.allclose(outputs.loss, loss(outputs.logits, labels))
    outputs.loss.backward()
    model.commit_memory()
    assert not torch.equal(bank_of(model), before)


def test_batch_without_mask_or_pad_token_raises():
    model = make_model(FlowNetworkForSequenceClassification)
    assert model(draw_ids(1, 9, 0)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match=r"attention_mask.*pad_token_id"):
        model(draw_ids(2, 9, 0))
