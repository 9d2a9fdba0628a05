"""Deformable convolution and its gated form (Liquid paper, §3.5 and §3.6).

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
    """Deformable convolution y_i = b + Σ_t W_t x(i + d_t + Δ_it) (Liquid paper, §3.5).

    x is interpolated linearly between entities and is zero outside the row. The displacement d_t of tap t is dilation
    · (t − ⌊T/2⌋), or dilation · (t − T + 1) if `causal`. The offsets are Δ = max_offset · tanh(convolution of x). If
    `causal`, no tap passes the entity itself: the last tap has the offset −max_offset · sigmoid, and the offsets of
    the other taps are bounded by their distance to the entity.

    Args:
        in_channels: number of input channels C.
        out_channels: number of output channels.
        kernel_size: number of taps T.
        dilation: distance between taps, in entities.
        max_offset: largest offset of a tap, in entities; 0 gives an ordinary convolution.
        causal: whether taps lie at the entity and before it only.

    Example:
        >>> import torch
        >>> from dfn_hf import DeformableConv1d
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> conv = DeformableConv1d(in_channels=8, out_channels=16, kernel_size=3)
        >>> x = torch.randn(2, 10, 8)
        >>> conv(x, make_row_layout(2, 10, x.device)).shape
        torch.Size([2, 10, 16])
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
        self.tap_proj = nn.Linear(
            kernel_size * in_channels, out_channels
        )  # input: the taps concatenated, earliest first
        self.offset_conv = nn.Conv1d(in_channels, kernel_size, kernel_size) if max_offset else None

    @property
    def history(self) -> int:
        """Number of entities before the call that a causal convolution reads."""
        return max(self.kernel_size - 1, math.ceil(self.max_offset) + self.dilation * (self.kernel_size - 1))

    def forward(self, x: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None = None) -> torch.Tensor:
        """Convolve the rows.

        Args:
            x: `[B, M, C]`.
            rows: `row_layout.RowLayout` of this call.
            state: cache layer that holds the preceding entities of a causal convolution, or None.

        Returns:
            `[B, M, out_channels]`.
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
        """Compute the offsets Δ `[B, M, T]` from x `[B, before + M, C]`, in at least float32."""
        taps = self.kernel_size - 1
        ahead = 0 if self.causal else taps // 2
        padded = F.pad(x[:, before:], (0, 0, taps - ahead, ahead)) if not before else x[:, before - taps :]
        raw = self.offset_conv(padded.transpose(1, 2)).transpose(1, 2)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if not self.causal:
            return self.max_offset * raw.tanh()
        bounds = raw.new_tensor([min(self.max_offset, -displacement) for displacement in self.displacements[:-1]])
        back = -self.max_offset * raw[..., -1:].sigmoid()
        return torch.cat([bounds * raw[..., :-1].tanh(), back], dim=-1)

    def convolve(self, x: torch.Tensor, offsets: torch.Tensor | None, before: int) -> torch.Tensor:
        """Convolve x `[B, before + M, C]` with offsets `[B, M, T]`; None means no offsets."""
        own = torch.arange(before, x.shape[1], device=x.device)[None, :, None]
        return apply_chunked(partial(self._convolve_at, x), own, *([] if offsets is None else [offsets]))

    def _convolve_at(self, x: torch.Tensor, own: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the output at the columns `own` `[1, M, 1]` of x."""
        columns = own + torch.tensor(self.displacements, device=x.device)
        if offsets is None:
            taps = self._gather(x, columns.expand(x.shape[0], -1, -1))
        else:
            steps = offsets.detach().floor()
            left = columns + steps.long()
            fraction = (offsets - steps).to(x.dtype)[..., None]
            right = left + 1
            if self.causal:
                right = torch.minimum(right, own)  # its fraction is 0 there; keeps the gradient causal
            taps = self._gather(x, left)
            taps = taps + fraction * (self._gather(x, right) - taps)
        return self.tap_proj(taps.flatten(2))

    def _gather(self, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Gather x `[B, held, C]` at `columns` `[B, M, T]`, zero outside: `[B, M, T, C]`."""
        batch, held, channels = x.shape
        inside = (columns >= 0) & (columns < held)
        flat = columns.clamp(0, held - 1).flatten(1)[..., None].expand(-1, -1, channels)
        taken = x.gather(1, flat).view(*columns.shape, channels)
        return torch.where(inside[..., None], taken, x.new_zeros(()))


class OptimizedGatedConvolution(nn.Module):
    """Gated deformable convolution Dropout(LayerNorm(GELU(y_main) ⊙ σ(y_gate))) (Liquid paper, §3.6).

    y_main and y_gate are the halves of DeformableConv1d(x).

    Args:
        channels: number of input and output channels.
        kernel_size, dilation, max_offset, causal: as for `DeformableConv1d`.
        dropout: dropout rate on the output.
        norm_eps: epsilon of the LayerNorm.

    Example:
        >>> import torch
        >>> from dfn_hf import OptimizedGatedConvolution
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> conv = OptimizedGatedConvolution(channels=8, kernel_size=3, causal=True)
        >>> x = torch.randn(2, 10, 8)
        >>> conv(x, make_row_layout(2, 10, x.device)).shape
        torch.Size([2, 10, 8])
    """

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
        """Convolve and gate the rows; the arguments are those of `DeformableConv1d.forward`.

        Returns:
            `[B, M, channels]`.
        """
        return apply_chunked(self._gate, self.deform_conv(x, rows, state))

    def _gate(self, y: torch.Tensor) -> torch.Tensor:
        main, gate = y.chunk(2, dim=-1)
        return self.dropout(self.norm(F.gelu(main) * gate.sigmoid()))
