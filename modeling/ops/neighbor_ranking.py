"""Ranking of candidate neighbours by squared distance, ties by recency. Positions are integers, so both are exact."""

from collections.abc import Iterable

import torch

NO_DISTANCE = 2**31 - 1  # squared distance of a missing neighbour, larger than every other
NO_CODE = 2**63 - 1  # sorts after every code


def squared_distances(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return Σ_p (q_p − k_p)² over the last dimension, int32."""
    queries, keys = (x.int().movedim(-1, 0).contiguous() for x in (queries, keys))
    return sum_of_squares(query - key for query, key in zip(queries, keys, strict=True))


def sum_of_squares(differences: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return Σ_p x_p² of one or more tensors."""
    differences = iter(differences)
    total = next(differences)
    total = total * total
    for difference in differences:
        total.addcmul_(difference, difference)
    return total


def rank_nearest(
    squared: torch.Tensor, ages: torch.Tensor, visible: torch.Tensor, num_neighbors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first K visible candidates in the order of (squared distance, age).

    Args:
        squared: squared distances, int32 `[..., C]`.
        ages: query position minus candidate position, 0 ≤ age < 2^31, int64 `[..., C]`. Each occurs once.
        visible: bool `[..., C]`.
        num_neighbors: K.

    Returns:
        (ages int64 `[..., K]`, squared distances int32 `[..., K]`); −1 and `NO_DISTANCE` if fewer than K are visible.
    """
    squared = torch.where(visible, squared, NO_DISTANCE)
    codes = squared.long() << 32 | ages.clamp(min=0)
    missing = num_neighbors - codes.shape[-1]
    if missing > 0:  # `pad` converts its value to a float
        codes = torch.cat([codes, codes.new_full((*codes.shape[:-1], missing), NO_CODE)], dim=-1)
    codes = codes.topk(num_neighbors, dim=-1, largest=False).values
    squared = (codes >> 32).int()
    return (codes & 0xFFFFFFFF).masked_fill(squared == NO_DISTANCE, -1), squared
