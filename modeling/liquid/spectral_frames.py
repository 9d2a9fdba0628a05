"""Frames of a row, the octave bands of their spectra, and an adaptive low-pass (Liquid, §3.1 and §3.2).

Frames have one length for every row, so that no bin depends on the padding of a batch. Those of a row follow each
other as `RowFrames` (both sides are seen) or `LaggedFrames` (strictly the past) lays them.

Shape letters: B batch, M entities of this call, N frames, L frame length, K = L/2 + 1 bins, D features.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..modules.row_layout import RowLayout

MIN_BAND = 4
HIGH_SHARE = 0.8  # bins from this share of the band limit on are high
HIGH_WEIGHT, VARIATION_WEIGHT = 0.7, 0.3
RAMP_BINS = 1.0


def octave_bands(num_bins: int) -> list[slice]:
    """[0, 4), [4, 8), [8, 16) … of bins 0 … `num_bins` − 1, the Nyquist bin in the last."""
    edges, edge = [0], MIN_BAND
    while edge < num_bins - 1:
        edges.append(edge)
        edge *= 2
    return [slice(start, stop) for start, stop in zip(edges, [*edges[1:], num_bins], strict=True)]


def to_spectrum(frames: torch.Tensor, dim: int) -> torch.Tensor:
    """Bins of frames along `dim`, real and imaginary parts last: `[…, L, …]` → `[…, K, …, 2]`.

    Pairs, since torch's compiler has no complex arithmetic and loses gradients of what it leaves to others.
    """
    return torch.view_as_real(torch.fft.rfft(frames, dim=dim))


def from_spectrum(spectrum: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """The way back from pairs along `dim`: `[…, K, …, 2]` → `[…, L, …]`."""
    return torch.fft.irfft(torch.view_as_complex(spectrum), n=length, dim=dim)


@dataclass(frozen=True)
class RowFrames:
    """Rows that are known whole, in frames that reconstruct them.

    A row of at most L entities is one rectangular frame, zero behind its end. A longer one is periodic Hann frames
    that overlap by half, and one coarse frame: the means of up to L stretches, so that low frequencies see all of it.

    Args:
        frame_length: L, even.
        rows: `row_layout.RowLayout` of the call.
    """

    frame_length: int
    rows: RowLayout

    @property
    def lengths(self) -> torch.Tensor:
        """Real entities of each row, int64 `[B]`."""
        batch, length = self.rows.positions.shape
        counts = self.rows.lengths
        return torch.full((batch,), length, device=self.rows.positions.device) if counts is None else counts

    def split(self, x: torch.Tensor, coarse: bool) -> torch.Tensor:
        """`[B, M, D]`, zero behind the rows' ends, → `[B, N, L, D]`; the coarse frame, if asked for, last."""
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
            stretch = self._stretch(length)
            sums = x.new_zeros(batch, size, features)
            sums = sums.scatter_add(1, stretch[..., None].expand_as(x), x)
            counts = sums.new_zeros(batch, size).scatter_add(1, stretch, self.rows.token_mask().to(x.dtype))
            frames.append((sums / counts.clamp(min=1)[..., None]).unsqueeze(1))
        return torch.cat(frames, dim=1)

    def join(self, frames: torch.Tensor, coarse: bool) -> torch.Tensor:
        """The way back: `[B, N, L, D]` → `[B, M, D]`. Where nothing was changed and nothing is coarse, `x` again."""
        length = self.rows.positions.shape[1]
        size, hop = self.frame_length, self.frame_length // 2
        whole = frames[:, 0, :length]
        if length <= size:
            return whole
        overlapping = frames[:, 1:-1] if coarse else frames[:, 1:]
        joined = (overlapping[:, :-1, hop:] + overlapping[:, 1:, :hop]).flatten(1, 2)[:, :length]
        if coarse:
            stretch = self._stretch(length)[..., None].expand_as(joined)
            joined = joined + frames[:, -1].gather(1, stretch)
        short = (self.lengths <= size)[:, None, None]
        return torch.where(short, F.pad(whole, (0, 0, 0, length - size)), joined)

    def _stretch(self, length: int) -> torch.Tensor:
        """Which of the L stretches of its row each entity lies in, int64 `[B, M]`: they are whole frames long."""
        size = self.frame_length
        span = size * ((self.lengths + size**2 - 1) // size**2).clamp(min=1)
        places = torch.arange(length, device=span.device)
        return (places // span[:, None]).clamp(max=size - 1)


@dataclass(frozen=True)
class LaggedFrames:
    """Rows that grow: rectangular frames side by side, of which an entity sees the last one completed before its own.

    Before the first frame stands one of zeros.

    Args:
        frame_length: L.
        rows: `row_layout.RowLayout` of the call.
    """

    frame_length: int
    rows: RowLayout

    @property
    def history(self) -> int:
        """Entities before the call that `split` needs: the frame before, and what the open one holds."""
        return 2 * self.frame_length - 1

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, history + M, D]`, right-aligned at the call, → `[B, N, L, D]`, the first being the frame before."""
        size = self.frame_length
        batch, held, features = x.shape
        offsets = torch.arange(-self.history, held - self.history, device=x.device)
        place = self.rows.positions[:, :1] + offsets
        real = place >= 0
        if self.rows.lengths is not None:
            real = real & (offsets < self.rows.lengths[:, None])
        length = self.rows.positions.shape[1]
        num_frames = (length + 2 * size - 2) // size + 1
        slot = place - (self.rows.positions[:, :1] // size - 1) * size
        slot = torch.where(real & (slot >= 0), slot, num_frames * size)
        laid = x.new_zeros(batch, num_frames * size + 1, features)
        laid = laid.scatter(1, slot[..., None].expand_as(x), x)[:, :-1]
        return laid.unflatten(1, (num_frames, size))

    def lag(self, frames: torch.Tensor) -> torch.Tensor:
        """What each entity sees, at its own place in the frame before its own: `[B, N, L, D]` → `[B, M, D]`."""
        size = self.frame_length
        index = self.rows.positions
        slot = index - (index[:, :1] // size) * size
        return frames.flatten(1, 2).gather(1, slot[..., None].expand(-1, -1, frames.shape[-1]))

    def completed(self, num_frames: int) -> torch.Tensor:
        """Which of the frames of a whole row hold real entities alone, bool `[B, N]`."""
        size = self.frame_length
        length = self.rows.positions.shape[1]
        counts = self.rows.lengths
        lengths = self.rows.positions.new_full(self.rows.positions.shape[:1], length) if counts is None else counts
        frame = torch.arange(-1, num_frames - 1, device=lengths.device)
        return (frame >= 0) & ((frame + 1) * size <= lengths[:, None])


class AdaptiveLowPass(nn.Module):
    """Frames without their highest frequencies; the simpler a frame, the fewer are left.

    complexity = 0.7 · share of the energy in the highest fifth of the bins + 0.3 · local over total variation
    ratio      = clamp(min + (base − min) · complexity, min, 1)
    bin k is multiplied by clamp(N − k + 1, 0, 1), N = ratio · (K − 1)

    Args:
        frame_length: L; base_ratio, min_ratio: in (0, 1].
    """

    def __init__(self, frame_length: int, base_ratio: float, min_ratio: float):
        super().__init__()
        self.frame_length = frame_length
        self.base_ratio, self.min_ratio = base_ratio, min_ratio

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, N, L, D]` → (the same, ratios `[B, N]`), in at least float32."""
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        spectrum = to_spectrum(frames, dim=2)
        ratio = self.ratio(frames, spectrum)
        bins = spectrum.shape[2]
        kept = (ratio[..., None] * (bins - 1) - torch.arange(bins, device=frames.device)) / RAMP_BINS + 1
        kept = kept.clamp(0, 1)[..., None, None]
        return from_spectrum(spectrum * kept, self.frame_length, dim=2), ratio

    def ratio(self, frames: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
        """Share of the bins that each frame keeps, `[B, N]`; the least one for a frame without energy.

        Args:
            frames: `[B, N, L, D]`; spectrum: `[B, N, K, D, 2]`.
        """
        tiny = torch.finfo(frames.dtype).tiny
        energy = spectrum.square().sum(dim=-1)
        first_high = round(HIGH_SHARE * (spectrum.shape[2] - 1))
        high = energy[:, :, first_high:].sum(dim=(2, 3)) / energy.sum(dim=(2, 3)).clamp(min=tiny)
        local = frames.diff(dim=2).square().sum(dim=(2, 3))
        total = (frames - frames.mean(dim=2, keepdim=True)).square().sum(dim=(2, 3))
        complexity = HIGH_WEIGHT * high + VARIATION_WEIGHT * local / (4 * total).clamp(min=tiny)
        return (self.min_ratio + (self.base_ratio - self.min_ratio) * complexity).clamp(self.min_ratio, 1.0)
