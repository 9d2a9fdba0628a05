"""Frames, bands and adaptive low-pass filter against loops over tokens and explicit formulas."""

import math

import pytest
import torch

from dfn_hf.modeling.liquid.spectral_frames import AdaptiveLowPass, LaggedFrames, RowFrames, octave_bands
from dfn_hf.modeling.modules.cache import FlowCacheLayer
from dfn_hf.modeling.modules.row_layout import make_row_layout

CPU = torch.device("cpu")
FEATURES = 3
STRICT = {"atol": 1e-10, "rtol": 0}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(lengths, width=None):
    """Return rows with these lengths, `[B, M, D]` padded with zeros, and their `RowLayout`."""
    width = max(lengths) if width is None else width
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return draw(len(lengths), width, FEATURES) * mask[..., None], make_row_layout(len(lengths), width, CPU, mask=mask)


# Bands


@pytest.mark.parametrize("num_bins", [2, 3, 5, 9, 17, 33, 65, 1025])
def test_octave_bands_partition_the_bins_without_one_bin_bands(num_bins):
    bands = octave_bands(num_bins)
    assert [bin for band in bands for bin in range(band.start, band.stop)] == list(range(num_bins))
    assert all(band.stop - band.start >= 2 for band in bands)
    assert bands[-1].stop == num_bins  # the Nyquist bin is in the last band


def test_octave_bands_double():
    assert octave_bands(33) == [slice(0, 4), slice(4, 8), slice(8, 16), slice(16, 33)]
    assert octave_bands(9) == [slice(0, 4), slice(4, 9)]
    assert octave_bands(5) == [slice(0, 5)] and octave_bands(3) == [slice(0, 3)]


# Frames of complete rows


def row_lengths(size):
    return [1, 2, size - 1, size, size + 1, size + size // 2, 2 * size, 3 * size + 5, 7 * size - 1, size**2 + size + 3]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("place", range(10))
def test_frames_reconstruct_a_row(size, place):
    length = row_lengths(size)[place]
    x, rows = draw(2, length, FEATURES), make_row_layout(2, length, CPU)
    framing = RowFrames(size, rows)
    frames = framing.split(x, coarse=False)
    assert frames.shape[2:] == (size, FEATURES)
    assert torch.allclose(framing.join(frames, coarse=False), x, **STRICT)


@pytest.mark.parametrize("size", [4, 8])
def test_frames_reconstruct_rows_of_any_lengths(size):
    x, rows = batch_of(row_lengths(size), width=size**2 + 4 * size)
    framing = RowFrames(size, rows)
    assert framing.lengths.tolist() == row_lengths(size)
    joined = framing.join(framing.split(x, coarse=False), coarse=False)
    assert torch.allclose(joined[rows.token_mask()], x[rows.token_mask()], **STRICT)


def frames_by_loop(row, size, coarse):
    """Return the frames of one row `[length, D]` without padding frames, from the docstring."""
    length, hop = len(row), size // 2
    if length <= size:
        return [torch.cat([row, row.new_zeros(size - length, FEATURES)])]
    window = [math.sin(math.pi * place / size) ** 2 for place in range(size)]
    frames = []
    for start in range(-hop, length, hop):
        frame = row.new_zeros(size, FEATURES)
        for place in range(size):
            if 0 <= start + place < length:
                frame[place] = window[place] * row[start + place]
        frames.append(frame)
    if coarse:
        span = size * math.ceil(length / size**2)
        frame = row.new_zeros(size, FEATURES)
        for number, start in enumerate(range(0, length, span)):
            frame[number] = row[start : start + span].mean(dim=0)
        frames.append(frame)
    return frames


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("size", [4, 8])
def test_frames_equal_the_loop(size, coarse):
    lengths = row_lengths(size) + [2 * size**2, 2 * size**2 + 1]
    x, rows = batch_of(lengths)
    frames = RowFrames(size, rows).split(x, coarse)
    for row, length in enumerate(lengths):
        expected = torch.stack(frames_by_loop(x[row, :length], size, coarse))
        if length <= size:
            found = frames[row, :1]
        else:
            found = frames[row, 1 : 1 + len(expected) - coarse]
            found = torch.cat([found, frames[row, -1:]]) if coarse else found
        assert torch.allclose(found, expected, **STRICT)


def test_short_rows_have_one_frame():
    x, rows = batch_of([1, 5, 8, 7])
    for coarse in (False, True):
        frames = RowFrames(8, rows).split(x, coarse)
        assert torch.equal(frames, x[:, None])
        assert torch.equal(RowFrames(8, rows).join(frames, coarse), x)


@pytest.mark.parametrize("size", [4, 8])
def test_join_adds_the_coarse_frame_to_its_interval(size):
    lengths = row_lengths(size) + [2 * size**2 + 1]
    x, rows = batch_of(lengths)
    framing = RowFrames(size, rows)
    frames = framing.split(x, coarse=True)
    if frames.shape[1] > 1:
        frames[:, -1] = draw(len(lengths), size, FEATURES, seed=1)
    joined = framing.join(frames, coarse=True)
    for row, length in enumerate(lengths):
        expected = x[row, :length].clone()
        if length > size:
            span = size * math.ceil(length / size**2)
            for place in range(length):
                expected[place] += frames[row, -1, place // span]
        assert torch.allclose(joined[row, :length], expected, **STRICT)


def transform_frames(framing, x, coarse):
    """Split, change each frame with a map that mixes its entities, and join."""
    frames = framing.split(x, coarse)
    mix = draw(framing.frame_length, framing.frame_length, seed=2)
    return framing.join((mix @ frames).tanh(), coarse)


@pytest.mark.parametrize("coarse", [False, True])
def test_rows_are_independent_of_padding_and_other_rows(coarse):
    size = 4
    lengths = row_lengths(size) + [40]
    x, rows = batch_of(lengths, width=61)
    together = transform_frames(RowFrames(size, rows), x, coarse)
    for row, length in enumerate(lengths):
        alone = transform_frames(RowFrames(size, make_row_layout(1, length, CPU)), x[row : row + 1, :length], coarse)
        assert torch.allclose(together[row, :length], alone[0], **STRICT)


def test_gradients_stay_within_a_row():
    x, rows = batch_of([3, 9, 30], width=33)
    x.requires_grad_()
    y = transform_frames(RowFrames(4, rows), x, coarse=True)
    (gradient,) = torch.autograd.grad(y[1, :9].sum(), x)
    assert gradient[1, :9].all() and not gradient[[0, 2]].any()


# Lagged frames


def lagged_by_loop(whole, size, change=lambda frames: frames):
    """Return the value that each entity of one row `[length, D]` sees: frame ⌊t / size⌋ − 1 at offset t mod size.

    Frame −1 is zero.
    """
    completed = [whole[stop - size : stop] for stop in range(size, len(whole) + 1, size)]
    frames = [change(frame) for frame in (whole.new_zeros(size, FEATURES), *completed)]
    return torch.stack([frames[t // size][t % size] for t in range(len(whole))])


class Feed:
    """Feeds rows to lagged frames call by call, and applies `change` to the frames."""

    def __init__(self, x, size, change=lambda frames: frames):
        self.x, self.size, self.change = x, size, change
        self.state, self.done = FlowCacheLayer(), [0] * len(x)

    def __call__(self, counts):
        width, state = max(counts), self.state
        state.start_forward(len(counts), width, CPU)
        mask = torch.arange(width) < torch.tensor(counts)[:, None]
        rows = make_row_layout(len(counts), width, CPU, mask=mask, past=state.lengths, aligned_past=state.aligned)
        state.set_layout(rows)
        framing = LaggedFrames(self.size, rows)
        new = self.x.new_zeros(len(counts), width, FEATURES)
        for row, count in enumerate(counts):
            new[row, :count] = self.x[row, self.done[row] : self.done[row] + count]
        seen = framing.lag(self.change(framing.split(state.roll("frames", new, framing.history))))
        state.finish_forward()
        pieces = [seen[row, :count] for row, count in enumerate(counts)]
        self.done = [done + count for done, count in zip(self.done, counts, strict=True)]
        return pieces


def split_lagged(x, size, rows):
    framing = LaggedFrames(size, rows)
    return framing, framing.split(torch.nn.functional.pad(x, (0, 0, framing.history, 0)))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 16, 23])
def test_entities_see_the_preceding_frame_at_their_offset(size, length):
    x = draw(2, length, FEATURES)
    framing, frames = split_lagged(x, size, make_row_layout(2, length, CPU))
    assert frames.shape[2:] == (size, FEATURES) and not frames[:, 0].any()
    seen = framing.lag(frames)
    for row in range(2):
        assert torch.equal(seen[row], lagged_by_loop(x[row], size))


def test_frames_contain_real_entities_and_zeros():
    lengths = [1, 4, 7, 12]
    x, rows = batch_of(lengths, width=14)
    x = x + (~rows.token_mask())[..., None] * 7.0  # padding must not affect the frames
    _, frames = split_lagged(x, 4, rows)
    for row, length in enumerate(lengths):
        flat = frames[row, 1:].flatten(0, 1)
        assert torch.equal(flat[:length], x[row, :length]) and not flat[length:].any()


SPLITS = {
    "whole": [[29, 29]],
    "steps": [[1, 1]] * 29,
    "chunks": [[3, 3], [1, 1], [9, 9], [4, 4], [12, 12]],
    "ragged": [[3, 0], [0, 11], [13, 1], [1, 8], [12, 9]],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_any_split_gives_equal_frames(split, size):
    x = draw(2, 29, FEATURES)
    mix = draw(size, size, seed=2)
    feed = Feed(x, size, lambda frames: (mix @ frames).cos())
    pieces = [feed(counts) for counts in SPLITS[split]]
    assert feed.done == [29, 29]
    for row in range(2):
        expected = lagged_by_loop(x[row], size, feed.change)
        assert torch.allclose(torch.cat([piece[row] for piece in pieces]), expected, **STRICT)


@pytest.mark.parametrize("past", range(9))
def test_frames_continue_from_any_position(past):
    x = draw(2, past + 11, FEATURES)
    feed = Feed(x, 4)
    if past:
        feed([past, past])
    for row, found in enumerate(feed([11, 11])):
        assert torch.equal(found, lagged_by_loop(x[row], 4)[past:])


@pytest.mark.parametrize("size", [1, 4])
def test_completed_frames_have_only_real_entities(size):
    lengths = [1, 3, 4, 5, 8, 11]
    x, rows = batch_of(lengths, width=13)
    framing, frames = split_lagged(x, size, rows)
    completed = framing.completed(frames.shape[1])
    for row, length in enumerate(lengths):
        expected = [0 <= frame < length // size for frame in range(-1, frames.shape[1] - 1)]
        assert completed[row].tolist() == expected
    alone = LaggedFrames(size, make_row_layout(2, 8, CPU)).completed(8 // size + 2)
    assert alone.tolist() == [[False, *[True] * (8 // size), False]] * 2


# Low-pass filter


def low_pass_by_loop(frame, base, least):
    """Filter one frame `[L, D]` with an explicit transform; return it and its ratio."""
    length = len(frame)
    bins = length // 2 + 1
    places = torch.arange(length, dtype=torch.float64)
    turns = [2 * math.pi * k * places / length for k in range(bins)]
    cosines = torch.stack([frame.T @ turn.cos() for turn in turns])  # [K, D]
    sines = torch.stack([frame.T @ turn.sin() for turn in turns])
    energies = [float(cosines[k] @ cosines[k] + sines[k] @ sines[k]) for k in range(bins)]
    if sum(energies) == 0:
        return frame, least
    high = sum(energies[round(0.8 * (bins - 1)) :]) / sum(energies)
    local = sum(float((frame[t + 1] - frame[t]).square().sum()) for t in range(length - 1))
    total = float((frame - frame.mean(dim=0)).square().sum())
    complexity = 0.7 * high + 0.3 * local / (4 * total)
    ratio = min(max(least + (base - least) * complexity, least), 1)
    result = torch.zeros_like(frame)
    for k in range(bins):
        kept = min(max(ratio * (bins - 1) - k + 1, 0), 1)
        weight = kept * (1 if k in (0, bins - 1) else 2) / length
        result += weight * (turns[k].cos()[:, None] * cosines[k] + turns[k].sin()[:, None] * sines[k])
    return result, ratio


def smooth_and_noise(size):
    """Return a slow wave and white noise, `[1, 2, L, D]`."""
    turns = 2 * math.pi * torch.arange(size, dtype=torch.float64) / size
    wave = torch.stack([turns.sin(), turns.cos(), turns.sin() + 0.3], dim=-1)
    return torch.stack([wave, draw(size, FEATURES)])[None]


@pytest.mark.parametrize(("base", "least"), [(1.0, 0.1), (0.8, 0.3), (0.5, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("size", [2, 4, 8, 32])
def test_low_pass_equals_the_loop(size, base, least):
    frames = torch.cat([draw(2, 3, size, FEATURES), smooth_and_noise(size).view(2, 1, size, FEATURES)], dim=1)
    frames[0, 0] = 0
    found, ratio = AdaptiveLowPass(size, base, least)(frames)
    for row in range(2):
        for frame in range(4):
            expected, its_ratio = low_pass_by_loop(frames[row, frame], base, least)
            assert torch.allclose(found[row, frame], expected, **STRICT)
            assert math.isclose(ratio[row, frame], its_ratio, abs_tol=1e-10)
    assert (ratio >= least).all() and (ratio <= 1).all()


@pytest.mark.parametrize("size", [4, 32])
def test_minimum_ratio_of_1_changes_nothing(size):
    frames = draw(2, 3, size, FEATURES)
    found, ratio = AdaptiveLowPass(size, 1.0, 1.0)(frames)
    assert torch.allclose(found, frames, **STRICT) and (ratio == 1).all()


def test_ratios_are_bounded():
    size = 16
    alternating = torch.tensor([1.0, -1]).double().repeat(size // 2)[:, None].expand(size, FEATURES)
    extremes = torch.stack([alternating, torch.ones(size, FEATURES).double(), draw(size, FEATURES)])
    _, ratio = AdaptiveLowPass(size, 1.0, 0.1)(torch.cat([extremes, 1e6 * extremes, 1e-6 * extremes])[None])
    assert (ratio >= 0.1).all() and (ratio <= 1).all()
    assert torch.allclose(ratio[0, :3], ratio[0, 3:6], **STRICT)
    assert torch.allclose(ratio[0, :3], ratio[0, 6:], **STRICT)
    assert ratio[0, 0] > 0.95 and ratio[0, 1] < 0.1 + 1e-10


def test_smooth_frames_are_compressed_more_than_noise():
    _, ratio = AdaptiveLowPass(32, 1.0, 0.1)(smooth_and_noise(32))
    assert ratio[0, 0] < 0.12 and ratio[0, 1] > 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_frames_have_the_minimum_ratio_and_finite_gradients(dtype):
    frames = draw(1, 3, 8, FEATURES).to(dtype)
    frames[:, 1] = 0
    frames[:, 2] = torch.finfo(dtype).smallest_normal
    frames.requires_grad_()
    found, ratio = AdaptiveLowPass(8, 1.0, 0.25)(frames)
    (found.square().sum() + ratio.sum()).backward()
    assert ratio[0, 1] == 0.25 and not found[0, 1].any()
    assert found.isfinite().all() and frames.grad.isfinite().all()


def test_ratio_has_a_gradient():
    frames = draw(1, 2, 16, FEATURES).requires_grad_()
    low_pass = AdaptiveLowPass(16, 1.0, 0.1)
    (gradient,) = torch.autograd.grad(low_pass(frames)[1].sum(), frames)
    assert gradient.abs().amax(dim=(2, 3)).min() > 1e-4
    with torch.no_grad():
        assert (low_pass(frames)[1] * 8 % 1).min() > 1e-3  # the ramp is not differentiable at its ends
    assert torch.autograd.gradcheck(low_pass, frames)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transforms_are_at_least_float32(dtype):
    frames = draw(1, 2, 16, FEATURES).to(dtype)
    found, ratio = AdaptiveLowPass(16, 1.0, 0.1)(frames)
    expected, its_ratio = AdaptiveLowPass(16, 1.0, 0.1)(frames.float())
    assert found.dtype == ratio.dtype == torch.float32
    assert torch.equal(found, expected) and torch.equal(ratio, its_ratio)
