"""A Hilbert curve through places of a field: what is near along it is near in space, and sorting costs n log n.

J. Skilling, Programming the Hilbert curve, AIP Conference Proceedings 707 (2004).

Shape letters: B batch, M places, c coordinate_dim.
"""

from dataclasses import dataclass

import torch

KEY_BITS = 48  # of a key, shared by its axes; a float64 holds as many
LAST_KEY = 2**62  # behind every key
CURVE_SHIFTS = (0.0, 1 / 3, 2 / 3)  # of three curves: neighbours in space lie side by side on one of them


@dataclass(frozen=True)
class Box:
    """The cube around each row's places, in which its curve lies.

    Attributes:
        low: float64 `[B, 1, c]`, its lowest corner.
        edge: float64 `[B, 1, 1]`, its edge; 1 where all places of a row are one.
    """

    low: torch.Tensor
    edge: torch.Tensor

    @classmethod
    @torch.no_grad()
    def around(cls, places: torch.Tensor, real: torch.Tensor) -> "Box":
        """Of places `[B, M, c]` where `real`, bool `[B, M]`, is True."""
        places, hole = places.double(), ~real.unsqueeze(-1)
        low = places.masked_fill(hole, torch.inf).amin(dim=1, keepdim=True)
        high = places.masked_fill(hole, -torch.inf).amax(dim=1, keepdim=True)
        edge = (high - low).amax(dim=2, keepdim=True)
        return cls(low, torch.where(edge > 0, edge, 1))

    @torch.no_grad()
    def keys(self, places: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        """How far along the curve places `[B, M, c]` lie, int64 `[B, M]`; those outside as their nearest inside.

        Args:
            shift: 0 for the curve of the box itself; else that of a box twice as large, moved by this share of the
                edge along every axis: what one curve separates lies side by side on another.
        """
        bits = max(1, KEY_BITS // places.shape[-1])
        inside = ((places.double() - self.low) / self.edge).clamp(0, 1)
        if shift:
            inside = (inside + shift) / 2
        return hilbert_keys((inside * 2**bits).long().clamp(max=2**bits - 1), bits)


def hilbert_keys(cells: torch.Tensor, bits: int) -> torch.Tensor:
    """Index along the Hilbert curve of cells, int64 `[..., c]` in [0, 2^bits) → int64 `[...]` in [0, 2^(c·bits))."""
    axes = [axis.clone() for axis in cells.unbind(-1)]
    for bit in range(bits - 1, 0, -1):
        below = (1 << bit) - 1
        for axis in axes:
            is_set = -((axis >> bit) & 1)  # all ones or zero
            swapped = (axes[0] ^ axis) & below & ~is_set
            axes[0] ^= (below & is_set) | swapped
            axis ^= swapped
    for before, axis in zip(axes, axes[1:], strict=False):
        axis ^= before
    turn = torch.zeros_like(axes[0])
    for bit in range(bits - 1, 0, -1):
        turn ^= ((1 << bit) - 1) & -((axes[-1] >> bit) & 1)
    key = torch.zeros_like(turn)
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            key = (key << 1) | (((axis ^ turn) >> bit) & 1)
    return key
