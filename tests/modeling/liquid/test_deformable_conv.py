"""Deformable convolution against nn.Conv1d and a loop over entities and taps."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfn_hf import DeformableConv1d, OptimizedGatedConvolution
from dfn_hf.modeling.modules.cache import FlowCacheLayer
from dfn_hf.modeling.modules.row_layout import make_row_layout

CPU = torch.device("cpu")
CHANNELS, OUTPUTS = 3, 4
STRICT = {"atol": 1e-10, "rtol": 0}
SHAPES = [(1, 1), (3, 1), (3, 3), (5, 2)]  # taps and dilation
shapes = pytest.mark.parametrize(("kernel_size", "dilation"), SHAPES)
sides = pytest.mark.parametrize("causal", [False, True])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_conv(kernel_size, dilation, causal, max_offset=2.0, scale=1.0):
    """Create a convolution; `scale` multiplies the weights of the offsets, which saturate at large values."""
    torch.manual_seed(0)
    conv = DeformableConv1d(CHANNELS, OUTPUTS, kernel_size, dilation, max_offset, causal)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn_like(parameter))
        if conv.offset_conv is not None:
            conv.offset_conv.weight *= scale
    return conv.double()


def tap_displacements(conv):
    last = conv.kernel_size - 1 if conv.causal else conv.kernel_size // 2
    return [conv.dilation * (tap - last) for tap in range(conv.kernel_size)]


def plain_conv(conv, x):
    """Apply nn.Conv1d with the same weights to `[B, M, C]`, padded on both sides or on the left."""
    places = tap_displacements(conv)
    plain = nn.Conv1d(CHANNELS, OUTPUTS, conv.kernel_size, dilation=conv.dilation).double()
    with torch.no_grad():
        plain.weight.copy_(conv.tap_proj.weight.unflatten(1, (-1, CHANNELS)).transpose(1, 2))
        plain.bias.copy_(conv.tap_proj.bias)
    return plain(F.pad(x, (0, 0, -places[0], places[-1])).transpose(1, 2)).transpose(1, 2)


def entity(row, place):
    """Return an entity of the row `[length, C]`; zero outside."""
    return row[place] if 0 <= place < len(row) else row.new_zeros(row.shape[1])


def offsets_by_loop(conv, row):
    """Compute Δ of one row, `[length, T]`, from the docstring."""
    taps, places = conv.kernel_size, tap_displacements(conv)
    first = 1 - taps if conv.causal else -(taps // 2)
    offsets = []
    for i in range(len(row)):
        seen = torch.stack([entity(row, i + first + tap) for tap in range(taps)], dim=1)  # [C, T]
        raw = (conv.offset_conv.weight * seen).sum(dim=(1, 2)) + conv.offset_conv.bias
        if conv.causal:
            bounds = torch.tensor([min(conv.max_offset, -place) for place in places[:-1]], dtype=row.dtype)
            offsets.append(torch.cat([bounds * raw[:-1].tanh(), -conv.max_offset * raw[-1:].sigmoid()]))
        else:
            offsets.append(conv.max_offset * raw.tanh())
    return torch.stack(offsets)


def convolve_by_loop(conv, row, offsets):
    """Convolve one row `[length, C]` with offsets `[length, T]`."""
    weight = conv.tap_proj.weight.unflatten(1, (-1, CHANNELS))
    outputs = []
    for i in range(len(row)):
        y = conv.tap_proj.bias
        for tap, displacement in enumerate(tap_displacements(conv)):
            place = i + displacement + offsets[i, tap]
            left = math.floor(place)
            fraction = place - left
            y = y + weight[:, tap] @ ((1 - fraction) * entity(row, left) + fraction * entity(row, left + 1))
        outputs.append(y)
    return torch.stack(outputs)


def before(conv, x):
    """Return x as `convolve` expects it, and the number of preceding entities."""
    history = conv.history if conv.causal else 0
    return F.pad(x, (0, 0, history, 0)), history


# Zero offsets


@sides
@pytest.mark.parametrize(("kernel_size", "dilation"), [*SHAPES, (2, 1), (4, 2)])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_zero_offsets_equal_a_convolution(causal, kernel_size, dilation, length):
    conv, x = make_conv(kernel_size, dilation, causal), draw(2, length, CHANNELS)
    expected = plain_conv(conv, x)
    padded, history = before(conv, x)
    zeros = torch.zeros(2, length, kernel_size, dtype=x.dtype)
    assert torch.allclose(conv.convolve(padded, zeros, history), expected, **STRICT)
    assert torch.allclose(conv.convolve(padded, None, history), expected, **STRICT)
    fixed = make_conv(kernel_size, dilation, causal, max_offset=0)
    assert fixed.offset_conv is None
    assert torch.allclose(fixed(x, make_row_layout(2, length, CPU)), plain_conv(fixed, x), **STRICT)


@shapes
def test_zero_offset_weights_equal_a_two_sided_convolution(kernel_size, dilation):
    conv, x = make_conv(kernel_size, dilation, causal=False), draw(2, 17, CHANNELS)
    nn.init.zeros_(conv.offset_conv.weight)
    nn.init.zeros_(conv.offset_conv.bias)
    assert torch.allclose(conv(x, make_row_layout(2, 17, CPU)), plain_conv(conv, x), **STRICT)


# Offsets


@sides
@shapes
@pytest.mark.parametrize("reach", [0.9, 4, 40])
def test_any_offsets_equal_the_loop(causal, kernel_size, dilation, reach):
    conv, x = make_conv(kernel_size, dilation, causal, max_offset=reach), draw(2, 11, CHANNELS)
    offsets = reach * draw(2, 11, kernel_size, seed=1).tanh()
    if causal:
        last = torch.tensor(tap_displacements(conv)).double()
        offsets = torch.minimum(offsets, -last)
        offsets[..., -1] = -offsets[..., -1].abs()
    padded, history = before(conv, x)
    found = conv.convolve(padded, offsets, history)
    for row in range(2):
        assert torch.allclose(found[row], convolve_by_loop(conv, x[row], offsets[row]), **STRICT)


@sides
@shapes
@pytest.mark.parametrize("max_offset", [0.5, 2, 3.3])
@pytest.mark.parametrize("scale", [1, 1e4])
def test_padded_rows_equal_the_loop(causal, kernel_size, dilation, max_offset, scale):
    conv = make_conv(kernel_size, dilation, causal, max_offset, scale)
    lengths, x = [1, 5, 13, 2], draw(4, 15, CHANNELS)
    mask = torch.arange(15) < torch.tensor(lengths)[:, None]
    x = torch.where(mask[..., None], x, math.nan)
    with torch.no_grad():
        found = conv(x, make_row_layout(4, 15, CPU, mask=mask))
        for row, length in enumerate(lengths):
            real = x[row, :length]
            offsets = offsets_by_loop(conv, real)
            assert torch.allclose(found[row, :length], convolve_by_loop(conv, real, offsets), **STRICT)


def test_even_kernels_predict_offsets_from_their_taps():
    conv, x = make_conv(4, 1, causal=False), draw(1, 9, CHANNELS)
    with torch.no_grad():
        expected = convolve_by_loop(conv, x[0], offsets_by_loop(conv, x[0]))
        assert torch.allclose(conv(x, make_row_layout(1, 9, CPU))[0], expected, **STRICT)


@sides
@pytest.mark.parametrize("max_offset", [0.5, 2, 3.3])
@pytest.mark.parametrize("scale", [1, 1e4])
def test_offsets_are_bounded(causal, max_offset, scale):
    conv, x = make_conv(3, 2, causal, max_offset, scale), draw(2, 50, CHANNELS)
    padded, history = before(conv, x)
    with torch.no_grad():
        offsets = conv.offsets(padded, history)
    assert offsets.shape == (2, 50, 3)
    assert offsets.abs().max() <= max_offset and offsets.std() > 0.1 * max_offset
    places = torch.tensor(tap_displacements(conv)) + offsets
    if causal:
        assert (places <= 0).all() and (places >= -conv.history).all()
        assert (offsets[..., :-1] > 0).any() and (offsets[..., :-1] < 0).any()
    else:
        assert (places > 0).any() and (places < 0).any()


@sides
@shapes
def test_gradients_equal_those_of_linear_interpolation(causal, kernel_size, dilation):
    conv = make_conv(kernel_size, dilation, causal)
    x = draw(1, 5, CHANNELS)
    # Offsets that are not near integers, where the derivative jumps.
    offsets = torch.randint(-4, 4, (1, 5, kernel_size), generator=torch.Generator().manual_seed(0)).double()
    if causal:
        offsets = offsets.clamp(max=-1) - torch.tensor(tap_displacements(conv))
    offsets = offsets + 0.25 + 0.5 * torch.rand(offsets.shape, generator=torch.Generator().manual_seed(1)).double()
    padded, history = before(conv, x)
    padded, offsets = padded.requires_grad_(), offsets.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, offsets: conv.convolve(x, offsets, history), (padded, offsets))


@sides
def test_every_parameter_has_a_gradient(causal):
    conv, x = make_conv(3, 2, causal), draw(2, 17, CHANNELS)
    y = conv(x, make_row_layout(2, 17, CPU))
    (y * draw(*y.shape, seed=1)).sum().backward()
    for parameter in (*conv.offset_conv.parameters(), *conv.tap_proj.parameters()):
        gradient = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[:, None]
        assert gradient.abs().amax(dim=1).min() > 1e-4


# Causality and cache


@shapes
@pytest.mark.parametrize("max_offset", [0, 0.5, 2, 3.3])
@pytest.mark.parametrize("scale", [1, 1e4])
def test_causal_convolution_ignores_later_entities(kernel_size, dilation, max_offset, scale):
    conv, x = make_conv(kernel_size, dilation, True, max_offset, scale), draw(2, 17, CHANNELS).requires_grad_()
    rows = make_row_layout(2, 17, CPU)
    y = conv(x, rows)
    for t in (4, 8, 16):
        changed = x.detach().clone()
        changed[:, t:] = draw(2, 17 - t, CHANNELS, seed=1)
        assert torch.equal(conv(changed, rows)[:, :t], y[:, :t])
        (gradient,) = torch.autograd.grad(y[:, :t].square().sum(), x, retain_graph=True)
        assert gradient[:, :t].any() and not gradient[:, t:].any()


def test_causal_gradients_do_not_reach_later_entities():
    conv, x = make_conv(3, 2, causal=True), draw(2, 17, CHANNELS)
    changed = torch.cat([x[:, :8], draw(2, 9, CHANNELS, seed=1)], dim=1)
    offsets = (-torch.tensor(tap_displacements(conv)).double()).expand(2, 17, 3).clone().requires_grad_()
    gradients = []
    for one in (x, changed):
        padded, history = before(conv, one)
        y = conv.convolve(padded, offsets, history)
        gradients.append(torch.autograd.grad(y[:, :8].square().sum(), offsets)[0])
    assert torch.equal(*gradients)


def test_encoder_convolution_reads_both_sides():
    conv, x = make_conv(3, 1, causal=False), draw(1, 17, CHANNELS).requires_grad_()
    (gradient,) = torch.autograd.grad(conv(x, make_row_layout(1, 17, CPU))[0, 8].sum(), x)
    assert gradient[0, :8].any() and gradient[0, 9:].any()


def feed(module, x, counts_per_call):
    """Run rows through a causal module call by call; return the outputs of each row."""
    state, done = FlowCacheLayer(), [0] * len(x)
    pieces = [[] for _ in x]
    for counts in counts_per_call:
        width = max(counts)
        mask = torch.arange(width) < torch.tensor(counts)[:, None]
        state.start_forward(len(x), width, CPU)
        rows = make_row_layout(len(x), width, CPU, mask=mask, past=state.lengths, aligned_past=state.aligned)
        state.set_layout(rows)
        new = torch.full((len(x), width, x.shape[-1]), 9.0, dtype=x.dtype)
        for row, count in enumerate(counts):
            new[row, :count] = x[row, done[row] : done[row] + count]
        with torch.no_grad():
            y = module(new, rows, state)
        state.finish_forward()
        for row, count in enumerate(counts):
            pieces[row].append(y[row, :count])
            done[row] += count
    assert done == [x.shape[1]] * len(x)
    return torch.stack([torch.cat(row) for row in pieces])


SPLITS = {
    "steps": [[1, 1]] * 29,
    "chunks": [[3, 3], [1, 1], [9, 9], [4, 4], [12, 12]],
    "ragged": [[3, 0], [0, 11], [13, 1], [1, 8], [12, 9]],
}


@shapes
@pytest.mark.parametrize("max_offset", [0, 0.5, 2, 3.3])
@pytest.mark.parametrize("split", SPLITS)
def test_any_split_gives_equal_outputs(kernel_size, dilation, max_offset, split):
    conv, x = make_conv(kernel_size, dilation, True, max_offset, scale=10), draw(2, 29, CHANNELS)
    with torch.no_grad():
        whole = conv(x, make_row_layout(2, 29, CPU))
    assert torch.allclose(feed(conv, x, SPLITS[split]), whole, **STRICT)


# Precision and gating


@sides
def test_offsets_are_at_least_float32(causal):
    conv, x = make_conv(3, 1, causal).bfloat16(), draw(1, 9, CHANNELS).bfloat16()
    padded, history = before(conv, x)
    assert conv.offsets(padded, history).dtype == torch.float32
    assert conv(x, make_row_layout(1, 9, CPU)).dtype == torch.bfloat16


def make_gated(causal):
    torch.manual_seed(0)
    gated = OptimizedGatedConvolution(CHANNELS, 3, 2, 1.5, causal, norm_eps=1e-3)
    with torch.no_grad():
        for parameter in gated.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return gated.double()


@sides
def test_gated_convolution_equals_its_formula(causal):
    gated, x, rows = make_gated(causal), draw(2, 9, CHANNELS), make_row_layout(2, 9, CPU)
    conv = gated.deform_conv
    assert (conv.dilation, conv.max_offset, conv.causal) == (2, 1.5, causal)
    with torch.no_grad():
        found, both = gated(x, rows), conv(x, rows)
        main, gate = both[..., :CHANNELS], both[..., CHANNELS:]
        product = main * 0.5 * (1 + torch.erf(main / math.sqrt(2))) / (1 + (-gate).exp())
        centred = product - product.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt()
        assert torch.allclose(found, gated.norm.weight * scaled + gated.norm.bias, **STRICT)


@pytest.mark.parametrize("split", SPLITS)
def test_any_split_gives_equal_gated_outputs(split):
    gated, x = make_gated(causal=True), draw(2, 29, CHANNELS)
    with torch.no_grad():
        whole = gated(x, make_row_layout(2, 29, CPU))
    assert torch.allclose(feed(gated, x, SPLITS[split]), whole, **STRICT)


def test_dropout_is_active_in_training_only():
    gated, x = OptimizedGatedConvolution(CHANNELS, 3, dropout=0.5).double(), draw(2, 9, CHANNELS)
    rows = make_row_layout(2, 9, CPU)
    assert (gated(x, rows) == 0).any()
    assert not (gated.eval()(x, rows) == 0).any()
