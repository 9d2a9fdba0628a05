"""Ranking of candidate neighbours by squared distance, ties by recency."""

import math
import sys
from collections.abc import Iterable

import torch

NO_CODE = 2**63 - 1  # sorts after every code
NO_BITS = NO_CODE >> 32  # the distance in `NO_CODE`


def squared_distances(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return Σ_p (q_p − k_p)² over the last dimension."""
    return sum_of_squares(queries[..., p] - keys[..., p] for p in range(queries.shape[-1]))


def sum_of_squares(differences: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return Σ_p x_p², summed in a fixed order, so that all callers get the same bits. It overwrites its inputs."""
    squares = (x.mul_(x) for x in differences)
    total = next(squares)
    for square in squares:
        total += square
    return total


def rank_nearest(
    squared: torch.Tensor, offsets: torch.Tensor, visible: torch.Tensor, num_neighbors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first K distinct visible candidates in the order of (squared distance, offset).

    Several tables may propose the same entity: equal offsets are one entity.

    Args:
        squared: squared distances, `[..., C]`.
        offsets: query position minus candidate position, ≥ 0, `[..., C]`.
        visible: bool `[..., C]`.
        num_neighbors: K.

    Returns:
        (offsets int64 `[..., K]`, squared distances `[..., K]`); −1 and inf if fewer than K candidates are visible.
    """
    missing = num_neighbors - squared.shape[-1]
    if missing > 0:
        squared = torch.nn.functional.pad(squared, (0, missing), value=math.inf)
        offsets = torch.nn.functional.pad(offsets, (0, missing))
        visible = torch.nn.functional.pad(visible, (0, missing))
    if squared.dtype == torch.float64:
        return _rank_float64(squared, offsets, visible, num_neighbors)
    # The bits of a float32 ≥ 0 sort like its value, so distance and offset form one int64 code per entity.
    bits = squared.view(torch.int32) | _where(~visible, NO_BITS, torch.int32)
    codes = torch.stack([offsets.int(), bits] if sys.byteorder == "little" else [bits, offsets.int()], dim=-1)
    codes = _smallest_distinct(codes.view(torch.int64).squeeze(-1), num_neighbors)
    bits = (codes >> 32).int()
    valid = bits != NO_BITS
    offsets = torch.where(valid, codes & 0xFFFFFFFF, -1)
    return offsets, bits.view(torch.float32).masked_fill(~valid, math.inf)


def _where(mask: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Return `bits` where the mask is set, else 0: `x |= _where(...)` is a `masked_fill` without branches."""
    return mask.to(dtype).neg_().bitwise_and_(bits)


def _smallest_distinct(codes: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count` smallest distinct values of the last dimension, sorted; `NO_CODE` if there are fewer."""
    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        codes = codes.sort(dim=-1).values
        codes[..., 1:] |= _where(codes[..., 1:] == codes[..., :-1], NO_CODE, torch.int64)
        return codes.topk(count, dim=-1, largest=False).values
    array = codes.contiguous().numpy()  # NumPy sorts int64 several times faster than torch on a CPU
    array.sort(axis=-1)
    codes = torch.from_numpy(array)
    codes[..., 1:] |= _where(codes[..., 1:] == codes[..., :-1], NO_CODE, torch.int64)
    array.sort(axis=-1)
    return codes[..., :count]


def _rank_float64(squared, offsets, visible, num_neighbors):
    """`rank_nearest` for float64, whose distance and offset do not fit one int64: two stable sorts."""
    squared = squared.masked_fill(~visible, math.inf)
    order = offsets.argsort(dim=-1, stable=True)
    order = order.gather(-1, squared.gather(-1, order).argsort(dim=-1, stable=True))
    squared, offsets, valid = (x.gather(-1, order) for x in (squared, offsets, visible))
    valid[..., 1:] &= offsets[..., 1:] != offsets[..., :-1]
    first = (~valid).int().argsort(dim=-1, stable=True)[..., :num_neighbors]
    squared, offsets, valid = (x.gather(-1, first) for x in (squared, offsets, valid))
    return offsets.masked_fill(~valid, -1), squared.masked_fill(~valid, math.inf)
