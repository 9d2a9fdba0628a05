"""Order along a Hilbert curve: points that are close on the curve are close in space. Sorting costs O(n log n).

J. Skilling, "Programming the Hilbert curve", AIP Conference Proceedings 707 (2004).

Shape letters: B batch, M points, c coordinate_dim.
"""

from dataclasses import dataclass

import torch

KEY_BITS = 48  # bits of a key, divided among the axes; a float64 represents them exactly
LAST_KEY = 2**62  # greater than every key
CURVE_SHIFTS = (0.0, 1 / 3, 2 / 3)  # three shifted curves: points close in space are close on at least one


@dataclass(frozen=True)
class Box:
    """The bounding cube of each row's points, in which the row's Hilbert curve runs.

    Attributes:
        low: float64 `[B, 1, c]`, lowest corner.
        edge: float64 `[B, 1, 1]`, edge length; 1 if all points of the row are equal.

    Example:
        >>> import torch
        >>> from dfn_hf.modeling.ops.hilbert_curve import Box
        >>> points = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])  # [1, 4, 2]
        >>> box = Box.around(points, torch.ones(1, 4, dtype=torch.bool))
        >>> box.keys(points).argsort(dim=1)
        tensor([[0, 2, 1, 3]])
    """

    low: torch.Tensor
    edge: torch.Tensor

    @classmethod
    @torch.no_grad()
    def around(cls, points: torch.Tensor, real: torch.Tensor) -> "Box":
        """Return the bounding cube of `points` `[B, M, c]`; `real`, bool `[B, M]`, is False at padding."""
        points, padding = points.double(), ~real.unsqueeze(-1)
        low = points.masked_fill(padding, torch.inf).amin(dim=1, keepdim=True)
        high = points.masked_fill(padding, -torch.inf).amax(dim=1, keepdim=True)
        edge = (high - low).amax(dim=2, keepdim=True)
        return cls(low, torch.where(edge > 0, edge, 1))

    @torch.no_grad()
    def keys(self, points: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        """Return the position of points on the curve, int64 `[B, M]`.

        Args:
            points: `[B, M, c]`. A point outside the box has the key of the nearest point inside.
            shift: 0 for the curve of this box. Otherwise the curve of a box twice as large, shifted by this fraction
                of the edge along every axis: points that one curve separates are close on another.
        """
        bits = max(1, KEY_BITS // points.shape[-1])
        inside = ((points.double() - self.low) / self.edge).clamp(0, 1)
        if shift:
            inside = (inside + shift) / 2
        return hilbert_keys((inside * 2**bits).long().clamp(max=2**bits - 1), bits)


def hilbert_keys(cells: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the index of cells along the Hilbert curve, int64 `[...]` in [0, 2^(c · bits)).

    Args:
        cells: int64 `[..., c]` in [0, 2^bits).
        bits: bits per axis.

    Example:
        >>> import torch
        >>> from dfn_hf.modeling.ops.hilbert_curve import hilbert_keys
        >>> hilbert_keys(torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]]), bits=1)
        tensor([0, 1, 2, 3])
    """
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
