"""A convolution of each feature with a filter of its own, over rows whose features lie side by side."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

POSITION_CHUNK = 1024  # so that what is summed stays in a processor's cache


class DepthwiseConv1d(nn.Conv1d):
    """`nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=False)`, a few times faster.

    torch's lays rows out anew, each feature's inputs side by side, and its result back again.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, groups=channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, channels, length]` → `[batch, channels, length − kernel_size + 1]`."""
        return _DepthwiseConv.apply(x.transpose(1, 2), self.weight[:, 0].T).transpose(1, 2)


class _DepthwiseConv(torch.autograd.Function):
    """x `[B, M + R − 1, C]`, taps `[R, C]` → `[B, M, C]`; half precision is summed in float32."""

    @staticmethod
    def forward(ctx, x, taps):
        ctx.save_for_backward(x, taps)
        dtype = torch.promote_types(x.dtype, taps.dtype)
        y = x.new_empty(x.shape[0], x.shape[1] - len(taps) + 1, x.shape[2], dtype=dtype)
        wide = torch.promote_types(torch.float32, y.dtype)
        for start, stop in _pieces(y):
            total = x[:, start:stop].to(wide) * taps[0]
            for r in range(1, len(taps)):
                total = total.addcmul_(x[:, start + r : stop + r].to(wide), taps[r].to(wide))
            y[:, start:stop] = total
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, taps = ctx.saved_tensors
        wide = torch.promote_types(torch.float32, grad_y.dtype)
        grad_x, grad_taps = torch.zeros_like(x, dtype=wide), torch.zeros_like(taps, dtype=wide)
        for start, stop in _pieces(grad_y):
            given = grad_y[:, start:stop].to(wide)
            for r in range(len(taps)):
                read = slice(start + r, stop + r)
                grad_taps[r] += (given * x[:, read]).sum(dim=(0, 1))
                grad_x[:, read].addcmul_(given, taps[r].to(wide))
        return grad_x.to(x.dtype), grad_taps.to(taps.dtype)


def _pieces(y: torch.Tensor) -> list[tuple[int, int]]:
    length = y.shape[1]
    step = length if torch.compiler.is_compiling() else max(1, POSITION_CHUNK // y.shape[0])
    return [(start, min(start + step, length)) for start in range(0, length, step)]
