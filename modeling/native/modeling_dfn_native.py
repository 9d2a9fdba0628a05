"""Function of the original DFN, for converted checkpoints. It maps a field to a field; it is neither causal nor a
language model.

The entities are the points of the field with the largest feature norms. A layer computes, for their states s and
positions p:

    f_i = W_f s_i,  p_i ← p_i + α f_i,  N(i) = the k nearest other entities
    a_ij = exp(−‖p_i − p_j‖ / 2σ²) over N(i), divided by (their sum + 1e-8)
    s_i ← LayerNorm(s_i + MLP[s_i, Σ_j a_ij W_v s_j + memory(s_i)]) / sqrt(mean_j ‖f_j‖² + 1e-6)

Parameters have the names of the original. The original updates its memory in each forward pass; this model does not,
so that every call equals the first call of the original after loading.

Shape letters: B batch, S points of the field, N entities, D entity_dim, M memory rows, R points of the output grid.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_dfn_native import DFNNativeConfig

GRID_DECAY = 0.1  # width of the kernel exp(−d² / 0.1) between an entity and a point of the output grid


@dataclass
class DFNNativeOutput(ModelOutput):
    """
    Attributes:
        field: `[B, R, input_dim]`, values at the points of a square grid over [−1, 1]², in row-major order.
        states: `[B, N, entity_dim]`, states of the entities after the last layer.
        positions: `[B, N, 2]`, positions of the entities after the last layer.
        weights: `[B, N, 1]`, weights of the entities at extraction; the model does not use them.
    """

    field: torch.Tensor | None = None
    states: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class DensityField(nn.Module):
    """Projects each point to a density and a position."""

    def __init__(self, config: DFNNativeConfig):
        super().__init__()
        width = config.field_dim
        self.density_projection = nn.Sequential(
            nn.Linear(config.input_dim, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )
        self.coordinate_generator = nn.Linear(width, 2)

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, S, input_dim]` → (positions `[B, S, 2]`, densities `[B, S, field_dim]`)."""
        densities = self.density_projection(values)
        return self.coordinate_generator(densities), densities


class EntityExtractor(nn.Module):
    """Extracts position, state and weight of the points with the largest feature norms."""

    def __init__(self, config: DFNNativeConfig):
        super().__init__()
        self.num_entities = config.num_entities
        self.sizes = [2, config.entity_dim, 1]
        self.entity_mapper = nn.Sequential(
            nn.Linear(config.field_dim + 2, config.field_dim), nn.GELU(), nn.Linear(config.field_dim, sum(self.sizes))
        )

    def forward(self, positions: torch.Tensor, densities: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Extract the entities.

        Args:
            positions: `[B, S, 2]`.
            densities: `[B, S, field_dim]`.

        Returns:
            (positions `[B, N, 2]`, states `[B, N, D]`, weights `[B, N, 1]`).
        """
        features = self.entity_mapper(torch.cat([positions, densities], dim=-1))
        strongest = features.norm(dim=-1).topk(min(self.num_entities, features.shape[1]), dim=-1).indices
        features = features.gather(1, strongest[..., None].expand(-1, -1, features.shape[-1]))
        return features.split(self.sizes, dim=-1)


class FlowAttention(nn.Module):
    """Moves each entity along its flow and attends to its k nearest other entities."""

    def __init__(self, config: DFNNativeConfig):
        super().__init__()
        self.k, self.alpha, self.sigma = config.k, config.alpha, config.sigma
        self.flow_projection = nn.Linear(config.entity_dim, 2)
        self.value_projection = nn.Linear(config.entity_dim, config.entity_dim)

    def forward(self, states: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Move the entities and attend.

        Args:
            states: `[B, N, D]`.
            positions: `[B, N, 2]`.

        Returns:
            (context `[B, N, D]`, moved positions `[B, N, 2]`, flow `[B, N, 2]`).
        """
        flow = self.flow_projection(states)
        positions = positions + self.alpha * flow
        distances = (positions.unsqueeze(2) - positions.unsqueeze(1)).norm(dim=-1)
        others = distances + 1e6 * torch.eye(distances.shape[-1], device=distances.device, dtype=distances.dtype)
        neighbors = others.topk(self.k, dim=-1, largest=False).indices
        affinity = torch.exp(-distances.gather(-1, neighbors) / (2 * self.sigma**2))
        affinity = affinity / (affinity.sum(dim=-1, keepdim=True) + 1e-8)
        weights = torch.zeros_like(distances).scatter(-1, neighbors, affinity)
        return weights @ self.value_projection(states), positions, flow


class FieldMemory(nn.Module):
    """Memory rows that move towards the mean of all entities of the batch and are read by cosine similarity."""

    memory: torch.Tensor

    def __init__(self, config: DFNNativeConfig):
        super().__init__()
        self.beta = config.beta
        self.register_buffer("memory", torch.zeros(config.memory_size, config.entity_dim))
        self.memory_projection = nn.Linear(config.entity_dim, config.entity_dim)
        self.aggregate_projection = nn.Linear(config.entity_dim, config.entity_dim)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Read the memory: states `[B, N, D]` → `[B, N, D]`."""
        update = self.memory_projection(self.aggregate_projection(states.mean(dim=1))).mean(dim=0)
        # The original assigns to `.data`, so that no gradient flows through the update.
        memory = self.beta * self.memory + (1 - self.beta) * update.detach()
        memory = self.memory_projection(memory)
        similarity = F.cosine_similarity(states.unsqueeze(2), memory, dim=-1)
        return similarity.softmax(dim=-1) @ memory


class FieldMLP(nn.Module):
    """LayerNorm(s + MLP[s, context])."""

    def __init__(self, config: DFNNativeConfig):
        super().__init__()
        width = config.entity_dim
        self.mlp = nn.Sequential(
            nn.Linear(2 * width, 4 * width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(config.dropout),
        )
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """States `[B, N, D]` and context `[B, N, D]` → states `[B, N, D]`."""
        return self.layer_norm(states + self.mlp(torch.cat([states, context], dim=-1)))


class DFNNativeLayer(nn.Module):
    """Layer of flow attention and memory, MLP, and FlowNorm."""

    def __init__(self, config: DFNNativeConfig):
        super().__init__()
        self.flow_attention = FlowAttention(config)
        self.field_mlp = FieldMLP(config)
        self.memory = FieldMemory(config)

    def forward(self, states: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer.

        Args:
            states: `[B, N, D]`.
            positions: `[B, N, 2]`.

        Returns:
            (states `[B, N, D]`, positions `[B, N, 2]`).
        """
        context, positions, flow = self.flow_attention(states, positions)
        states = self.field_mlp(states, context + self.memory(states))
        energy = flow.square().sum(dim=-1).mean(dim=-1).view(-1, 1, 1)
        return states / torch.sqrt(energy + 1e-6), positions


class OutputGenerator(nn.Module):
    """Interpolates the entities at the points of a square grid."""

    def __init__(self, config: DFNNativeConfig):
        super().__init__()
        self.side = math.isqrt(config.field_resolution)
        width = config.entity_dim
        self.output_projection = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, config.input_dim)
        )
        self.field_generator = nn.Linear(config.input_dim, 2 * config.field_resolution)  # unused, as in the original

    def forward(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """States `[B, N, D]` and positions `[B, N, 2]` → field `[B, R, input_dim]`."""
        axis = torch.linspace(-1, 1, self.side, device=positions.device, dtype=positions.dtype)
        grid = torch.cartesian_prod(axis, axis).view(1, -1, 2).expand(positions.shape[0], -1, -1)
        weights = torch.exp(-torch.cdist(grid, positions).square() / GRID_DECAY)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
        return weights @ self.output_projection(states)


class DFNNativePreTrainedModel(PreTrainedModel):
    """Base class of `DFNNativeModel`: initialisation and loading."""

    config: DFNNativeConfig
    main_input_name = "values"
    _no_split_modules = ["DFNNativeLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.02)
            init.zeros_(module.bias)
        elif isinstance(module, FieldMemory):
            init.zeros_(module.memory)
        else:
            super()._init_weights(module)


class DFNNativeModel(DFNNativePreTrainedModel):
    """The original `DFNPureModel`."""

    def __init__(self, config: DFNNativeConfig):
        super().__init__(config)
        self.density_field = DensityField(config)
        self.entity_extractor = EntityExtractor(config)
        self.dfn_layers = nn.ModuleList([DFNNativeLayer(config) for _ in range(config.num_layers)])
        self.output_generator = OutputGenerator(config)
        self.post_init()

    @can_return_tuple
    def forward(self, values: torch.FloatTensor, **kwargs) -> DFNNativeOutput:
        """Compute the output field.

        Args:
            values: `[B, S, input_dim]`, field values in any order; S must exceed `k`.

        Raises:
            ValueError: `values` has a wrong shape or too few points.
        """
        config = self.config
        if values.ndim != 3 or values.shape[-1] != config.input_dim:
            raise ValueError(
                f"`values` must have shape [batch, points, {config.input_dim}], got {tuple(values.shape)}."
            )
        if values.shape[1] <= config.k:
            raise ValueError(
                f"`values` has {values.shape[1]} points; pass more than `k` ({config.k}), because an entity is not "
                "its own neighbour."
            )
        positions, states, weights = self.entity_extractor(*self.density_field(values))
        for layer in self.dfn_layers:
            states, positions = layer(states, positions)
        field = self.output_generator(states, positions)
        return DFNNativeOutput(field=field, states=states, positions=positions, weights=weights)


__all__ = ["DFNNativeModel", "DFNNativePreTrainedModel"]
