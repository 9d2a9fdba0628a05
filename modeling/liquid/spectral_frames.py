"""Frames of a row, octave bands of their spectra, and an adaptive low-pass filter (Liquid paper, §3.1 and §3.2).

All rows use the same frame length, so that no bin depends on the padding of a batch. `RowFrames` arranges the frames
of a row that is known completely (encoder); `LaggedFrames` arranges frames that depend on the past only (decoder).

Shape letters: B batch, M entities of this call, N frames, L frame length, K = L/2 + 1 bins, D features.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..modules.row_layout import RowLayout

MIN_BAND = 4
HIGH_FRACTION = 0.8  # bins above this fraction of the band limit count as high
HIGH_WEIGHT, VARIATION_WEIGHT = 0.7, 0.3
RAMP_BINS = 1.0


def octave_bands(num_bins: int) -> list[slice]:
    """Divide the bins 0 … `num_bins` − 1 into the bands [0, 4), [4, 8), [8, 16) …

    The Nyquist bin belongs to the last band: queries and keys of a band with one bin would receive no gradient.
    """
    edges, edge = [0], MIN_BAND
    while edge < num_bins - 1:
        edges.append(edge)
        edge *= 2
    return [slice(start, stop) for start, stop in zip(edges, [*edges[1:], num_bins], strict=True)]


def to_spectrum(frames: torch.Tensor, dim: int) -> torch.Tensor:
    """Transform frames along `dim`, with real and imaginary parts in the last dimension: `[…, L, …]` → `[…, K, …, 2]`.

    torch.compile does not support complex arithmetic, so pairs of real numbers represent the spectrum.
    """
    return torch.view_as_real(torch.fft.rfft(frames, dim=dim))


def from_spectrum(spectrum: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Invert `to_spectrum` along `dim`: `[…, K, …, 2]` → `[…, L, …]`."""
    return torch.fft.irfft(torch.view_as_complex(spectrum), n=length, dim=dim)


@dataclass(frozen=True)
class RowFrames:
    """Frames of complete rows, from which overlap-add reconstructs the row.

    A row of at most L entities is one rectangular frame, padded with zeros. A longer row has periodic Hann frames with
    an overlap of one half, and one coarse frame that holds the means of up to L intervals of the row, so that the low
    frequencies cover the whole row.

    Args:
        frame_length: frame length L, even.
        rows: `row_layout.RowLayout` of the call.
    """

    frame_length: int
    rows: RowLayout

    @property
    def lengths(self) -> torch.Tensor:
        """Number of real entities of each row, int64 `[B]`."""
        batch, length = self.rows.positions.shape
        counts = self.rows.lengths
        return torch.full((batch,), length, device=self.rows.positions.device) if counts is None else counts

    def split(self, x: torch.Tensor, coarse: bool) -> torch.Tensor:
        """Divide rows into frames.

        Args:
            x: `[B, M, D]`, zero at padding.
            coarse: whether to append the coarse frame.

        Returns:
            `[B, N, L, D]`.
        """
        batch, length, features = x.shape
        size, hop = self.frame_length, self.frame_length // 2
        whole = F.pad(x[:, :size], (0, 0, 0, max(0, size - length))).unsqueeze(1)
        if length <= size:
            return whole
        window = torch.hann_window(size, periodic=True, dtype=x.dtype, device=x.device)
        padded = F.pad(x, (0, 0, hop, hop + -length % hop))
        halves = padded.unflatten(1, (-1, hop))
        overlapping = torch.cat([halves[:, :-1], halves[:, 1:]], dim=2) * window[:, None]
        frames = [whole, overlapping]
        if coarse:
            interval = self._interval_index(length)
            sums = x.new_zeros(batch, size, features)
            sums = sums.scatter_add(1, interval[..., None].expand_as(x), x)
            counts = sums.new_zeros(batch, size).scatter_add(1, interval, self.rows.token_mask().to(x.dtype))
            frames.append((sums / counts.clamp(min=1)[..., None]).unsqueeze(1))
        return torch.cat(frames, dim=1)

    def join(self, frames: torch.Tensor, coarse: bool) -> torch.Tensor:
        """Invert `split`: `[B, N, L, D]` → `[B, M, D]`.

        Reconstructs x exactly if the frames are unchanged and `coarse` is False.
        """
        length = self.rows.positions.shape[1]
        size, hop = self.frame_length, self.frame_length // 2
        whole = frames[:, 0, :length]
        if length <= size:
            return whole
        overlapping = frames[:, 1:-1] if coarse else frames[:, 1:]
        joined = (overlapping[:, :-1, hop:] + overlapping[:, 1:, :hop]).flatten(1, 2)[:, :length]
        if coarse:
            interval = self._interval_index(length)[..., None].expand_as(joined)
            joined = joined + frames[:, -1].gather(1, interval)
        short = (self.lengths <= size)[:, None, None]
        return torch.where(short, F.pad(whole, (0, 0, 0, length - size)), joined)

    def _interval_index(self, length: int) -> torch.Tensor:
        """Return the interval of the coarse frame that each entity belongs to, int64 `[B, M]`."""
        size = self.frame_length
        interval_length = size * ((self.lengths + size**2 - 1) // size**2).clamp(min=1)
        columns = torch.arange(length, device=interval_length.device)
        return (columns // interval_length[:, None]).clamp(max=size - 1)


@dataclass(frozen=True)
class LaggedFrames:
    """Frames of growing rows: adjacent rectangular frames, of which an entity sees the last one completed before its
    own.

    A frame of zeros precedes the first frame.

    Args:
        frame_length: frame length L.
        rows: `row_layout.RowLayout` of the call.
    """

    frame_length: int
    rows: RowLayout

    @property
    def history(self) -> int:
        """Number of entities before the call that `split` reads: the preceding frame and the open one."""
        return 2 * self.frame_length - 1

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Divide rows into frames.

        Args:
            x: `[B, history + M, D]`; the last M entities are those of the call.

        Returns:
            `[B, N, L, D]`; the first frame is the one before the call's first entity's frame.
        """
        size = self.frame_length
        batch, held, features = x.shape
        offsets = torch.arange(-self.history, held - self.history, device=x.device)
        positions = self.rows.positions[:, :1] + offsets
        real = positions >= 0
        if self.rows.lengths is not None:
            real = real & (offsets < self.rows.lengths[:, None])
        length = self.rows.positions.shape[1]
        num_frames = (length + 2 * size - 2) // size + 1
        slot = positions - (self.rows.positions[:, :1] // size - 1) * size
        slot = torch.where(real & (slot >= 0), slot, num_frames * size)
        laid = x.new_zeros(batch, num_frames * size + 1, features)
        laid = laid.scatter(1, slot[..., None].expand_as(x), x)[:, :-1]
        return laid.unflatten(1, (num_frames, size))

    def lag(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the preceding frame's value at each entity's own offset: `[B, N, L, D]` → `[B, M, D]`."""
        size = self.frame_length
        index = self.rows.positions
        slot = index - (index[:, :1] // size) * size
        return frames.flatten(1, 2).gather(1, slot[..., None].expand(-1, -1, frames.shape[-1]))

    def completed(self, num_frames: int) -> torch.Tensor:
        """Return a mask of the frames of whole rows that are filled with real entities, bool `[B, N]`."""
        size = self.frame_length
        length = self.rows.positions.shape[1]
        counts = self.rows.lengths
        lengths = self.rows.positions.new_full(self.rows.positions.shape[:1], length) if counts is None else counts
        frame = torch.arange(-1, num_frames - 1, device=lengths.device)
        return (frame >= 0) & ((frame + 1) * size <= lengths[:, None])


class AdaptiveLowPass(nn.Module):
    """Low-pass filter whose cut-off frequency follows the complexity of the frame (Liquid paper, §3.2).

    complexity = 0.7 · energy fraction of the highest fifth of the bins + 0.3 · local variation / total variation
    ratio      = clamp(min + (base − min) · complexity, min, 1)
    bin k is multiplied by clamp(N − k + 1, 0, 1), N = ratio · (K − 1)

    Args:
        frame_length: frame length L.
        base_ratio: ratio at complexity 1, in (0, 1].
        min_ratio: smallest ratio, in (0, 1].
    """

    def __init__(self, frame_length: int, base_ratio: float, min_ratio: float):
        super().__init__()
        self.frame_length = frame_length
        self.base_ratio, self.min_ratio = base_ratio, min_ratio

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Filter the frames.

        Args:
            frames: `[B, N, L, D]`.

        Returns:
            (filtered frames `[B, N, L, D]`; ratios `[B, N]`), in at least float32.
        """
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        spectrum = to_spectrum(frames, dim=2)
        ratio = self.ratio(frames, spectrum)
        bins = spectrum.shape[2]
        kept = (ratio[..., None] * (bins - 1) - torch.arange(bins, device=frames.device)) / RAMP_BINS + 1
        kept = kept.clamp(0, 1)[..., None, None]
        return from_spectrum(spectrum * kept, self.frame_length, dim=2), ratio

    def ratio(self, frames: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
        """Compute the fraction of the bins that each frame keeps; `min_ratio` for a frame without energy.

        Args:
            frames: `[B, N, L, D]`.
            spectrum: `[B, N, K, D, 2]`.

        Returns:
            `[B, N]`.
        """
        tiny = torch.finfo(frames.dtype).tiny
        energy = spectrum.square().sum(dim=-1)
        first_high = round(HIGH_FRACTION * (spectrum.shape[2] - 1))
        high = energy[:, :, first_high:].sum(dim=(2, 3)) / energy.sum(dim=(2, 3)).clamp(min=tiny)
        local = frames.diff(dim=2).square().sum(dim=(2, 3))
        total = (frames - frames.mean(dim=2, keepdim=True)).square().sum(dim=(2, 3))
        complexity = HIGH_WEIGHT * high + VARIATION_WEIGHT * local / (4 * total).clamp(min=tiny)
        return (self.min_ratio + (self.base_ratio - self.min_ratio) * complexity).clamp(self.min_ratio, 1.0)
