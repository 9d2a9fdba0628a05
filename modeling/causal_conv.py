"""Short causal depthwise convolution over left-aligned rows."""

import torch
from torch import nn


class CausalConv(nn.Module):
    """y_t = Σ_r w_r ⊙ x_{t−r} for r < `kernel_size`, within the segment of t.

    Args:
        channels: features, each with its own filter.
        kernel_size: taps; 1 scales each feature.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=False)

    def forward(self, x: torch.Tensor, rows, state=None) -> torch.Tensor:
        """`[batch, length, channels]` → the same.

        Args:
            rows: `padding.Rows` of this call.
            state: `state_cache.StateLayer` that holds the taps before this call, or None.
        """
        before = self.kernel_size - 1
        if state is not None:
            history = state.tail("conv", x, before)
        elif rows.segment is not None:
            return self._convolve_segments(x, rows.segment, before)
        else:
            history = nn.functional.pad(x, (0, 0, before, 0))
        # Laid out as projections read it: each of them would make a copy of its own.
        return self.conv(history.transpose(1, 2)).transpose(1, 2).contiguous()

    def _convolve_segments(self, x: torch.Tensor, segment: torch.Tensor, gap: int) -> torch.Tensor:
        """Lay `gap` zeros before each segment, convolve, and take the entities out again."""
        length = x.shape[1]
        place = torch.arange(length, device=x.device) + (segment + 1) * gap
        place = place[..., None].expand_as(x)
        spread = x.new_zeros(x.shape[0], length + (int(segment.max()) + 1) * gap, x.shape[2]).scatter(1, place, x)
        convolved = self.conv(spread.transpose(1, 2)).transpose(1, 2)
        return convolved.gather(1, place - gap)
