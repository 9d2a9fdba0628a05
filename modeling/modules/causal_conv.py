"""Short depthwise convolution over left-aligned rows, causal unless it is asked to look ahead."""

import torch
from torch import nn

from .depthwise_conv import DepthwiseConv1d


class CausalConv(nn.Module):
    """y_t = Σ_r w_r ⊙ x_{t−r} for −`ahead` ≤ r < `kernel_size`, within the segment of t.

    Args:
        channels: features, each with its own filter.
        kernel_size: taps for an input and those before it; 1 scales each feature.
        ahead: taps for those after it; only without a cache.
    """

    def __init__(self, channels: int, kernel_size: int, ahead: int = 0):
        super().__init__()
        self.kernel_size = kernel_size
        self.ahead = ahead
        self.conv = DepthwiseConv1d(channels, kernel_size + ahead)
        self.conv.ahead = ahead

    def forward(self, x: torch.Tensor, rows, state=None) -> torch.Tensor:
        """`[batch, length, channels]` → the same.

        Args:
            rows: `row_layout.RowLayout` of this call.
            state: `cache.FlowCacheLayer` that holds the taps before this call, or None.
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
        """Lay `gap` zeros before each segment, convolve, and take the entities out again."""
        length = x.shape[1]
        gap = max(gap, self.ahead)
        place = torch.arange(length, device=x.device) + (segment + 1) * gap
        place = place[..., None].expand_as(x)
        spread = x.new_zeros(x.shape[0], length + (int(segment.max()) + 1) * gap, x.shape[2]).scatter(1, place, x)
        spread = nn.functional.pad(spread, (0, 0, 0, self.ahead))
        convolved = self.conv(spread.transpose(1, 2)).transpose(1, 2)
        return convolved.gather(1, place - (self.kernel_size - 1))
