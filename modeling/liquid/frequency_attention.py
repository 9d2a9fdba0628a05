"""Attention between the frequencies of a frame (Liquid paper, §3.1).

Shape letters: B batch, N frames, L frame length, K = L/2 + 1 bins, D features.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..modules.linear import linear_of_batch
from .spectral_frames import from_spectrum, octave_bands, to_spectrum

PHASE_FLOOR = 1e-3  # relative to the frame's rms; the phase of a smaller bin is rounding noise
MIN_ENERGY = 1e-12


class BandAttention(nn.Module):
    """Multi-head attention over the bins of one band, computed from their magnitudes.

    Args:
        size: number of features D.
        num_heads: number of heads; must divide D.
        dropout: dropout rate on the attention weights.
        norm_eps: epsilon of the LayerNorm.
    """

    def __init__(self, size: int, num_heads: int, dropout: float, norm_eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.proj = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size, norm_eps)
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Attend within the band: `[B, frames, bins, D]` → `[B, frames, bins, D]`."""
        h = self.norm(linear_of_batch(self.proj, magnitude))
        query, key, value = (
            linear_of_batch(linear, h).flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return linear_of_batch(self.o_proj, y.transpose(1, 2).flatten(2).view_as(magnitude))


class FrequencyHyenaAttention(nn.Module):
    """Attention within each octave band of a frame's spectrum, with the phases of the input (Liquid paper, §3.1).

    X = rFFT(x),  H_b = LayerNorm(Linear_b(|X_b|)),  O_b = Attention_b(H_b) ⊙ X_b / √(|X_b|² + ε²),  y = irFFT(O)

    The method `project` then applies LayerNorm(Linear(y)). The cost is linear in the number of frames. Transforms run
    in at least float32.

    Args:
        size: number of features D.
        frame_length: frame length L, a power of two.
        num_heads: number of heads; must divide D.
        dropout: dropout rate on the attention weights.
        norm_eps: epsilon of the LayerNorms.

    Example:
        >>> import torch
        >>> from dfn_hf import FrequencyHyenaAttention
        >>> attention = FrequencyHyenaAttention(size=32, frame_length=16, num_heads=4)
        >>> frames = torch.randn(2, 3, 16, 32)
        >>> attention.project(attention(frames)).shape
        torch.Size([2, 3, 16, 32])
    """

    def __init__(self, size: int, frame_length: int, num_heads: int, dropout: float = 0.0, norm_eps: float = 1e-5):
        super().__init__()
        self.frame_length = frame_length
        self.bands = octave_bands(frame_length // 2 + 1)
        self.attention = nn.ModuleList([BandAttention(size, num_heads, dropout, norm_eps) for _ in self.bands])
        self.out_proj = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size, norm_eps)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Attend within the bands of each frame: `[B, N, L, D]` → `[B, N, L, D]`, in at least float32."""
        dtype = torch.promote_types(frames.dtype, torch.float32)
        spectrum = to_spectrum(frames.to(dtype), dim=2)  # [B, N, K, D, 2]
        energy = spectrum.square().sum(dim=-1)
        floor = (PHASE_FLOOR**2 * energy.mean(dim=(2, 3), keepdim=True)).clamp(min=MIN_ENERGY)
        phase = spectrum * torch.rsqrt(energy + floor)[..., None]
        magnitude = (energy + floor).sqrt().to(self.norm.weight.dtype)
        attended = [
            attend(magnitude[:, :, band]).to(dtype) for attend, band in zip(self.attention, self.bands, strict=True)
        ]
        return from_spectrum(torch.cat(attended, dim=2)[..., None] * phase, self.frame_length, dim=2)

    def project(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the output projection and norm in the time domain: `[B, ..., D]` → `[B, ..., D]`."""
        return self.norm(linear_of_batch(self.out_proj, y))
