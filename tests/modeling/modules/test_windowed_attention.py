"""Causal attention, full and windowed, against a loop over entities with an explicit rotation."""

import math

import pytest
import torch

from dfn_hf import FlowNetworkConfig
from dfn_hf.modeling.modules.cache import FlowCacheLayer
from dfn_hf.modeling.modules.row_layout import make_row_layout
from dfn_hf.modeling.modules.windowed_attention import RotaryEmbedding, SelfAttention

CPU = torch.device("cpu")
STRICT = {"atol": 1e-9, "rtol": 0}
THETA = 100.0
# Heads, heads of keys and values, features of a head.
HEADS = {"plain": (2, 2, 4), "grouped": (4, 2, 4), "one key": (3, 1, 6), "odd": (2, 1, 5), "one feature": (2, 2, 1)}
WINDOWS = [1, 2, 5, 50, None]


def make_attention(window, heads="grouped", implementation="eager", dtype=torch.float64):
    num_heads, key_value_heads, head_dim = HEADS[heads]
    config = FlowNetworkConfig(
        hidden_size=num_heads * head_dim,
        num_attention_heads=num_heads,
        num_key_value_heads=key_value_heads,
        num_memory_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        attn_implementation=implementation,
    )
    torch.manual_seed(0)
    attention = SelfAttention(config, window)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention.to(dtype).eval()


def angles(places, head_dim):
    """Return position · θ^(−2f / rotated) for the feature pairs (f, f + half) of a head: float64 `[..., half]`."""
    half = head_dim // 2
    return places[..., None] * THETA ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))


def draw(attention, batch, length):
    features = attention.config.hidden_size
    return torch.randn(batch, length, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def attend(attention, u, rows=None, state=None, output_attentions=False):
    rows = make_row_layout(*u.shape[:2], CPU) if rows is None else rows
    turns = angles(rows.segment_positions, attention.head_dim).repeat(1, 1, 2)
    rotary = turns.cos().to(u.dtype), turns.sin().to(u.dtype)
    return attention(u, rotary, rows, state, output_attentions)


def turn(x, place):
    """Rotate the feature pairs of one head; an odd last feature is unchanged."""
    half = len(x) // 2
    first, second, rest = x.split([half, half, len(x) % 2])
    angle = angles(torch.tensor(place), len(x))
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), rest])


def normalised(norm, x):
    return norm.weight * x / (x.square().mean() + norm.eps).sqrt()


def attend_by_loop(attention, u, window):
    """Return (output `[M, hidden_size]`, weights `[H, M, M]`) of one segment `[M, hidden_size]`."""
    heads = attention.config.num_attention_heads
    query, key, value = (
        (u @ project.weight.T).unflatten(-1, (-1, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    group = heads // key.shape[1]
    weights, outputs = torch.zeros(heads, len(u), len(u), dtype=u.dtype), []
    for i in range(len(u)):
        first = 0 if window is None else max(0, i - window + 1)
        mixed = []
        for head in range(heads):
            turned = turn(normalised(attention.q_norm, query[i, head]), i)
            keys = [normalised(attention.k_norm, key[j, head // group]) for j in range(first, i + 1)]
            scores = [turned @ turn(one, j) for j, one in enumerate(keys, start=first)]
            shares = (torch.stack(scores) / math.sqrt(attention.head_dim)).softmax(dim=0)
            weights[head, i, first : i + 1] = shares.detach()
            mixed.append(shares @ value[first : i + 1, head // group])
        outputs.append(torch.cat(mixed))
    return torch.stack(outputs), weights


@pytest.mark.parametrize("heads", HEADS)
def test_rotary_embedding(heads):
    attention, places = make_attention(None, heads), torch.tensor([[0, 1, 2, 300], [7, 0, 1, 40]])
    cos, sin = RotaryEmbedding(attention.config)(torch.zeros(2, 4, 1), places)
    turns = angles(places, attention.head_dim).repeat(1, 1, 2)
    assert cos.shape == sin.shape == turns.shape
    assert torch.allclose(cos.double(), turns.cos(), atol=1e-4) and torch.allclose(
        sin.double(), turns.sin(), atol=1e-4
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [1, 2, 13])
def test_equals_the_loop(heads, window, length):
    attention = make_attention(window, heads)
    u = draw(attention, 2, length)
    with torch.no_grad():
        y, weights = attend(attention, u, output_attentions=True)
        expected = [attend_by_loop(attention, row, window) for row in u]
    assert torch.allclose(y, torch.stack([one[0] for one in expected]), **STRICT)
    assert torch.allclose(weights, torch.stack([one[1] for one in expected]), **STRICT)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(()).double(), **STRICT)


def outputs_and_gradients(attention, u, run):
    u = u.detach().to(attention.q_proj.weight.dtype).requires_grad_()
    y = run(attention, u)
    scale = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * scale).sum(), [u, *attention.parameters()])]


@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_equal_those_of_the_loop(window):
    attention = make_attention(window, "odd")
    u = draw(attention, 2, 13)
    found = outputs_and_gradients(attention, u, lambda *inputs: attend(*inputs)[0])
    expected = outputs_and_gradients(
        attention, u, lambda attention, u: torch.stack([attend_by_loop(attention, row, window)[0] for row in u])
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, **STRICT)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_equals_eager_in_fp32(heads, window, packed):
    segments = torch.tensor([[0] * 9 + [1] * 20, [0] * 29])
    rows = make_row_layout(2, 29, CPU, segment_ids=segments if packed else None)
    results = []
    for implementation in ("eager", "sdpa"):
        attention = make_attention(window, heads, implementation, torch.float32)
        assert attention.config._attn_implementation == implementation
        u = draw(attention, 2, 29)
        results.append(outputs_and_gradients(attention, u, lambda *inputs: attend(*inputs, rows)[0]))
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 2e-5 * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("window", WINDOWS)
def test_returned_weights_reproduce_the_output(window):
    attention = make_attention(window, implementation="sdpa")
    u = draw(attention, 2, 13)
    with torch.no_grad():
        y, none = attend(attention, u)
        again, weights = attend(attention, u, output_attentions=True)
        value = attention.v_proj(u).unflatten(-1, (-1, attention.head_dim)).repeat_interleave(2, dim=2)
        mixed = weights @ value.transpose(1, 2)
    assert none is None and torch.allclose(again, y, **STRICT)
    assert torch.allclose(mixed.transpose(1, 2).flatten(2), y, **STRICT)


@pytest.mark.parametrize("window", WINDOWS)
def test_segments_are_independent(window):
    attention = make_attention(window)
    u, lengths = draw(attention, 2, 30), [[1, 4, 9, 5, 11], [12, 18]]
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    rows = make_row_layout(2, 30, CPU, segment_ids=segments)
    with torch.no_grad():
        y, weights = attend(attention, u, rows, output_attentions=True)
        for row in range(2):
            start = 0
            for piece in u[row].split(lengths[row]):
                alone, its_weights = attend(attention, piece[None], output_attentions=True)
                inside = slice(start, start + len(piece))
                assert torch.allclose(y[row, inside], alone[0], **STRICT)
                assert torch.allclose(weights[row, :, inside, inside], its_weights[0], **STRICT)
                start += len(piece)
    same = segments[:, :, None] == segments[:, None]
    assert not weights.masked_fill(same[:, None], 0).any()


@pytest.mark.parametrize("sizes", [[1] * 13, [4, 1, 8]])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_any_split_into_calls(sizes, window, implementation):
    attention = make_attention(window, implementation=implementation)
    u, state, pieces = draw(attention, 2, 13), FlowCacheLayer(), []
    with torch.no_grad():
        expected, weights = attend(attention, u, output_attentions=True)
        start = 0
        for piece in u.split(sizes, dim=1):
            state.start_forward(2, piece.shape[1], CPU)
            rows = make_row_layout(2, piece.shape[1], CPU, past=state.lengths, aligned_past=state.aligned)
            state.set_layout(rows)
            y, its_weights = attend(attention, piece, rows, state, output_attentions=implementation == "eager")
            state.finish_forward()
            pieces.append(y)
            stop = start + piece.shape[1]
            if implementation == "eager":
                assert torch.allclose(its_weights, weights[:, :, start:stop, :stop], **STRICT)
            start = stop
    assert torch.allclose(torch.cat(pieces, dim=1), expected, **STRICT)


@pytest.mark.parametrize("window", [5, None])
def test_dropout_applies_in_training_only(window):
    attention = make_attention(window)
    attention.config.attention_dropout = 0.5
    u = draw(attention, 2, 13)
    with torch.no_grad():
        plain = attend(attention, u)[0]
        assert torch.equal(attend(attention, u)[0], plain)
        attention.train()
        assert not torch.allclose(attend(attention, u)[0], plain)
