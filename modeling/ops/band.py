"""Banded attention in blocks: O(length × window) time and memory, without a loop over entities.

Queries are split into blocks of T. Each block sees the keys of its own T entities and of the `before` entities in
front of them. Scores have one of two layouts: by key (column n is key n of the block), as matrix products return them,
or by offset (column e is the entity `before − e` steps back), as terms that depend on i − j need them.

Shape letters: B batch, M queries of this call, T queries per block, N blocks, F features.
"""

import torch
from torch.nn import functional as F


def block_length(length: int, before: int) -> int:
    """Return T: `before`, but at least 1 and at most `length`."""
    return max(1, min(length, before))


def query_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Split queries `[B, M, F]` into blocks `[B, N, T, F]`, padded with zeros at the end."""
    length = x.shape[1]
    return F.pad(x, (0, 0, 0, -length % block)).unflatten(1, (-1, block))


def key_blocks(history: torch.Tensor, before: int, block: int, after: int = 0) -> torch.Tensor:
    """Gather the keys that each block sees: `[B, before + M + after, F]` → `[B, N, before + T + after, F]`.

    The last block is padded with zeros.
    """
    length = history.shape[1] - before - after
    padded = F.pad(history, (0, 0, 0, -length % block))
    if block == before and not after:  # the case of `block_length`: two neighbouring blocks hold all keys
        return _Pairs.apply(padded.unflatten(1, (-1, block)))
    return padded.unfold(1, before + block + after, block).transpose(2, 3)


def join_blocks(x: torch.Tensor, length: int) -> torch.Tensor:
    """Undo `query_blocks`: `[B, N, T, F]` → `[B, M, F]`, M = `length`."""
    return x.flatten(1, 2)[:, :length]


def by_offset(scores: torch.Tensor) -> torch.Tensor:
    """Convert scores `[..., T, before + T]` by key to `[..., T, before + 1]` by offset, oldest entity first."""
    return _Skew.apply(scores)


def by_key(weights: torch.Tensor) -> torch.Tensor:
    """Convert weights `[..., T, before + 1]` by offset to `[..., T, before + T]` by key, zero outside the window."""
    return _Unskew.apply(weights)


class _Pairs(torch.autograd.Function):
    """Concatenate each block with the next, `[B, N + 1, T, F]` → `[B, N, 2 T, F]`; its backward is a single pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(blocks):
        return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        first, second = gradient.chunk(2, dim=2)
        return torch.cat([first[:, :1], first[:, 1:] + second[:, :-1], second[:, -1:]], dim=1)


def _diagonals(by_key: torch.Tensor) -> torch.Tensor:
    """Return a view of contiguous `[..., T, K]` that holds keys t … t + K − T of each row t."""
    block, keys = by_key.shape[-2:]
    shape = (*by_key.shape[:-1], keys - block + 1)
    return by_key.as_strided(shape, (*by_key.stride()[:-2], keys + 1, 1))


class _Skew(torch.autograd.Function):
    """`by_offset` with one copy forward and one backward. Autograd through the views needs several."""

    @staticmethod
    def forward(scores):
        return _diagonals(scores.contiguous()).contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, scores):
        return _Skew.apply(scores.movedim(in_dims[0], 0)), 0

    @staticmethod
    def backward(ctx, gradient):
        return _Unskew.apply(gradient)


class _Unskew(torch.autograd.Function):
    """`by_key` with one copy forward and one backward."""

    @staticmethod
    def forward(weights):
        block, width = weights.shape[-2:]
        if torch.compiler.is_exporting():  # ONNX cannot write through a strided view
            return F.pad(weights, (0, block)).flatten(-2)[..., :-block].unflatten(-1, (block, width + block - 1))
        spread = weights.new_zeros(*weights.shape[:-1], width + block - 1)
        _diagonals(spread).copy_(weights)
        return spread

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, weights):
        return _Unskew.apply(weights.movedim(in_dims[0], 0)), 0

    @staticmethod
    def backward(ctx, gradient):
        return _Skew.apply(gradient)


def to_dense(weights: torch.Tensor, index: torch.Tensor, num_entities: int) -> torch.Tensor:
    """Convert weights by offset to a dense matrix: `[B, H, M, before + 1]` → `[B, H, M, num_entities]`.

    Args:
        weights: `[B, H, M, before + 1]`. Weights of entities outside 0 … num_entities − 1 must be 0.
        index: int64 `[B, M]`, position in its row of the most recent entity of each query's window.
        num_entities: columns of the result.
    """
    width = weights.shape[-1]
    positions = index[..., None] - torch.arange(width - 1, -1, -1, device=index.device)
    dense = weights.new_zeros(*weights.shape[:3], num_entities)
    positions = positions.clamp(0, num_entities - 1)[:, None].expand_as(weights)
    return dense.scatter_add(-1, positions, weights)
