"""Ranking of candidate neighbours by squared distance, ties by recency. Positions are integers, so both are exact."""

import torch

NO_DISTANCE = 2**31 - 1  # squared distance of a missing neighbour, larger than every other
NO_CODE = 2**63 - 1  # sorts after every code


def squared_distances(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return Σ_p (q_p − k_p)² over the last dimension, int32."""
    total = torch.zeros((), dtype=torch.int32, device=queries.device)
    for query, key in zip(queries.int().unbind(dim=-1), keys.int().unbind(dim=-1), strict=True):
        total = total + (query - key).square()
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
    codes = (squared.long() << 32 | ages).masked_fill(~visible, NO_CODE)
    missing = num_neighbors - codes.shape[-1]
    if missing > 0:  # `pad` converts its value to a float
        codes = torch.cat([codes, codes.new_full((*codes.shape[:-1], missing), NO_CODE)], dim=-1)
    codes = codes.topk(num_neighbors, dim=-1, largest=False).values
    return (codes & 0xFFFFFFFF).masked_fill(codes == NO_CODE, -1), (codes >> 32).int()
