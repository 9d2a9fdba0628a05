"""Convolution whose taps move with the input, and its gated form (Liquid, §3.5 and §3.6).

Shape letters: B batch, M entities of this call, T taps, C channels.
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ..modules.cache import FlowCacheLayer
from ..modules.row_layout import RowLayout
from ..ops.chunking import apply_chunked


class DeformableConv1d(nn.Module):
    """y_i = b + Σ_t W_t x(i + d_t + Δ_it), x between entities interpolated linearly and zero outside the row.

    d_t is the place of tap t: dilation · (t − ⌊T/2⌋), or dilation · (t − T + 1) where `causal`. Δ comes from a
    convolution over x: max_offset · tanh. Where `causal`, no tap passes the entity itself: the latest looks back by
    max_offset · sigmoid, the others move at most to it.

    Args:
        in_channels, out_channels: C and the output's.
        kernel_size: T; dilation: distance of the taps; max_offset: how far one moves, 0 for not at all.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        max_offset: float = 2.0,
        causal: bool = False,
    ):
        super().__init__()
        self.kernel_size, self.dilation = kernel_size, dilation
        self.max_offset, self.causal = max_offset, causal
        last = kernel_size - 1 if causal else kernel_size // 2
        self.displacements = [dilation * (tap - last) for tap in range(kernel_size)]
        self.tap_proj = nn.Linear(kernel_size * in_channels, out_channels)  # taps side by side, the earliest first
        self.offset_conv = nn.Conv1d(in_channels, kernel_size, kernel_size) if max_offset else None

    @property
    def history(self) -> int:
        """Entities before the call that a causal one needs."""
        return max(self.kernel_size - 1, math.ceil(self.max_offset) + self.dilation * (self.kernel_size - 1))

    def forward(self, x: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None = None) -> torch.Tensor:
        """`[B, M, C]` → `[B, M, out_channels]`.

        Args:
            rows: `row_layout.RowLayout` of this call.
            state: holds what came before, for a causal one, or None.
        """
        x = torch.where(rows.token_mask()[..., None], x, x.new_zeros(()))
        before = self.history if self.causal else 0
        if state is not None:
            x = state.roll("deformable", x, before)
        elif before:
            x = F.pad(x, (0, 0, before, 0))
        offsets = self.offsets(x, before) if self.offset_conv is not None else None
        return self.convolve(x, offsets, before)

    def offsets(self, x: torch.Tensor, before: int) -> torch.Tensor:
        """Δ `[B, M, T]` of `[B, before + M, C]`, in at least float32."""
        taps = self.kernel_size - 1
        ahead = 0 if self.causal else taps // 2
        padded = F.pad(x[:, before:], (0, 0, taps - ahead, ahead)) if not before else x[:, before - taps :]
        raw = self.offset_conv(padded.transpose(1, 2)).transpose(1, 2)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if not self.causal:
            return self.max_offset * raw.tanh()
        bounds = raw.new_tensor([min(self.max_offset, -place) for place in self.displacements[:-1]])
        back = -self.max_offset * raw[..., -1:].sigmoid()
        return torch.cat([bounds * raw[..., :-1].tanh(), back], dim=-1)

    def convolve(self, x: torch.Tensor, offsets: torch.Tensor | None, before: int) -> torch.Tensor:
        """The convolution of `[B, before + M, C]` at given offsets `[B, M, T]`; None for none."""
        own = torch.arange(before, x.shape[1], device=x.device)[None, :, None]
        return apply_chunked(partial(self._read, x), own, *([] if offsets is None else [offsets]))

    def _read(self, x: torch.Tensor, own: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        """The output at places `own` `[1, M, 1]` of x."""
        places = own + torch.tensor(self.displacements, device=x.device)
        if offsets is None:
            taps = self._gather(x, places.expand(x.shape[0], -1, -1))
        else:
            steps = offsets.detach().floor()
            left = places + steps.long()
            share = (offsets - steps).to(x.dtype)[..., None]
            right = left + 1
            if self.causal:
                right = torch.minimum(right, own)  # of share 0 there: the future must not reach its gradient
            taps = self._gather(x, left)
            taps = taps + share * (self._gather(x, right) - taps)
        return self.tap_proj(taps.flatten(2))

    def _gather(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """`[B, held, C]` at places `[B, M, T]` → `[B, M, T, C]`, zero outside."""
        batch, held, channels = x.shape
        inside = (places >= 0) & (places < held)
        flat = places.clamp(0, held - 1).flatten(1)[..., None].expand(-1, -1, channels)
        taken = x.gather(1, flat).view(*places.shape, channels)
        return torch.where(inside[..., None], taken, x.new_zeros(()))


class OptimizedGatedConvolution(nn.Module):
    """Dropout(LayerNorm(GELU(y_main) ⊙ σ(y_gate))), [y_main, y_gate] = DeformableConv1d(x)."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilation: int = 1,
        max_offset: float = 2.0,
        causal: bool = False,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.deform_conv = DeformableConv1d(channels, 2 * channels, kernel_size, dilation, max_offset, causal)
        self.norm = nn.LayerNorm(channels, norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None = None) -> torch.Tensor:
        """`[B, M, channels]` → the same; arguments as for `DeformableConv1d.forward`."""
        return apply_chunked(self._gated, self.deform_conv(x, rows, state))

    def _gated(self, y: torch.Tensor) -> torch.Tensor:
        main, gate = y.chunk(2, dim=-1)
        return self.dropout(self.norm(F.gelu(main) * gate.sigmoid()))
