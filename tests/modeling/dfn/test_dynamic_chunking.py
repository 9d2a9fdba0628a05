"""Dynamic chunking of bytes: compared with a loop over the equations, and inside models."""

import random

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from dfn_hf import DFNConfig, DFNForCausalLM, DFNForSequenceClassification, DFNModel
from dfn_hf.modeling.dfn.dynamic_chunking import (
    Dechunking,
    EntitySampling,
    PackedEntities,
    make_entity_layout,
    should_pack,
    sinusoidal_features,
)
from dfn_hf.modeling.modules.row_layout import make_row_layout
from tests.support.families import draw_adaptive_config, draw_ids, draw_model

STRICT = {"atol": 1e-9, "rtol": 0}
SEEDS = range(5)
HIDDEN = 12


def make_sampling(seed, **options):
    torch.manual_seed(seed)
    config = DFNConfig(**{"hidden_size": HIDDEN, "entity_sampling": "adaptive", "max_entity_length": 5, **options})
    sampling = EntitySampling(config).double()
    if sampling.adaptive:
        torch.nn.init.normal_(sampling.norm.weight)
        torch.nn.init.normal_(sampling.flow_map.weight, std=1 / HIDDEN)
        torch.nn.init.constant_(sampling.threshold, 1.0)
        torch.nn.init.constant_(sampling.log_steepness, 1.0)
    return sampling


def reference(sampling, states, entities_of):
    """Sample and dechunk one row `[M, D]` by a loop.

    Args:
        entities_of: stands in for the entity-level layers, `[E, D]` → `[E, D]`.

    Returns:
        (states after dechunking `[M, D]`, spans of the entities, log mass `[E]`, coordinates `[E, F]`).
    """
    boundary_probs, spans, opened = [], [], 0
    for t in range(len(states)):
        if t == 0 or not sampling.adaptive:
            dense = states.new_ones(())
        else:
            length = sampling.flow_map(sampling.norm(states[t])).square().sum()
            dense = torch.sigmoid(sampling.log_steepness.exp() * (sampling.threshold - length))[0]
        boundary_probs.append(dense)
        if t == 0:
            last_dense = 0
        elif sampling.adaptive and dense >= 0.5:
            last_dense = t
        if (t - last_dense) % sampling.max_length == 0:
            spans.append((opened, t))
            opened = t + 1
    boundary_probs = torch.stack(boundary_probs)
    weight = boundary_probs.clamp(min=1e-3)
    pooled = torch.stack([weight[a : b + 1] @ states[a : b + 1] / weight[a : b + 1].sum() for a, b in spans])
    mass = torch.tensor([1.0 + b - a for a, b in spans], dtype=states.dtype)
    coordinates = sinusoidal_features(boundary_probs.detach().cumsum(0)[[b for _, b in spans]], states.dtype)
    given, smoothed, e = [], torch.zeros_like(states[0]), 0
    transformed = entities_of(pooled)
    for t in range(len(states)):
        completes = e < len(spans) and spans[e][1] == t
        if completes:
            share = boundary_probs[t].clamp(min=0.5)
            smoothed = share * transformed[e] + (1 - share) * smoothed
            e += 1
        chosen = boundary_probs[t] if completes else 1 - boundary_probs[t]
        given.append(states[t] + smoothed * (1 + chosen - chosen.detach()))
    return torch.stack(given), spans, mass.log(), coordinates


@pytest.mark.parametrize("options", [{}, {"entity_sampling": "uniform", "entity_rate": 1 / 3}])
@pytest.mark.parametrize("seed", SEEDS)
def test_sampling_and_dechunking_equal_a_loop(seed, options):
    sampling, dechunking = make_sampling(seed, **options), Dechunking()
    torch.manual_seed(seed)
    states = torch.randn(3, 29, HIDDEN, dtype=torch.float64)
    mix = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)
    counts = [29, 1, 17]
    mask = torch.arange(29) < torch.tensor(counts)[:, None]
    rows = make_row_layout(3, 29, states.device, mask=mask)
    probe = torch.randn_like(states) * mask[..., None]

    ours = states.clone().requires_grad_()
    sampled = sampling(ours, rows, None, None)
    given = dechunking(ours, torch.tanh(sampled.states @ mix), sampled, None)
    (given * probe).sum().backward()
    our_gradients = [parameter.grad.clone() for parameter in sampling.parameters()]

    sampling.zero_grad()
    theirs = states.clone().requires_grad_()
    loss = 0
    for row, count in enumerate(counts):
        expected, spans, log_mass, coordinates = reference(
            sampling, theirs[row, :count], lambda pooled: torch.tanh(pooled @ mix)
        )
        assert torch.allclose(given[row, :count], expected, **STRICT)
        assert sampled.layout.rows.mask[row].nonzero()[:, 0].tolist() == [b for _, b in spans]
        assert torch.allclose(sampled.log_mass[row, : len(spans)], log_mass, **STRICT)
        assert torch.allclose(sampled.coordinates[row, : len(spans)], coordinates, **STRICT)
        loss = loss + (expected * probe[row, :count]).sum()
    loss.backward()
    assert torch.allclose(ours.grad[mask], theirs.grad[mask], **STRICT)
    for gradient, parameter in zip(our_gradients, sampling.parameters(), strict=True):
        assert gradient.any() and torch.allclose(gradient, parameter.grad, **STRICT)


def test_prediction_loss_covers_next_samples_of_the_segment():
    sampling, embeddings = make_sampling(0), torch.randn(2, 9, HIDDEN, dtype=torch.float64, requires_grad=True)
    states = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, -1, -1]])
    rows = make_row_layout(2, 9, states.device, segment_ids=segments)
    loss = sampling(states, rows, None, None, embeddings).prediction_loss
    loss.sum().backward()
    assert embeddings.grad is None and sampling.flow_map.weight.grad.any()
    flow, targets = sampling.flow_map(sampling.norm(states)), F.normalize(embeddings, dim=-1)
    for row, positions in enumerate(([0, 1, 2, 4, 6, 7], range(6))):
        expected = sum((targets[row, t + 1] - flow[row, t]).square().sum() for t in positions) / 6
        assert torch.allclose(loss[row], expected, **STRICT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_of_padded_rows_equal_those_of_single_rows(side):
    model, ids = draw_model("dfn-adaptive", 0), draw_ids(3, 20, 0)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 4, 13)):
        mask[row, slice(0, pads) if side == "left" else slice(20 - pads, 20)] = 0
    with torch.no_grad():
        outputs = model.model(ids, attention_mask=mask, use_cache=False)
        for row in range(3):
            alone = model.model(ids[row : row + 1, mask[row].bool()], use_cache=False)
            for name in ("ratio_loss", "prediction_loss"):
                assert torch.allclose(outputs[name][row], alone[name][0], **STRICT), name


def test_boundary_probs_learn_to_mark_uncertain_bytes():
    torch.manual_seed(0)
    model = DFNForCausalLM(DFNConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, entity_sampling="adaptive"))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        ids = torch.randint(8, 16, (8, 60))  # every second token is 8 less than the previous one, so it is certain
        ids[:, 1::2] = ids[:, ::2] - 8
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        boundary_probs = model(ids).boundary_probs[:, 2:]
    assert boundary_probs[:, 1::2].mean() > boundary_probs[:, ::2].mean() + 0.3


def test_smoothing_of_many_entities_equals_a_loop():
    sampling, dechunking = make_sampling(0), Dechunking()
    states = torch.randn(1, 400, HIDDEN, dtype=torch.float64)
    sampled = sampling(states, make_row_layout(1, 400, states.device), None, None)
    assert sampled.states.shape[1] > 100
    given = dechunking(states, sampled.states, sampled, None)[0]
    assert torch.allclose(given, reference(sampling, states[0], lambda pooled: pooled)[0], **STRICT)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_ratio_loss_is_minimal_at_the_target_rate(rate):
    sampling = make_sampling(0, entity_rate=rate)
    rows = make_row_layout(1, 100, torch.device("cpu"))

    def loss(share, mean):
        completes = torch.zeros(1, 100, dtype=torch.bool)
        completes[:, : round(100 * share)] = True
        layout = make_entity_layout(completes, rows, None)
        sampled = type("Sampled", (), {"layout": layout, "boundary_probs": torch.full((1, 100), mean)})
        return sampling.ratio_loss(sampled, rows).item()

    assert loss(rate, rate) == pytest.approx(0, abs=1e-6)
    for share in (0.05, 0.9):
        assert loss(share, share) > 0.01
        wrong_way = loss(share, rate + 0.05 * (1 if share > rate else -1))
        assert wrong_way > loss(share, rate)


def test_packed_rows_equal_single_rows():
    model = draw_model("dfn-adaptive", 3, flow_norm="entity").eval()
    ids = draw_ids(6, 60, 0)
    mask = torch.zeros_like(ids)
    for row, count in enumerate([60, 3, 5, 2, 9, 4]):
        mask[row, -count:] = 1
    seen = []
    original = PackedEntities.__init__

    def record(self, rows):
        seen.append(rows)
        original(self, rows)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(PackedEntities, "__init__", record)
        outputs = model(ids, attention_mask=mask, output_entities=True, output_hidden_states=True, use_cache=False)
    assert len(seen) == 1 and should_pack(seen[0])
    for row in range(6):
        real = mask[row].bool()
        with torch.no_grad():
            alone = model(ids[row : row + 1, real], output_entities=True, output_hidden_states=True)
        assert torch.allclose(outputs.logits[row, real], alone.logits[0], **STRICT)
        assert torch.equal(outputs.boundary_mask[row, real], alone.boundary_mask[0])
        assert torch.allclose(outputs.boundary_probs[row, real], alone.boundary_probs[0], **STRICT)
        for ours, theirs in zip(outputs.hidden_states, alone.hidden_states, strict=True):
            assert torch.allclose(ours[row, real], theirs[0], **STRICT)
        count = int(alone.boundary_mask.sum())
        for ours, theirs in zip(outputs.entities, alone.entities, strict=True):
            assert torch.allclose(ours.rest_positions[row, :, :count], theirs.rest_positions[0], **STRICT)
            assert torch.equal(ours.neighbors[row, :, :count], theirs.neighbors[0])
            assert (ours.neighbors[row, :, count:] == -1).all()


@pytest.mark.parametrize("sampling", ["adaptive", "uniform"])
def test_sampled_model_generates_and_classifies(sampling):
    config = draw_adaptive_config(random.Random(0), entity_sampling=sampling, num_labels=3, pad_token_id=0)
    torch.manual_seed(0)
    model = DFNForCausalLM(config).double().eval()
    ids = draw_ids(2, 20, 0)
    cached = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=False))
    outputs = model(ids, labels=ids)
    assert (outputs.ratio_loss is None) == (sampling == "uniform")
    assert DFNForSequenceClassification(config)(ids).logits.shape == (2, 3)


def test_classification_loss_includes_sampling_losses():
    config = draw_adaptive_config(random.Random(0), num_labels=3, pad_token_id=0, ratio_loss_coef=0.3)
    torch.manual_seed(0)
    model, ids, labels = DFNForSequenceClassification(config).double(), draw_ids(2, 20, 0), torch.tensor([0, 2])
    found = model(ids, labels=labels)
    sampled = model.model(ids)
    expected = F.cross_entropy(found.logits, labels) + 0.3 * sampled.ratio_loss.mean()
    assert torch.allclose(found.loss, expected, **STRICT)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(found.loss, parameters, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(expected + sampled.prediction_loss.mean(), parameters, allow_unused=True)
    for gradient, reference in zip(ours, theirs, strict=True):
        assert (gradient is None and reference is None) or torch.allclose(gradient, reference, **STRICT)


def test_bidirectional_model_with_sampling():
    config = draw_adaptive_config(random.Random(1), memory_slots=0, is_causal=False)
    torch.manual_seed(0)
    model = DFNModel(config).double().eval()
    ids = draw_ids(2, 40, 0)
    with torch.no_grad():
        states = model(ids).last_hidden_state
        alone = model(ids[:1]).last_hidden_state
        changed = ids.clone()
        changed[:, 30] = (changed[:, 30] + 1) % 40
        moved = (model(changed).last_hidden_state - states).abs().amax(dim=-1)
    assert torch.allclose(states[:1], alone, **STRICT)
    assert (moved[:, 29] > 1e-6).all()


def test_cache_has_one_state_per_layer():
    model = draw_model("dfn-adaptive", 0)
    cache = DynamicCache(config=model.config)
    model(draw_ids(1, 40, 0), past_key_values=cache)
    assert len(cache.layers) == len(model.config.layer_types)
    bytes_layer, entity_layer = cache.layers[0], cache.layers[-1]
    assert int(bytes_layer.lengths) == bytes_layer.seq_length == entity_layer.seq_length == 40
    assert 0 < int(entity_layer.lengths) < 40
    # The entity-level cache grows with the entities, not with the bytes.
    assert entity_layer.data("key").shape[2] < 40


def test_messages_name_contradicting_fields():
    for options, name in (
        ({"entity_sampling": "words"}, "entity_sampling"),
        ({"entity_rate": 1.0}, "entity_rate"),
        ({"entity_rate": 5}, "entity_rate"),
        ({"entity_rate": 0.01, "max_entity_length": 64}, "max_entity_length"),
        ({"entity_sampling": "adaptive", "local_window": 1}, "local_window"),
        ({"entity_sampling": "adaptive", "readout_window": 2}, "readout_window"),
        ({"sample_intermediate_size": 0}, "sample_intermediate_size"),
        ({"ratio_loss_coef": -1.0}, "ratio_loss_coef"),
    ):
        with pytest.raises(ValueError, match=name):
            DFNConfig(**options)
