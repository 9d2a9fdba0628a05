"""Bidirectional DFN: attention to both sides of an entity, compared with a loop over the equation."""

import random

import pytest
import torch
from transformers import DynamicCache

from dfn_hf import DFNForCausalLM, DFNForSequenceClassification, DFNModel
from dfn_hf.modeling.dfn.attention import DynamicFlowAttention
from dfn_hf.modeling.modules.row_layout import make_row_layout
from dfn_hf.modeling.ops.neighbor_search import nearest_predecessors
from tests.support.families import draw_dfn_config, draw_ids

SEEDS = range(6)
STRICT = {"atol": 1e-9, "rtol": 0}


def draw(seed, model_class=DFNModel, **overrides):
    overrides = {"memory_slots": 0, "readout_window": 1, "is_causal": False, **overrides}
    torch.manual_seed(seed)
    model = model_class(draw_dfn_config(random.Random(seed), **overrides)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.shape[1] == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def states(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).last_hidden_state


def bidirectional_reference(attention: DynamicFlowAttention, u: torch.Tensor) -> torch.Tensor:
    """Compute y of one row `[1, M, hidden_size]` by a loop over entities."""
    config = attention.config
    rest, moved, influence, _ = attention.entities(u, None)
    value = attention.value_proj(u).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    gamma, fading = attention.log_sharpness.exp(), attention.log_fading.exp()
    length = u.shape[1]
    window, num_neighbors = config.local_window, config.num_neighbors
    places = moved.detach(), rest.detach()
    before, _ = nearest_predecessors(*places, num_neighbors, window=window, method="exact")
    after, _ = nearest_predecessors(*(x.flip(2) for x in places), num_neighbors, window=window, method="exact")
    after = after.flip(2)
    y = torch.zeros_like(value)
    for head in range(attention.num_heads):
        for i in range(length):
            near = range(max(0, i - window + 1), min(length, i + window))
            far = [j for j in before[0, head, i].tolist() if j >= 0]
            far += [length - 1 - j for j in after[0, head, i].tolist() if j >= 0]
            ids = torch.tensor([*near, *far])
            distance = (moved[0, head, i] - rest[0, head, ids]).square().sum(dim=-1)
            age = (ids - i).abs().to(u.dtype)
            logits = -gamma[head] * distance + influence[0, head, ids] - fading[head] * torch.log1p(age)
            y[0, head, i] = logits.softmax(dim=0) @ value[0, head, ids]
    return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_equals_a_loop_over_entities(seed):
    model = draw(seed, search_implementation="exact", moved_query=True)
    attention = model.layers[0].attention
    torch.manual_seed(seed)
    u = torch.randn(1, 40, model.config.hidden_size, dtype=torch.float64)
    probe = torch.randn_like(u)
    results = []
    for attend in (
        lambda x: attention(x, make_row_layout(1, 40, x.device), None, None, False)[0],
        lambda x: bidirectional_reference(attention, x),
    ):
        attention.zero_grad()
        x = u.clone().requires_grad_()
        y = attend(x)
        (y * probe).sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad.clone() for parameter in attention.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, **STRICT)


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_rows_and_segments_are_independent(seed):
    model = draw(seed)
    ids = draw_ids(2, 45, seed)
    alone = states(model, ids)
    mask = torch.tensor([[0] * 7 + [1] * 38, [1, 1, 0] * 15])
    padded = states(model, ids, attention_mask=mask)
    for row in range(2):
        real = mask[row].bool()
        assert torch.allclose(padded[row, real], states(model, ids[row : row + 1, real])[0], **STRICT)
        assert torch.allclose(alone[row], states(model, ids[row : row + 1])[0], **STRICT)
    lengths = [1, 20, 3, 21]
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1).clone()
    packed = torch.cat([states(model, piece) for piece in ids.split(lengths, dim=1)], dim=1)
    assert torch.allclose(states(model, ids, segment_ids=segments), packed, **STRICT)
    segments[:, 21:24] = -1
    real = segments[0] >= 0
    assert torch.allclose(states(model, ids, segment_ids=segments)[:, real], packed[:, real], **STRICT)


@pytest.mark.parametrize("seed", SEEDS)
def test_token_changes_states_on_both_sides(seed):
    model = draw(seed, local_window=2)
    ids = draw_ids(1, 45, seed)
    changed = ids.clone()
    changed[0, 22] = (changed[0, 22] + 1) % 40
    change = (states(model, ids) - states(model, changed)).abs().amax(dim=-1)[0]
    assert change[21] > 1e-3 and change[23] > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_returned_weights_reproduce_the_output(seed):
    model = draw(seed)
    ids = draw_ids(2, 30, seed)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    outputs = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True, output_entities=True)
    layer = model.layers[0]
    rows = make_row_layout(2, 30, ids.device, mask=mask.bool())
    embedded = rows.unpad(model.embed_tokens(ids))
    u = layer.conv(layer.flow_norm(embedded, rows, None), rows)
    y = rows.pad(layer.attention(u, rows, None, None, False)[0])
    values = rows.pad(layer.attention.value_proj(u)).unflatten(-1, (layer.attention.num_heads, -1))
    mixed = torch.einsum("bhmn,bnhd->bmhd", outputs.attentions[0], values).flatten(2)
    assert torch.allclose(mixed, y, **STRICT)
    assert torch.allclose(
        outputs.attentions[0].sum(-1)[mask[:, None].expand(-1, layer.attention.num_heads, -1) > 0],
        torch.ones(1, dtype=torch.float64),
        **STRICT,
    )
    neighbors = outputs.entities[0].neighbors
    assert neighbors.shape[-1] == 2 * model.config.num_neighbors
    assert (neighbors > torch.arange(30)[:, None]).any()


def test_heads_and_refused_options():
    config = draw_dfn_config(random.Random(0), memory_slots=0, readout_window=1, is_causal=False, num_labels=3)
    model = DFNForSequenceClassification(config)
    assert model(draw_ids(1, 9, 0)).logits.shape == (1, 3)
    assert model(draw_ids(1, 9, 0)).past_key_values is None
    with pytest.raises(ValueError, match="is_causal"):
        DFNForCausalLM(config)
    with pytest.raises(ValueError, match="memory_slots"):
        draw_dfn_config(random.Random(0), memory_slots=2, readout_window=1, is_causal=False)
    with pytest.raises(ValueError, match="past_key_values"):
        DFNModel(config)(draw_ids(2, 9, 0), past_key_values=DynamicCache(config=config))
