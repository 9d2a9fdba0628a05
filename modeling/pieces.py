"""What is done entity by entity, done so many at a time: temporaries of full length are few, and none is wide."""

from collections.abc import Callable

import torch

ENTITIES_AT_ONCE = 4096


def in_pieces(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of tensors `[B, M, ...]`, `ENTITIES_AT_ONCE` entities at a time."""
    length = tensors[0].shape[1]
    if length <= ENTITIES_AT_ONCE:
        return function(*tensors)
    pieces = zip(*(x.split(ENTITIES_AT_ONCE, dim=1) for x in tensors), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([function(*piece) for piece in pieces], dim=1)
    first = function(*next(pieces))
    whole = first.new_empty(first.shape[0], length, *first.shape[2:])
    whole[:, :ENTITIES_AT_ONCE] = first
    for start, piece in zip(range(ENTITIES_AT_ONCE, length, ENTITIES_AT_ONCE), pieces, strict=True):
        whole[:, start : start + ENTITIES_AT_ONCE] = function(*piece)
    return whole
