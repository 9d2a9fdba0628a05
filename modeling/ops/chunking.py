"""Applies position-wise functions in chunks to bound peak memory."""

from collections.abc import Callable
from typing import Any

import torch

CHUNK_SIZE = 4096


def apply_chunked(function: Callable[..., Any], *tensors: torch.Tensor, size: int = 1) -> Any:
    """Apply a position-wise function in chunks along dimension 1.

    Args:
        function: maps tensors `[B, m, ...]` to one tensor `[B, m, ...]` or a tuple of them, independently along m.
        tensors: `[B, M, ...]`.
        size: entities per index of dimension 1, more than 1 where an index is a block or a frame. A chunk holds
            `CHUNK_SIZE` entities.

    Returns:
        The result for all M indices, equal to `function(*tensors)`.

    Example:
        >>> import torch
        >>> from dfn_hf.modeling.ops.chunking import apply_chunked
        >>> x = torch.randn(2, 10_000, 8)
        >>> apply_chunked(torch.tanh, x).shape
        torch.Size([2, 10000, 8])
    """
    length, step = tensors[0].shape[1], max(1, CHUNK_SIZE // size)
    if length <= step:
        return function(*tensors)
    pieces = zip(*(x.split(step, dim=1) for x in tensors), strict=True)
    if torch.is_grad_enabled():
        results = [function(*piece) for piece in pieces]
        if isinstance(results[0], tuple):
            return tuple(torch.cat(parts, dim=1) for parts in zip(*results, strict=True))
        return torch.cat(results, dim=1)
    wholes: list[torch.Tensor] = []
    for start, piece in zip(range(0, length, step), pieces, strict=True):
        result = function(*piece)
        parts = result if isinstance(result, tuple) else (result,)
        wholes = wholes or [part.new_empty(part.shape[0], length, *part.shape[2:]) for part in parts]
        for whole, part in zip(wholes, parts, strict=True):
            whole[:, start : start + step] = part
    return tuple(wholes) if isinstance(result, tuple) else wholes[0]


def apply_chunked_overlapping(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, overlap: int):
    """Apply a function with a receptive field in chunks, for example a convolution without padding.

    Args:
        function: maps `[B, overlap + m, ...]` to `[B, m, ...]`.
        x: `[B, overlap + M, ...]`. Neighbouring chunks share `overlap` entities.

    Returns:
        `[B, M, ...]`, equal to `function(x)`.
    """
    length = x.shape[1] - overlap
    if length <= CHUNK_SIZE:
        return function(x)
    starts = range(0, length, CHUNK_SIZE)
    return torch.cat([function(x[:, start : start + CHUNK_SIZE + overlap]) for start in starts], dim=1)
