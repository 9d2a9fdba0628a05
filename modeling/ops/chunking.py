"""What is done entity by entity, done so many at a time: temporaries of full length are few, and none is wide."""

from collections.abc import Callable
from typing import Any

import torch

CHUNK_SIZE = 4096


def apply_chunked(function: Callable[..., Any], *tensors: torch.Tensor, size: int = 1) -> Any:
    """`function` of tensors `[B, M, ...]`, some at a time along M; it gives one tensor `[B, M, ...]` or several.

    Args:
        size: entities that one place along M stands for, as a block or a frame does; `CHUNK_SIZE` of them are
            taken at a time.
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
    """`function` of `[B, overlap + M, ...]`, as a convolution without padding is: each piece sees `overlap` more."""
    length = x.shape[1] - overlap
    if length <= CHUNK_SIZE:
        return function(x)
    starts = range(0, length, CHUNK_SIZE)
    return torch.cat([function(x[:, start : start + CHUNK_SIZE + overlap]) for start in starts], dim=1)
