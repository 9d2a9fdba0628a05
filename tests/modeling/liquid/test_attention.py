"""Window attention and cross-attention of Liquid against dense attention with a mask."""

import math

import pytest
import torch

from dfn_hf import EnhancedLocalAttentionWithGQA, LiquidConfig
from dfn_hf.modeling.liquid.attention import CrossAttention
from dfn_hf.modeling.modules.cache import FlowCacheLayer
from dfn_hf.modeling.modules.row_layout import make_row_layout
from dfn_hf.modeling.modules.windowed_attention import RotaryEmbedding

CPU = torch.device("cpu")
STRICT = {"atol": 1e-10, "rtol": 0}
# Query heads, key-value heads, features per head.
HEADS = {"plain": (2, 2, 4), "grouped": (4, 2, 4), "one key": (3, 1, 6)}
WINDOWS = [1, 2, 5, 50]
LENGTHS = [1, 2, 7, 13, 21]
heads = pytest.mark.parametrize("heads", HEADS)
windows = pytest.mark.parametrize("window", WINDOWS)
sides = pytest.mark.parametrize("two_sided", [True, False])
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_config(heads="grouped", window=5, implementation="eager"):
    num_heads, key_value_heads, head_dim = HEADS[heads]
    return LiquidConfig(
        hidden_size=num_heads * head_dim,
        num_attention_heads=num_heads,
        num_key_value_heads=key_value_heads,
        attention_window=window,
        attn_implementation=implementation,
    )


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module.double().eval()


def make_attention(two_sided, heads="grouped", window=5, implementation="eager"):
    return randomise(EnhancedLocalAttentionWithGQA(make_config(heads, window, implementation), two_sided))


def rotary_of(config, index):
    return tuple(turn.double() for turn in RotaryEmbedding(config)(torch.zeros(1), index))


def attend(attention, u, rows=None, state=None, output_attentions=False):
    rows = make_row_layout(*u.shape[:2], CPU) if rows is None else rows
    rotary = rotary_of(attention.attention.config, rows.positions)
    return attention(u, rotary, rows, state, output_attentions)


def project(attention, linear, norm, x):
    """Project one row `[length, hidden_size]` to `[H, length, head_dim]`, with keys repeated per group."""
    y = (x @ linear.weight.T).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
    if norm is not None:
        y = norm.weight * y / (y.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    return y.repeat_interleave(attention.config.num_attention_heads // len(y), dim=0)


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend_masked(query, key, value, seen, o_proj):
    """Return outputs `[M, hidden_size]` and weights `[H, M, N]`, which are 0 where `seen` bool `[M, N]` is False."""
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    return (weights @ value).transpose(0, 1).flatten(1) @ o_proj.weight.T + o_proj.bias, weights


def attend_densely(attention, u, two_sided, window):
    """Attend within one row `[length, hidden_size]`."""
    inner = attention.attention
    places = torch.arange(len(u))
    age = places[:, None] - places
    seen = (age < window) & ((age > -window) if two_sided else (age >= 0))
    cos, sin = (turn[0] for turn in rotary_of(inner.config, places[None]))
    query = rotate(project(inner, inner.q_proj, inner.q_norm, u), cos, sin)
    key = rotate(project(inner, inner.k_proj, inner.k_norm, u), cos, sin)
    return attend_masked(query, key, project(inner, inner.v_proj, None, u), seen, attention.o_proj)


@sides
@heads
@windows
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_dense_attention(two_sided, heads, window, length):
    attention = make_attention(two_sided, heads, window)
    u = draw(2, length, attention.attention.config.hidden_size)
    with torch.no_grad():
        y, weights = attend(attention, u, output_attentions=True)
        expected = [attend_densely(attention, row, two_sided, window) for row in u]
    assert torch.allclose(y, torch.stack([one for one, _ in expected]), **STRICT)
    assert torch.allclose(weights, torch.stack([one for _, one in expected]), **STRICT)


@sides
@windows
@implementations
def test_gradients_equal_those_of_dense_attention(two_sided, window, implementation):
    attention = make_attention(two_sided, "grouped", window, implementation)
    u = draw(2, 13, 16).requires_grad_()
    wanted, scale = [u, *attention.parameters()], draw(2, 13, 16, seed=1)
    y = attend(attention, u)[0], torch.stack([attend_densely(attention, row, two_sided, window)[0] for row in u])
    for one, other in zip(*(torch.autograd.grad((one * scale).sum(), wanted) for one in y), strict=True):
        assert torch.allclose(one, other, **STRICT)


@sides
@heads
@windows
@implementations
def test_rows_of_any_length_equal_dense_attention(two_sided, heads, window, implementation):
    attention = make_attention(two_sided, heads, window, implementation)
    lengths, with_weights = [21, 1, 6, 12], implementation == "eager"
    u = draw(4, 23, attention.attention.config.hidden_size)
    mask = torch.arange(23) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        y, weights = attend(attention, u, make_row_layout(4, 23, CPU, mask=mask), output_attentions=with_weights)
        assert (weights is None) != with_weights
        for row, length in enumerate(lengths):
            expected, its_weights = attend_densely(attention, u[row, :length], two_sided, window)
            assert torch.allclose(y[row, :length], expected, **STRICT)
            if with_weights:
                assert torch.allclose(weights[row, :, :length, :length], its_weights, **STRICT)
                assert not weights[row, :, :length, length:].any()


@windows
def test_encoder_window_is_symmetric(window):
    attention, u = make_attention(True, window=window), draw(1, 21, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(attend(attention, u)[0][0, 10].square().sum(), u)
    reached = [place for place in range(21) if gradient[0, place].any()]
    assert reached == [place for place in range(21) if abs(place - 10) < window]


@windows
@pytest.mark.parametrize("sizes", [[1] * 21, [4, 1, 8, 8]])
def test_decoder_calls_with_a_cache_equal_one_call(window, sizes):
    attention, u, state, pieces = make_attention(False, window=window), draw(2, 21, 16), FlowCacheLayer(), []
    with torch.no_grad():
        for piece in u.split(sizes, dim=1):
            state.start_forward(2, piece.shape[1], CPU)
            rows = make_row_layout(2, piece.shape[1], CPU, past=state.lengths, aligned_past=state.aligned)
            state.set_layout(rows)
            pieces.append(attend(attention, piece, rows, state)[0])
            state.finish_forward()
        assert torch.allclose(torch.cat(pieces, dim=1), attend(attention, u)[0], **STRICT)


# Cross-attention


def make_cross_attention(heads="grouped", implementation="eager"):
    return randomise(CrossAttention(make_config(heads, implementation=implementation)))


def cross(attention, x, source, mask, state=None, output_attentions=False, start=0):
    """Cross-attend from x, whose positions begin at `start`."""
    places = torch.arange(start, start + x.shape[1])[None]
    of_source = torch.arange(source.shape[1])[None] if mask is None else mask.long().cumsum(dim=1) - 1
    rotary, source_rotary = (rotary_of(attention.config, index) for index in (places, of_source))
    rows = make_row_layout(*x.shape[:2], CPU)
    return attention(x, rotary, source, source_rotary, mask, rows, state, output_attentions)


def cross_densely(attention, x, source):
    """Attend from one row `[M, hidden_size]` to its real source tokens `[S, hidden_size]`."""
    rotary, source_rotary = (
        [turn[0] for turn in rotary_of(attention.config, torch.arange(len(one))[None])] for one in (x, source)
    )
    query = rotate(project(attention, attention.q_proj, attention.q_norm, x), *rotary)
    key = rotate(project(attention, attention.k_proj, attention.k_norm, source), *source_rotary)
    value = project(attention, attention.v_proj, None, source)
    return attend_masked(query, key, value, torch.ones(len(x), len(source), dtype=torch.bool), attention.o_proj)


@heads
@implementations
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("masked", [True, False])
def test_cross_attention_equals_dense_attention(heads, implementation, length, masked):
    attention = make_cross_attention(heads, implementation)
    size, with_weights = attention.config.hidden_size, implementation == "eager"
    x, source = draw(3, length, size), draw(3, 11, size, seed=1)
    mask = torch.tensor([[True] * 11, [True] + [False] * 10, [False, True] * 5 + [True]]) if masked else None
    with torch.no_grad():
        y, weights = cross(attention, x, source, mask, None, with_weights)
        for row in range(3):
            real = mask[row] if masked else torch.ones(11, dtype=torch.bool)
            expected, its_weights = cross_densely(attention, x[row], source[row, real])
            assert torch.allclose(y[row], expected, **STRICT)
            if with_weights:
                assert torch.allclose(weights[row, :, :, real], its_weights, **STRICT)
                assert not weights[row, :, :, ~real].any()
    assert (weights is None) != with_weights


@implementations
def test_gradients_of_cross_attention_equal_those_of_dense_attention(implementation):
    attention = make_cross_attention(implementation=implementation)
    x, source = draw(2, 5, 16).requires_grad_(), draw(2, 7, 16, seed=1).requires_grad_()
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    wanted, scale = [x, source, *attention.parameters()], draw(2, 5, 16, seed=2)
    expected = [cross_densely(attention, *row)[0] for row in zip(x, (source[0], source[1, :3]), strict=True)]
    outputs = cross(attention, x, source, mask)[0], torch.stack(expected)
    for one, other in zip(*(torch.autograd.grad((y * scale).sum(), wanted) for y in outputs), strict=True):
        assert torch.allclose(one, other, **STRICT) and one.any()


@implementations
def test_source_keys_are_computed_once(implementation):
    attention, state = make_cross_attention(implementation=implementation), FlowCacheLayer()
    x, source, mask = draw(2, 9, 16), draw(2, 7, 16, seed=1), torch.arange(7) < torch.tensor([[7], [3]])
    with torch.no_grad():
        whole, _ = cross(attention, x, source, mask)
        pieces, start = [], 0
        for piece in x.split([4, 1, 1, 3], dim=1):
            pieces.append(cross(attention, piece, source, mask, state, start=start)[0])
            start += piece.shape[1]
            source = torch.full_like(source, math.nan)  # the cached keys are used instead
    assert torch.allclose(torch.cat(pieces, dim=1), whole, **STRICT)


def test_dropout_is_active_in_training_only():
    for attention, inputs in (
        (make_attention(True), lambda one: attend(one, draw(2, 13, 16))),
        (make_cross_attention(), lambda one: cross(one, draw(2, 9, 16), draw(2, 7, 16, seed=1), None)),
    ):
        getattr(attention, "attention", attention).config.attention_dropout = 0.5
        with torch.no_grad():
            plain = inputs(attention)[0]
            assert torch.equal(inputs(attention)[0], plain)
            assert not torch.allclose(inputs(attention.train())[0], plain)
