"""Frequency attention against a loop over frames, bands and heads."""

import math

import pytest
import torch

from dfn_hf import FrequencyHyenaAttention
from dfn_hf.modeling.liquid import frequency_attention as module
from dfn_hf.modeling.liquid.spectral_frames import RowFrames, octave_bands
from dfn_hf.modeling.modules.row_layout import make_row_layout

CPU = torch.device("cpu")
SIZE, HEADS = 6, 2
STRICT = {"atol": 1e-10, "rtol": 0}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_attention(frame_length, dropout=0.0):
    torch.manual_seed(0)
    attention = FrequencyHyenaAttention(SIZE, frame_length, HEADS, dropout)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return attention.double().eval()


def layer_norm(norm, x):
    mean, variance = x.mean(dim=-1, keepdim=True), x.var(dim=-1, unbiased=False, keepdim=True)
    return norm.weight * (x - mean) / (variance + norm.eps).sqrt() + norm.bias


def attend_band_by_loop(attend, magnitude):
    """Attend over the bins of one band of one frame, `[bins, D]`."""
    h = layer_norm(attend.norm, magnitude @ attend.proj.weight.T + attend.proj.bias)
    size = SIZE // HEADS
    heads = []
    for head in range(HEADS):
        rows = slice(head * size, (head + 1) * size)
        query, key, value = (h @ linear.weight[rows].T for linear in (attend.q_proj, attend.k_proj, attend.v_proj))
        heads.append((query @ key.T / math.sqrt(size)).softmax(dim=-1) @ value)
    return torch.cat(heads, dim=-1) @ attend.o_proj.weight.T


def attend_by_loop(attention, frame):
    """Attend within one frame `[L, D]`."""
    spectrum = torch.fft.rfft(frame, dim=0)
    energy = spectrum.abs().square()
    size = (energy + max(module.PHASE_FLOOR**2 * energy.mean(), module.MIN_ENERGY)).sqrt()
    bands = [
        attend_band_by_loop(attend, size[band]) * (spectrum / size)[band]
        for attend, band in zip(attention.attention, octave_bands(len(spectrum)), strict=True)
    ]
    return torch.fft.irfft(torch.cat(bands), n=len(frame), dim=0)


@pytest.mark.parametrize("frame_length", [2, 4, 8, 16, 64])
def test_equals_the_loop(frame_length):
    attention, frames = make_attention(frame_length), draw(2, 3, frame_length, SIZE)
    frames[0, 1] *= 1e-4
    with torch.no_grad():
        found = attention(frames)
        expected = torch.stack([torch.stack([attend_by_loop(attention, frame) for frame in row]) for row in frames])
    assert torch.allclose(found, expected, **STRICT)
    assert found.abs().amax(dim=(2, 3)).min() > 0.01


def test_gradients_equal_those_of_the_loop():
    attention, frames = make_attention(16), draw(1, 2, 16, SIZE).requires_grad_()
    scale = draw(1, 2, 16, SIZE, seed=1)
    expected = torch.stack([attend_by_loop(attention, frame) for frame in frames[0]])[None]
    wanted = [frames, *attention.attention.parameters()]
    gradients = [torch.autograd.grad((y * scale).sum(), wanted) for y in (attention(frames), expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, **STRICT)


@pytest.mark.parametrize("length", [17, 27, 32])
def test_one_frame_equals_the_transform_of_the_paper(length, monkeypatch):
    """The paper pads with zeros to 2^⌈log₂ length⌉ and computes O = A ⊙ e^{iΦ} from the magnitudes, without floors."""
    monkeypatch.setattr(module, "PHASE_FLOOR", 0.0)
    monkeypatch.setattr(module, "MIN_ENERGY", 0.0)
    attention, x = make_attention(32), draw(1, length, SIZE)
    framing = RowFrames(32, make_row_layout(1, length, CPU))
    spectrum = torch.fft.fft(
        torch.nn.functional.pad(x[0], (0, 0, 0, 2 ** math.ceil(math.log2(length)) - length)), dim=0
    )
    with torch.no_grad():
        found = framing.join(attention(framing.split(x, coarse=True)), coarse=True)
        half = [
            torch.polar(torch.ones(()).double(), spectrum[band].angle())
            * attend_band_by_loop(attend, spectrum[band].abs())
            for attend, band in zip(attention.attention, attention.bands, strict=True)
        ]
    half = torch.cat(half)
    whole = torch.cat([half, half[1:-1].flip(0).conj()])  # the spectrum of a real signal is Hermitian
    whole[0], whole[16] = whole[0].real, whole[16].real
    expected = torch.fft.ifft(whole, dim=0)
    assert expected.imag.abs().max() < 1e-12
    assert torch.allclose(found[0], expected.real[:length], **STRICT)


def test_frames_are_independent():
    attention, frames = make_attention(16), draw(2, 3, 16, SIZE)
    changed = frames.clone()
    changed[0, 1] = 5
    with torch.no_grad():
        before, after = attention(frames), attention(changed)
    same = torch.ones(2, 3, dtype=torch.bool)
    same[0, 1] = False
    assert torch.equal(before[same], after[same]) and not torch.allclose(before[0, 1], after[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_frames_stay_zero_and_have_finite_gradients(dtype):
    attention, frames = make_attention(16).to(dtype), draw(2, 3, 16, SIZE).to(dtype)
    frames[:, 1] = 0
    frames.requires_grad_()
    y = attention(frames)
    assert not y[:, 1].any() and y[:, 0].any()
    attention.project(y).square().sum().backward()
    assert frames.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
def test_frames_of_any_scale_stay_finite(scale):
    attention, frames = make_attention(16).float(), (scale * draw(1, 2, 16, SIZE)).float().requires_grad_()
    y = attention(frames)
    y.square().sum().backward()
    assert y.isfinite().all() and frames.grad.isfinite().all()


def test_every_parameter_has_a_gradient():
    attention = make_attention(32)
    y = attention.project(attention(draw(2, 3, 32, SIZE)))
    (y * draw(*y.shape, seed=1)).sum().backward()
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in attention.parameters())


def test_project_is_a_linear_map_and_a_norm():
    attention, x = make_attention(8), draw(2, 5, SIZE)
    expected = layer_norm(attention.norm, x @ attention.out_proj.weight.T + attention.out_proj.bias)
    assert torch.allclose(attention.project(x), expected, **STRICT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_weights_are_close(dtype):
    attention, frames = make_attention(32).float(), draw(2, 3, 32, SIZE).to(dtype)
    with torch.no_grad():
        expected = attention(frames.float())
        found = attention.bfloat16()(frames)
    assert found.dtype == torch.float32
    assert (found - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()


def test_dropout_is_active_in_training_only():
    attention, frames = make_attention(16, dropout=0.5), draw(1, 2, 16, SIZE)
    with torch.no_grad():
        plain = attention(frames)
        assert torch.equal(attention(frames), plain)
        assert not torch.allclose(attention.train()(frames), plain)
