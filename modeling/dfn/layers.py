"""One DFN layer: entities flow to a place and read what is near.

For every entity i with state s_i:

    u_i  = short convolution of FlowNorm(s), causal or on both sides
    p_i  = W_p u_i + W_c c_i,  f_i = W_f u_i            rest position and flow, per head; c_i coordinates, if any
    k_i  = ball(p_i),  q_i = ball(p_i + α f_i)          where others find it; where it has moved to read
    ℓ_ij = −γ ‖q_i − k_j‖² + w_j − λ log(1 + |i − j|)   Gaussian affinity, influence weight with log mass, fading
    y_i  = Σ_j softmax(ℓ_i)_j W_v u_j                   over the local window and the nearest predecessors beyond it;
                                                        where the model is not causal, over those on both sides
    s_i += W_o (y_i ⊙ silu(W_g u_i)),   s_i += DynamicFieldMLP(FlowNorm(s_i), y_i)

Shape letters: B batch, M entities of this call, N stored entities, H heads, P position_dim, D value features per head,
F coordinate features, K neighbours, C memory chunks, S memory slots.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modules.cache import FlowCacheLayer
from ..modules.causal_conv import CausalConv
from ..modules.chunk_memory import ChunkMemory, mix_slots
from ..modules.linear import linear_in_weight_dtype
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout, pad_attention_with_grad
from ..ops.cell_grid import GRID, ball_cells_per_axis, geometric_cell_sizes, grid_axes
from ..ops.cell_lists import CellChains, CellGrids, grid_constants
from ..ops.chunking import apply_chunked
from ..ops.flow_attention import flow_attention, flow_weights
from ..ops.flow_attention_decode import attention_step
from ..ops.neighbor_search import search_cells, search_exact
from ..ops.neighbor_search_decode import search_step
from .configuration_dfn import DFNConfig


@dataclass
class Entities:
    """The entities of one layer, as they flowed.

    Attributes:
        rest_positions: `[B, H, M, P]`, on the ball: where others find an entity.
        moved_positions: `[B, H, M, P]`, on the ball: from where it reads.
        influence: `[B, H, M]`, log weight.
        neighbors: int64 `[B, H, M, K]`, column of each neighbour beyond the local window, −1 for none.
    """

    rest_positions: torch.Tensor
    moved_positions: torch.Tensor
    influence: torch.Tensor
    neighbors: torch.Tensor


def squash_to_ball(x: torch.Tensor) -> torch.Tensor:
    """2 x / sqrt(mean(x²) + 1): into the ball of radius 2 sqrt(P), smooth at 0, the range fixed whatever the data."""
    return 2 * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1)


def unit_variance_linear(in_features: int, out_features: int) -> nn.Linear:
    """A map whose outputs start as large as its inputs, whatever `initializer_range`: positions then fill the ball."""
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.init_std = in_features**-0.5
    return linear


class FlowNorm(nn.Module):
    """FlowNorm(s) = s / sqrt(E‖f‖² + ε) (paper §2.3), with a flow map of its own so that it is not circular.

    g ⊙ s · rsqrt(E[mean(f²) + 1e-2 mean(s²)] + ε) with f = W_n s. The share of mean(s²) keeps a vanishing flow from
    exploding the state. E is over the entity itself or, `flow_norm="running"`, its segment's entities so far; where
    the model is not causal, all of the segment's.
    """

    def __init__(self, config: DFNConfig, name: str):
        super().__init__()
        self.name = name
        self.running = config.flow_norm == "running"
        self.is_causal = config.is_causal
        self.flow_map = unit_variance_linear(config.hidden_size, config.num_attention_heads * config.position_dim)
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.norm_eps

    def forward(self, states: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        energy = apply_chunked(self._energy, states)
        if self.running:
            energy = self._running_mean(energy, rows, state) if self.is_causal else rows.segment_mean(energy)
        return apply_chunked(self._scaled, states, energy)

    def _energy(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        flow = linear_in_weight_dtype(self.flow_map, states).to(wide.dtype)
        return flow.square().mean(dim=-1, keepdim=True) + 1e-2 * wide.square().mean(dim=-1, keepdim=True)

    def _scaled(self, states: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
        return (self.weight * (states.to(energy.dtype) * torch.rsqrt(energy + self.eps))).to(states.dtype)

    def _running_mean(self, energy: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        # Sums in float64: float32 sums would depend on how the sequence was split into calls.
        sums = energy.double().cumsum(dim=1)
        if state is not None:
            stored = state.data(self.name)
            if stored is not None:
                last = (state.lengths - 1).clamp(min=0).view(-1, 1, 1, 1)
                before = stored.gather(2, last)[:, :, 0]
                sums = sums + torch.where((state.lengths > 0)[:, None, None], before, 0)
            state.append(self.name, sums.unsqueeze(1))
        elif rows.segment is not None:
            place = torch.arange(sums.shape[1], device=sums.device)
            before = (place - rows.segment_positions - 1)[..., None]
            sums = sums - torch.where(before < 0, 0, sums.gather(1, before.clamp(min=0)))
        return (sums / (rows.segment_positions + 1)[..., None]).to(energy.dtype)


class BaselineNorm(nn.Module):
    """RMSNorm or no norm at all in the place of FlowNorm, for ablations."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps) if config.flow_norm == "rms" else nn.Identity()

    def forward(self, states: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        return self.norm(states)


def make_norm(config: DFNConfig, name: str) -> FlowNorm | BaselineNorm:
    """The norm before a block; `name` is that of its sums in the cache."""
    return FlowNorm(config, name) if config.flow_norm in ("entity", "running") else BaselineNorm(config)


class ContinuousEntities(nn.Module):
    """Position p, flow f and influence w of every entity (paper §2.1, §2.2).

    Args:
        coordinate_features: F, of the entities' own coordinates; 0 if they have none.
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
            origin: `[B, H, M, P]`, what positions start from, or None for 0.
            coordinates: `[B, M, F]`, or None.
            log_mass: `[B, M]`, added to the influence, or None: a token has mass 1.

        Returns:
            (rest on the ball `[B, H, M, P]`, moved on the ball, influence `[B, H, M]`, moved `[B, H, M, P]`), in
            float32 or float64.
        """
        # Positions decide who is found: half precision would leave them a few places each.
        with torch.autocast(u.device.type, enabled=False):
            rest, flow = (
                self._heads(linear_in_weight_dtype(project, u)) for project in (self.position_proj, self.flow_proj)
            )
            influence = linear_in_weight_dtype(self.influence_proj, u)
            placed = (
                None if coordinates is None else self._heads(linear_in_weight_dtype(self.coordinate_proj, coordinates))
            )
        dtype = torch.promote_types(u.dtype, torch.float32)
        rest, flow, influence = rest.to(dtype), flow.to(dtype), influence.to(dtype).transpose(1, 2)
        if origin is not None:
            rest = rest + origin
        if placed is not None:
            rest = rest + placed.to(dtype)
        if log_mass is not None:
            influence = influence + log_mass.to(dtype).unsqueeze(1)
        moved = rest + self.flow_step * flow
        return squash_to_ball(rest if self.moved_query else moved), squash_to_ball(moved), influence, moved

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, self.position_dim)).transpose(1, 2)


class PersistentFieldMemory(nn.Module):
    """A few entities m_1 … m_r that persist (paper §2.5): slots that join the softmax beside the neighbours.

    m_j ← β_j m_j + (1 − β_j) Aggregate_j(y) once per closed chunk, Aggregate_j an attention pooling of the chunk's y.
    What is pooled is what the entities read from each other: reading memory back into memory would chain the chunks
    one behind the other. A slot lies at a learnt place, has a learnt influence and does not fade.
    """

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.slots = ChunkMemory(config.hidden_size, config.memory_slots, config.memory_chunk, config.memory_decay)
        self.position = nn.Parameter(torch.empty(self.num_heads, config.memory_slots, config.position_dim))
        self.influence = nn.Parameter(torch.empty(self.num_heads, config.memory_slots))
        self.value_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        y: torch.Tensor,
        total: torch.Tensor,
        query: torch.Tensor,
        sharpness: torch.Tensor,
        rows: RowLayout,
        state: FlowCacheLayer | None,
        state_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Join the slots to the softmax.

        Args:
            y: `[B, H, M, D]`, read from entities; total: log Σ exp of its logits, `[B, H, M]`.
            query: `[B, H, M, P + 1]`, as for `flow_attention`; sharpness: γ, `[H]`.
            state_dtype: of the entities' states, which the projection's weights have too.

        Returns:
            (y over entities and slots, the share of the entities `[B, H, M]`).
        """
        slots, layout = self.slots(y.transpose(1, 2).flatten(2), rows, state)
        values = self.value_proj(slots.to(state_dtype).flatten(0, 1)).unflatten(0, slots.shape[:2])
        values = values.unflatten(-1, (self.num_heads, -1))
        values = values.permute(0, 3, 1, 2, 4).to(query.dtype)
        key = augment_key(squash_to_ball(self.position.to(query.dtype)), self.influence.to(query.dtype), sharpness)
        logits = query @ key.transpose(-1, -2)
        joint = torch.cat([total.unsqueeze(-1), logits], dim=-1).softmax(dim=-1)
        share = joint[..., 0]
        return (y * share.unsqueeze(-1) + mix_slots(joint[..., 1:], values, layout)).to(y.dtype), share


def is_decode_step(state: FlowCacheLayer | None, x: torch.Tensor) -> bool:
    """Whether a call of `[B, H, M, features]` is a step of fixed shape, and torch operations are best for it.

    They are compiled into a third less time than operators in C take to be called, and do not wait for a GPU.
    """
    in_fixed_shape = state is not None and state.is_compileable and x.shape[2] == 1
    return in_fixed_shape and (torch.compiler.is_compiling() or x.device.type != "cpu")


def augment_key(positions: torch.Tensor, influence: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
    """[k, w − γ‖k‖²]: with [2γ q, 1] its product is −γ‖q − k‖² + w, but for −γ‖q‖², which no softmax sees.

    `[..., H, N, P]`, `[..., H, N]`, `[H]` → `[..., H, N, P + 1]`.
    """
    bias = influence - sharpness[:, None] * positions.square().sum(dim=-1)
    return torch.cat([positions, bias.unsqueeze(-1)], dim=-1)


class DynamicFlowAttention(nn.Module):
    """Each entity reads its local window, the nearest predecessors beyond it and the memory (paper §2.2)."""

    def __init__(self, config: DFNConfig, layer_idx: int, coordinate_features: int = 0):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.entities = ContinuousEntities(config, coordinate_features)
        self.value_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.memory = PersistentFieldMemory(config) if config.memory_slots else None
        self.log_sharpness = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.log_fading = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.cell_sizes = config.cell_sizes or geometric_cell_sizes(config.num_tables)
        axes = grid_axes(config.position_dim)
        rotation = torch.empty(config.num_tables, axes, config.position_dim, dtype=torch.int32)
        self.register_buffer("grid_rotation", rotation)
        self.register_buffer("grid_shift", torch.empty(config.num_tables, axes, dtype=torch.int32))
        self.reset_grids()

    @torch.no_grad()
    def reset_grids(self) -> None:
        """The grids that `search_seed` stands for."""
        config = self.config
        rotation, shift = grid_constants(config.position_dim, config.num_tables, config.search_seed + self.layer_idx)
        init.copy_(self.grid_rotation, rotation)
        init.copy_(self.grid_shift, shift)

    def forward(
        self,
        u: torch.Tensor,
        rows: RowLayout,
        state: FlowCacheLayer | None,
        origin: torch.Tensor | None,
        output_attentions: bool,
        coordinates: torch.Tensor | None = None,
        log_mass: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Entities, torch.Tensor | None]:
        """Args: u `[B, M, hidden_size]`; origin: moved positions `[B, H, M, P]` that positions start from, or None.

        Returns:
            (y `[B, M, hidden_size]`, moved positions, entities of the rows, flow weights between columns
            `[B, H, M, N]` or None).
        """
        rest, moved_on_ball, influence, moved = self.entities(u, origin, coordinates, log_mass)
        value = self.value_proj(u).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        sharpness, fading = self.log_sharpness.to(rest.dtype).exp(), self.log_fading.to(rest.dtype).exp()
        key = augment_key(rest, influence, sharpness)
        query = torch.cat([2 * sharpness[:, None, None] * moved_on_ball, torch.ones_like(key[..., :1])], dim=-1)
        index, first = rows.positions, 0
        if self.config.is_causal:
            neighbors = self.find(moved_on_ball.detach(), rest.detach(), rows, state)
            if state is not None and self.config.num_neighbors == 0:
                before = self.config.local_window - 1
                key, value = (self._tail(state, *named, before) for named in (("key", key), ("value", value)))
                index, first = (
                    before + torch.arange(u.shape[1], device=u.device).expand_as(index),
                    index[:, :1] - before,
                )
            elif state is not None:
                key, value = state.append("key", key), state.append("value", value)
            if is_decode_step(state, query) and not (self.training and self.config.attention_dropout):
                window = self.config.local_window
                y, total = attention_step(query, key, value, fading, index, rows.segment_positions, neighbors, window)
            else:
                y, total = self._read(query, key, value, fading, index, rows.segment_positions, neighbors)
        else:
            y, total, neighbors = self._read_both_sides(query, key, value, fading, rows, moved_on_ball, rest)

        share = None
        if self.memory is not None:
            with torch.autocast(u.device.type, enabled=False):
                y, share = self.memory(y, total, query, sharpness, rows, state, u.dtype)
        weights = None
        if output_attentions:
            num_entities = int(index.max()) + 1
            key, value = key[:, :, :num_entities], value[:, :, :num_entities]
            weights = self._weights(query, key, fading, index, rows, neighbors)
            weights = weights if share is None else weights * share.unsqueeze(-1)
            places = first + torch.arange(num_entities, device=weights.device)[None]
            observed, weights_again = pad_attention_with_grad(weights, places, rows, state)
            # Adds zero, and a gradient to what is returned.
            y = y + ((weights_again - weights) @ value).to(y.dtype)
            weights = observed
        entities = Entities(rest, moved_on_ball, influence, neighbors)
        return y.transpose(1, 2).flatten(2), moved, entities, weights

    def _tail(self, state: FlowCacheLayer, name: str, x: torch.Tensor, before: int) -> torch.Tensor:
        """`[B, H, M, features]` behind what a window reaches before it: `[B, H, before + M, features]`."""
        heads = x.shape[1]
        return state.roll(name, x.transpose(1, 2).flatten(2), before).unflatten(-1, (heads, -1)).transpose(1, 2)

    def _read(self, query, key, value, fading, index, reach, neighbors) -> tuple[torch.Tensor, torch.Tensor]:
        """y `[B, H, M, D]` and log Σ exp of its logits."""
        dropout = self.config.attention_dropout if self.training else 0.0
        window = self.config.local_window
        return flow_attention(query, key, value, fading, index, reach, neighbors, window, dropout)

    def _read_both_sides(self, query, key, value, fading, rows: RowLayout, moved, rest) -> tuple[torch.Tensor, ...]:
        """(y, log Σ exp of its logits, neighbours on both sides): the causal read, once from each end of the rows.

        Each reads the entity itself, which has fading 0 in both, so it is taken out once:
        Z = Z_before + Z_after − e^ℓ_ii, and y likewise.
        """
        before = self.find(moved.detach(), rest.detach(), rows, None)
        y_before, total_before = self._read(query, key, value, fading, rows.positions, rows.segment_positions, before)
        turned = rows.flipped()
        moved, rest, *ends = (rows.flip(x, dim=2) for x in (moved.detach(), rest.detach(), query, key, value))
        after = self.find(moved, rest, turned, None)
        read_after = self._read(*ends, fading, turned.index, turned.segment_positions, after)
        y_after, total_after = (rows.flip(x, dim=2) for x in read_after)
        own = (query * key).sum(dim=-1)
        top = torch.maximum(total_before, total_after)
        parts = [(x - top).exp() for x in (total_before, total_after, own)]
        scale = parts[0] + parts[1] - parts[2]
        y = sum(
            (part / scale).unsqueeze(-1) * x
            for part, x in zip((*parts[:2], -parts[2]), (y_before, y_after, value), strict=True)
        )
        neighbors = torch.cat([before, rows.flip(rows.flip_positions(after), dim=2)], dim=-1)
        return y.to(value.dtype), top + scale.log(), neighbors

    def _weights(self, query, key, fading, index, rows: RowLayout, neighbors) -> torch.Tensor:
        """Dense flow weights `[B, H, M, N]` of what `forward` has read."""
        window = self.config.local_window
        ahead = torch.zeros_like(rows.positions) if self.config.is_causal else rows.flip(rows.flipped().reach)
        return flow_weights(query, key, fading, index, rows.segment_positions, ahead, neighbors, window)

    @torch.no_grad()
    def find(
        self, query: torch.Tensor, key: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None
    ) -> torch.Tensor:
        """Indices of the neighbours beyond the local window, int64 `[B, H, M, K]`, −1 for none.

        Positions `[B, H, M, P]` are rounded to a grid first: a product over one entity and one over many differ in
        their last bits, and equal contexts would tie in one and not in the other.
        """
        config = self.config
        batch, heads, length, _ = query.shape
        if config.num_neighbors == 0:
            return torch.empty(batch, heads, length, 0, dtype=torch.int64, device=query.device)
        # Cells are integers: a diverged model's NaN would be an index anywhere.
        query, key = ((x * GRID).round().nan_to_num().float() / GRID for x in (query, key))
        index, reach = (x.repeat_interleave(heads, dim=0) for x in (rows.positions, rows.segment_positions))
        if config.search_implementation == "exact":
            if state is not None:
                key = state.append("place", key)
            found, _ = search_exact(
                query.flatten(0, 1), index, key.flatten(0, 1), config.num_neighbors, config.local_window, reach=reach
            )
        else:
            grids, chains = self._grids(state), None
            query_cells, cells = (grids.cells(positions, on_grid=True) for positions in (query, key))
            if state is not None:
                key, cells = state.append("place", key), state.append("cell", cells)
                chains = self._chains(state, grids, batch, length)
            counts = None if rows.lengths is None else rows.lengths.repeat_interleave(heads)
            asked = (query.flatten(0, 1), query_cells.flatten(0, 1), index, key.flatten(0, 1), cells.flatten(0, 1))
            sizes = (config.num_neighbors, config.local_window, config.candidates_per_table)
            if is_decode_step(state, query):
                first_slots = grids.constants[-1]
                found, _ = search_step(
                    *asked, *sizes, chains.heads, chains.links, first_slots, reach=reach, counts=counts
                )
            else:
                offsets = grids.table_offsets
                found, _ = search_cells(
                    *asked, *sizes, reach=reach, counts=counts, chains=chains, table_offsets=offsets
                )
        return found.view(batch, heads, length, -1)

    def _grids(self, state: FlowCacheLayer | None) -> CellGrids:
        if state is not None:
            return state.constant("grids", lambda: self._grids(None).with_constants())
        cells_per_axis = ball_cells_per_axis(self.config.position_dim, self.cell_sizes)
        return CellGrids(self.grid_rotation, self.grid_shift, self.cell_sizes, cells_per_axis)

    def _chains(self, state: FlowCacheLayer, grids: CellGrids, batch: int, length: int) -> CellChains:
        offsets = grids.table_offsets
        device = self.grid_rotation.device
        heads = state.index_state(
            "head",
            lambda: torch.full((batch, self.num_heads, offsets[-1]), -1, dtype=torch.int32, device=device),
            UndoChains(offsets, self.config.local_window),
        )
        new = torch.empty(batch, self.num_heads, length, len(offsets) - 1, dtype=torch.int32, device=device)
        links = state.reserve("link", new)
        return CellChains(heads.flatten(0, 1), links.flatten(0, 1), offsets)


@dataclass
class UndoChains:
    """Takes the entities a crop removed, or put back into the local window, out of the chains again."""

    table_offsets: list[int]
    window: int

    def __call__(self, state: FlowCacheLayer, old: torch.Tensor, new: torch.Tensor) -> None:
        heads, links, cells = (state.data(name).flatten(0, 1) for name in ("head", "link", "cell"))
        old, new = (length.repeat_interleave(heads.shape[0] // length.shape[0]) for length in (old, new))
        entered = ((length - self.window).clamp(min=0) for length in (new, old))
        CellChains(heads, links, self.table_offsets).undo(cells, *entered)


class DynamicFieldMLP(nn.Module):
    """MLP([s, y]) (paper §2.4), added to the state; with `gated_mlp` a SwiGLU (Shazeer 2020) of [s, y]."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.up_proj = nn.Linear(2 * config.hidden_size, config.intermediate_size, bias=False)
        self.gate_proj = None
        if config.gated_mlp:
            self.gate_proj = nn.Linear(2 * config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        field = torch.cat([states, y], dim=-1)
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(field)))
        return self.down_proj(F.silu(self.gate_proj(field)) * self.up_proj(field))


class DFNLayer(GradientCheckpointingLayer):
    """One flow step: flow attention, gated if `output_gate`, then the Dynamic Field MLP; each adds to the state."""

    def __init__(self, config: DFNConfig, layer_idx: int, coordinate_features: int = 0):
        super().__init__()
        self.carry_positions = config.carry_positions
        self.flow_norm = make_norm(config, "flow_norm")
        ahead = 0 if config.is_causal else config.conv_kernel - 1
        self.conv = CausalConv(config.hidden_size, config.conv_kernel, ahead)
        self.attention = DynamicFlowAttention(config, layer_idx, coordinate_features)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if config.output_gate else None
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp_norm = make_norm(config, "mlp_norm")
        self.mlp = DynamicFieldMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        origin: torch.Tensor | None,
        rows: RowLayout,
        coordinates: torch.Tensor | None = None,
        log_mass: torch.Tensor | None = None,
        past_key_values: FlowCacheLayer | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Entities, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, M, hidden_size]`.
            origin: moved positions of the layer before, or None.
            coordinates: `[B, M, F]` of the entities, or None.
            log_mass: `[B, M]`, or None.

        Returns:
            (states of the same shape, what the next layer's positions start from, influence `[B, H, M]`, entities,
            flow weights or None). What gradients flow through stands in the tuple itself: re-entrant checkpointing
            sees no deeper.
        """
        u = self.conv(self.flow_norm(hidden_states, rows, past_key_values), rows, past_key_values)
        u = u.to(hidden_states.dtype)
        y, moved, entities, weights = self.attention(
            u, rows, past_key_values, origin, output_attentions, coordinates, log_mass
        )
        hidden_states = apply_chunked(self._add_flow, hidden_states, u, y)
        normed = self.mlp_norm(hidden_states, rows, past_key_values)
        hidden_states = apply_chunked(self._add_field, hidden_states, normed, y)
        return hidden_states, moved if self.carry_positions else None, entities.influence, entities, weights

    def _add_flow(self, states: torch.Tensor, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        read = y if self.gate_proj is None else y * F.silu(self.gate_proj(u))
        return states + self.dropout(self.out_proj(read))

    def _add_field(self, states: torch.Tensor, normed: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return states + self.dropout(self.mlp(normed, y.to(states.dtype)))


def identity_conv_init(weight: torch.Tensor, ahead: int = 0) -> torch.Tensor:
    """A filter like `weight` `[channels, 1, taps]` that passes the current input, and a little of those around it.

    `ahead` of its taps are for inputs after the current one, the others for those before.

    With the identity alone recall is learnt as well, in twice the steps: a key has to be found by what came before it.
    """
    taps = 0.3 * torch.randn_like(weight)
    taps[..., -1 - ahead] = 1
    return taps
