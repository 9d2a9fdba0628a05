"""Looking back over a window, block by block: time and memory of length × window, no loop over entities.

A block of queries sees the entities of its own block and the `before` ones ahead of it. Scores between them are laid
out by key, as products give them, or by offset, as everything that depends on i − j wants them.

Shape letters: B batch, M queries of this call, T queries of a block, N blocks, F features.
"""

import torch
from torch.nn import functional as F


def block_length(length: int, before: int) -> int:
    """T: as many queries as there are entities to look back to, fewer if the call has fewer."""
    return max(1, min(length, before))


def query_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """`[B, M, F]` → `[B, N, T, F]`, zero after the last."""
    length = x.shape[1]
    return F.pad(x, (0, 0, 0, -length % block)).unflatten(1, (-1, block))


def key_blocks(history: torch.Tensor, before: int, block: int, after: int = 0) -> torch.Tensor:
    """What each block sees: `[B, before + M + after, F]` → `[B, N, before + T + after, F]`, zero after the last."""
    length = history.shape[1] - before - after
    padded = F.pad(history, (0, 0, 0, -length % block))
    if block == before and not after:  # as `block_length` has it
        return _Pairs.apply(padded.unflatten(1, (-1, block)))
    return padded.unfold(1, before + block + after, block).transpose(2, 3)


def join_blocks(x: torch.Tensor, length: int) -> torch.Tensor:
    """The way back: `[B, N, T, F]` → `[B, M, F]`."""
    return x.flatten(1, 2)[:, :length]


def by_offset(scores: torch.Tensor) -> torch.Tensor:
    """`[..., T, before + T]` by key → `[..., T, before + 1]`, oldest first: entry e looks back by before − e."""
    return _Skew.apply(scores)


def by_key(weights: torch.Tensor) -> torch.Tensor:
    """The way back: `[..., T, before + 1]` → `[..., T, before + T]`, zero outside the window."""
    return _Unskew.apply(weights)


class _Pairs(torch.autograd.Function):
    """Each block with the next, `[B, N + 1, T, F]` → `[B, N, 2 T, F]`, with a gradient in one pass."""

    @staticmethod
    def forward(ctx, blocks):
        return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2)

    @staticmethod
    def backward(ctx, gradient):
        first, second = gradient.chunk(2, dim=2)
        return torch.cat([first[:, :1], first[:, 1:] + second[:, :-1], second[:, -1:]], dim=1)


def _diagonals(by_key: torch.Tensor) -> torch.Tensor:
    """A view of contiguous `[..., T, K]`: row t from its key t on, K − T + 1 of them."""
    block, keys = by_key.shape[-2:]
    shape = (*by_key.shape[:-1], keys - block + 1)
    return by_key.as_strided(shape, (*by_key.stride()[:-2], keys + 1, 1))


class _Skew(torch.autograd.Function):
    """`by_offset` and its gradient, each one copy: autograd's own way through views takes several."""

    @staticmethod
    def forward(ctx, scores):
        return _diagonals(scores.contiguous()).contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return _Unskew.apply(gradient)


class _Unskew(torch.autograd.Function):
    """`by_key` and its gradient."""

    @staticmethod
    def forward(ctx, weights):
        block, width = weights.shape[-2:]
        if torch.compiler.is_exporting():  # ONNX has no view to write through
            return F.pad(weights, (0, block)).flatten(-2)[..., :-block].unflatten(-1, (block, width + block - 1))
        spread = weights.new_zeros(*weights.shape[:-1], width + block - 1)
        _diagonals(spread).copy_(weights)
        return spread

    @staticmethod
    def backward(ctx, gradient):
        return _Skew.apply(gradient)


def to_dense(weights: torch.Tensor, index: torch.Tensor, num_entities: int) -> torch.Tensor:
    """Weights by offset → between entities, for output: `[B, H, M, before + 1]` → `[B, H, M, num_entities]`.

    Args:
        index: int64 `[B, M]`, place in its row of what each query weighs last; what lies outside must weigh 0.
    """
    width = weights.shape[-1]
    places = index[..., None] - torch.arange(width - 1, -1, -1, device=index.device)
    dense = weights.new_zeros(*weights.shape[:3], num_entities)
    places = places.clamp(0, num_entities - 1)[:, None].expand_as(weights)
    return dense.scatter_add(-1, places, weights)
