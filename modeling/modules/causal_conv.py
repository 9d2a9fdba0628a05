"""Short depthwise convolution over left-aligned rows, causal or centred."""

import torch
from torch import nn

from .depthwise_conv import DepthwiseConv1d


class CausalConv(nn.Module):
    """y_t = Σ_r w_r ⊙ x_{t−r} for −`ahead` ≤ r < `kernel_size`, within the segment of t.

    Args:
        channels: number of features; each has its own filter.
        kernel_size: taps for the current input and earlier ones; 1 only scales each feature.
        ahead: taps for later inputs, 0 if causal. Requires a call without a cache.

    Example:
        >>> import torch
        >>> from dfn_hf.modeling.modules.causal_conv import CausalConv
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> conv = CausalConv(channels=8, kernel_size=4)
        >>> conv(torch.randn(2, 10, 8), make_row_layout(2, 10, torch.device("cpu"))).shape
        torch.Size([2, 10, 8])
    """

    def __init__(self, channels: int, kernel_size: int, ahead: int = 0):
        super().__init__()
        self.kernel_size = kernel_size
        self.ahead = ahead
        self.conv = DepthwiseConv1d(channels, kernel_size + ahead)
        self.conv.ahead = ahead

    def forward(self, x: torch.Tensor, rows, state=None) -> torch.Tensor:
        """Convolve each segment separately.

        Args:
            x: `[B, M, channels]`.
            rows: `row_layout.RowLayout` of this call.
            state: `cache.FlowCacheLayer` with the last `kernel_size − 1` inputs of earlier calls, or None.

        Returns:
            `[B, M, channels]`.
        """
        before = self.kernel_size - 1
        if self.ahead and rows.lengths is not None:
            x = x * rows.token_mask().unsqueeze(-1)
        if state is not None:
            history = state.roll("conv", x, before)
        elif rows.segment is not None:
            return self._convolve_segments(x, rows.segment, before)
        else:
            history = nn.functional.pad(x, (0, 0, before, self.ahead))
        return self.conv(history.transpose(1, 2)).transpose(1, 2)

    def _convolve_segments(self, x: torch.Tensor, segment: torch.Tensor, gap: int) -> torch.Tensor:
        """Insert `gap` zeros before each segment, convolve, and gather the entities."""
        length = x.shape[1]
        gap = max(gap, self.ahead)
        target = torch.arange(length, device=x.device) + (segment + 1) * gap
        target = target[..., None].expand_as(x)
        spread = x.new_zeros(x.shape[0], length + (int(segment.max()) + 1) * gap, x.shape[2]).scatter(1, target, x)
        spread = nn.functional.pad(spread, (0, 0, 0, self.ahead))
        convolved = self.conv(spread.transpose(1, 2)).transpose(1, 2)
        return convolved.gather(1, target - (self.kernel_size - 1))
