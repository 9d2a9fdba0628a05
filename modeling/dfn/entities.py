"""Entities: projections of states to positions, flows and influences (Dynamic Flow Networks (Stürtz), §2.1 and §2.2).

Shape letters: B batch, M entities of this call, H heads, P position_dim, F coordinate features, K neighbours.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..modules.cache import FlowCacheLayer
from ..modules.linear import linear_in_weight_dtype
from ..modules.row_layout import RowLayout, pad_index
from .configuration_dfn import DFNConfig
from .dynamic_chunking import PackedEntities


@dataclass
class Entities:
    """Positions, influence and neighbours of one layer's entities.

    Attributes:
        rest_positions: `[B, H, M, P]`, on the ball: the keys of the neighbour search.
        moved_positions: `[B, H, M, P]`, on the ball: the queries of the neighbour search.
        influence: `[B, H, M]`, added to the logits of all queries that attend to the entity.
        neighbors: int64 `[B, H, M, K]`, index of each neighbour beyond the local window; −1 if there are fewer than K.
    """

    rest_positions: torch.Tensor
    moved_positions: torch.Tensor
    influence: torch.Tensor
    neighbors: torch.Tensor


def squash_to_ball(x: torch.Tensor) -> torch.Tensor:
    """Map `[..., P]` into the ball of radius 2 sqrt(P): 2 x / sqrt(mean(x²) + 1), smooth at 0.

    The neighbour search rounds positions to a grid of int16; the bounded range fits it.
    """
    return 2 * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1)


def unit_variance_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear map without bias, initialised with standard deviation 1/sqrt(in_features).

    Outputs then have the variance of the inputs for every `initializer_range`, so that positions fill the ball.
    """
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.init_std = in_features**-0.5
    return linear


class ContinuousEntities(nn.Module):
    """Position p, flow f and influence w of each entity (Dynamic Flow Networks (Stürtz), §2.1 and §2.2).

    Args:
        coordinate_features: F, size of the features of the entities' own coordinates; 0 for entities without them.
    """

    def __init__(self, config: DFNConfig, coordinate_features: int = 0):
        super().__init__()
        self.num_heads, self.position_dim = config.num_attention_heads, config.position_dim
        self.flow_step = config.flow_step
        self.moved_query = config.moved_query
        size = self.num_heads * self.position_dim
        self.position_proj = unit_variance_linear(config.hidden_size, size)
        self.flow_proj = unit_variance_linear(config.hidden_size, size)
        self.influence_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.coordinate_proj = unit_variance_linear(coordinate_features, size) if coordinate_features else None

    def forward(
        self,
        u: torch.Tensor,
        origin: torch.Tensor | None,
        coordinates: torch.Tensor | None = None,
        log_mass: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            u: `[B, M, hidden_size]`.
            origin: `[B, H, M, P]`, added to the projected positions; None for 0.
            coordinates: `[B, M, F]`, or None.
            log_mass: `[B, M]`, added to the influence; None for entities of mass 1, which tokens are.

        Returns:
            (rest positions on the ball `[B, H, M, P]`, moved positions on the ball `[B, H, M, P]`, influence
            `[B, H, M]`, unbounded moved positions `[B, H, M, P]`), in float32 or float64.
        """
        # Positions decide which neighbours are found; half precision would collapse them to a few distinct values.
        with torch.autocast(u.device.type, enabled=False):
            rest, flow = (
                self._split_heads(linear_in_weight_dtype(project, u))
                for project in (self.position_proj, self.flow_proj)
            )
            influence = linear_in_weight_dtype(self.influence_proj, u)
            offset = None
            if coordinates is not None:
                offset = self._split_heads(linear_in_weight_dtype(self.coordinate_proj, coordinates))
        dtype = torch.promote_types(u.dtype, torch.float32)
        rest, flow, influence = rest.to(dtype), flow.to(dtype), influence.to(dtype).transpose(1, 2)
        if origin is not None:
            rest = rest + origin
        if offset is not None:
            rest = rest + offset.to(dtype)
        if log_mass is not None:
            influence = influence + log_mass.to(dtype).unsqueeze(1)
        moved = rest + self.flow_step * flow
        return squash_to_ball(rest if self.moved_query else moved), squash_to_ball(moved), influence, moved

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, M, H * P]` → `[B, H, M, P]`."""
        return x.unflatten(-1, (self.num_heads, self.position_dim)).transpose(1, 2)


def pad_entities(entities: Entities, rows: RowLayout, state: FlowCacheLayer | None) -> Entities:
    """Scatter entities of left-aligned rows to the input's columns.

    Args:
        state: the layer's cache before `finish_forward`, or None.

    Returns:
        Entities whose neighbours are columns, counted from the first column of the cache; 0 and −1 where padded.
    """
    columns = pad_index(rows, state)

    def pad(x):
        return rows.pad(x.transpose(1, 2)).transpose(1, 2)

    neighbors = entities.neighbors
    neighbor_columns = columns[:, None, None].expand(*neighbors.shape[:3], -1).gather(-1, neighbors.clamp(min=0))
    # Shifted by one, so that the zeros of the padding become −1.
    neighbors = pad(torch.where(neighbors < 0, 0, neighbor_columns + 1)) - 1
    return Entities(pad(entities.rest_positions), pad(entities.moved_positions), pad(entities.influence), neighbors)


def unpack_entities(entities: Entities, packed: PackedEntities) -> Entities:
    """Undo the packing of several rows into one; neighbours become positions in their own row."""

    def unpack(x):
        return packed.unpack(x.transpose(1, 2)).transpose(1, 2)

    neighbors = entities.neighbors
    in_own_row = neighbors - (packed.rows.positions - packed.row_positions)[:, None, :, None]
    neighbors = unpack(torch.where(neighbors < 0, 0, in_own_row + 1)) - 1
    return Entities(
        unpack(entities.rest_positions), unpack(entities.moved_positions), unpack(entities.influence), neighbors
    )
