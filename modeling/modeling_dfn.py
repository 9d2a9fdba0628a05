"""Dynamic Flow Networks: entities that flow to a place and read what is near.

A layer, for every entity i with state s_i:

    u_i  = short causal convolution of FlowNorm(s)
    p_i  = W_p u_i,  f_i = W_f u_i                      rest position and flow, per head
    k_i  = ball(p_i),  q_i = ball(p_i + α f_i)          where others find it; where it has moved to read
    ℓ_ij = −γ ‖q_i − k_j‖² + w_j − λ log(1 + i − j)     Gaussian affinity, influence weight, fading
    y_i  = Σ_j softmax(ℓ_i)_j W_v u_j                   over the local window and the nearest predecessors beyond it
    s_i += W_o (y_i ⊙ silu(W_g u_i)),   s_i += DynamicFieldMLP(FlowNorm(s_i), y_i)

Rows are left-aligned behind the model's boundary (`padding.py`); state lives in `state_cache.StateLayer`.

Shape letters: B batch, M entities of this call, N stored entities, H heads, P position_dim, D value features per head,
K neighbours, C memory chunks, S memory slots.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .causal_conv import CausalConv
from .chunk_memory import ChunkMemory, mix_slots
from .classification import LastStateClassification
from .configuration_dfn import SEARCHES, DFNConfig
from .flow_attention import flow_attention, flow_weights
from .flow_search import (
    GRID,
    CellChains,
    CellGrids,
    ball_cells_per_axis,
    geometric_cell_sizes,
    grid_axes,
    grid_constants,
    search_cells,
    search_exact,
)
from .model_inputs import GrowingStateMixin, begin_call, embed, end_call, next_token_labels
from .padding import Rows, observe_weights, row_columns
from .pieces import in_pieces
from .rms_norm import RMSNorm
from .small_maps import decide
from .state_cache import CACHE_NAME, StateLayer, given_cache


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


@dataclass
class DFNModelOutput(BaseModelOutputWithPast):
    """
    Attributes:
        last_hidden_state: `[B, M, hidden_size]`, zero where padded.
        past_key_values: the state for continuation; named `cache` by transformers 5.24 and later.
        hidden_states: embeddings and each layer's output, the last one after the final norm.
        attentions: per layer the flow weights among tokens `[B, H, M, N]`; memory takes what is left to 1.
        entities: per layer `Entities`.
    """

    entities: tuple[Entities, ...] | None = None


@dataclass
class DFNCausalLMOutput(CausalLMOutputWithPast):
    """
    Attributes:
        loss: scalar, next-token cross-entropy.
        logits: `[B, M, vocab_size]`.
        past_key_values, hidden_states, attentions, entities: see `DFNModelOutput`.
    """

    entities: tuple[Entities, ...] | None = None


def ball(x: torch.Tensor) -> torch.Tensor:
    """2 x / sqrt(mean(x²) + 1): into the ball of radius 2 sqrt(P), smooth at 0, the range fixed whatever the data."""
    return 2 * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1)


def unit_linear(in_features: int, out_features: int) -> nn.Linear:
    """A map whose outputs start as large as its inputs, whatever `initializer_range`: positions then fill the ball."""
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.init_std = in_features**-0.5
    return linear


class FlowNorm(nn.Module):
    """FlowNorm(s) = s / sqrt(E‖f‖² + ε) (paper §2.3), with a flow map of its own so that it is not circular.

    g ⊙ s · rsqrt(E[mean(f²) + 1e-2 mean(s²)] + ε) with f = W_n s. The share of mean(s²) keeps a vanishing flow from
    exploding the state. E is over the entity itself or, `flow_norm="running"`, its segment's entities so far.
    """

    def __init__(self, config: DFNConfig, name: str):
        super().__init__()
        self.name = name
        self.running = config.flow_norm == "running"
        self.flow_map = unit_linear(config.hidden_size, config.num_attention_heads * config.position_dim)
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.norm_eps

    def forward(self, states: torch.Tensor, rows: Rows, state: StateLayer | None) -> torch.Tensor:
        energy = in_pieces(self._energy, states)
        if self.running:
            energy = self._running_mean(energy, rows, state)
        return in_pieces(self._scaled, states, energy)

    def _energy(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        flow = decide(self.flow_map, states).to(wide.dtype)
        return flow.square().mean(dim=-1, keepdim=True) + 1e-2 * wide.square().mean(dim=-1, keepdim=True)

    def _scaled(self, states: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
        return (self.weight * (states.to(energy.dtype) * torch.rsqrt(energy + self.eps))).to(states.dtype)

    def _running_mean(self, energy: torch.Tensor, rows: Rows, state: StateLayer | None) -> torch.Tensor:
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
            before = (place - rows.reach - 1)[..., None]
            sums = sums - torch.where(before < 0, 0, sums.gather(1, before.clamp(min=0)))
        return (sums / (rows.reach + 1)[..., None]).to(energy.dtype)


class PlainNorm(nn.Module):
    """RMSNorm or no norm at all in the place of FlowNorm, for ablations."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps) if config.flow_norm == "rms" else nn.Identity()

    def forward(self, states: torch.Tensor, rows: Rows, state: StateLayer | None) -> torch.Tensor:
        return self.norm(states)


def make_norm(config: DFNConfig, name: str) -> FlowNorm | PlainNorm:
    """The norm before a block; `name` is that of its sums in the cache."""
    return FlowNorm(config, name) if config.flow_norm in ("entity", "running") else PlainNorm(config)


class ContinuousEntities(nn.Module):
    """Position p, flow f and influence w of every entity (paper §2.1, §2.2)."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.num_heads, self.position_dim = config.num_attention_heads, config.position_dim
        self.flow_step = config.flow_step
        self.moved_query = config.moved_query
        size = self.num_heads * self.position_dim
        self.position_proj = unit_linear(config.hidden_size, size)
        self.flow_proj = unit_linear(config.hidden_size, size)
        self.influence_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)

    def forward(self, u: torch.Tensor, origin: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Args: u `[B, M, hidden_size]`; origin `[B, H, M, P]`, what positions start from, or None for 0.

        Returns:
            (rest on the ball `[B, H, M, P]`, moved on the ball, influence `[B, H, M]`, moved `[B, H, M, P]`), in
            float32 or float64.
        """
        # Positions decide who is found: half precision would leave them a few places each.
        with torch.autocast(u.device.type, enabled=False):
            rest, flow = (self._heads(decide(project, u)) for project in (self.position_proj, self.flow_proj))
            influence = decide(self.influence_proj, u)
        dtype = torch.promote_types(u.dtype, torch.float32)
        rest, flow, influence = rest.to(dtype), flow.to(dtype), influence.to(dtype).transpose(1, 2)
        if origin is not None:
            rest = rest + origin
        moved = rest + self.flow_step * flow
        return ball(rest if self.moved_query else moved), ball(moved), influence, moved

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
        rows: Rows,
        state: StateLayer | None,
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
        key = gaussian_key(ball(self.position.to(query.dtype)), self.influence.to(query.dtype), sharpness)
        logits = query @ key.transpose(-1, -2)
        joint = torch.cat([total.unsqueeze(-1), logits], dim=-1).softmax(dim=-1)
        share = joint[..., 0]
        return (y * share.unsqueeze(-1) + mix_slots(joint[..., 1:], values, layout)).to(y.dtype), share


def gaussian_key(positions: torch.Tensor, influence: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
    """[k, w − γ‖k‖²]: with [2γ q, 1] its product is −γ‖q − k‖² + w, but for −γ‖q‖², which no softmax sees.

    `[..., H, N, P]`, `[..., H, N]`, `[H]` → `[..., H, N, P + 1]`.
    """
    bias = influence - sharpness[:, None] * positions.square().sum(dim=-1)
    return torch.cat([positions, bias.unsqueeze(-1)], dim=-1)


class DynamicFlowAttention(nn.Module):
    """Each entity reads its local window, the nearest predecessors beyond it and the memory (paper §2.2)."""

    def __init__(self, config: DFNConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.entities = ContinuousEntities(config)
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
        rows: Rows,
        state: StateLayer | None,
        origin: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, Entities, torch.Tensor | None]:
        """Args: u `[B, M, hidden_size]`; origin: moved positions `[B, H, M, P]` that positions start from, or None.

        Returns:
            (y `[B, M, hidden_size]`, moved positions, entities of the rows, flow weights between columns
            `[B, H, M, N]` or None).
        """
        rest, moved_on_ball, influence, moved = self.entities(u, origin)
        value = self.value_proj(u).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        sharpness, fading = self.log_sharpness.to(rest.dtype).exp(), self.log_fading.to(rest.dtype).exp()
        key = gaussian_key(rest, influence, sharpness)
        query = torch.cat([2 * sharpness[:, None, None] * moved_on_ball, torch.ones_like(key[..., :1])], dim=-1)
        neighbors = self.find(moved_on_ball.detach(), rest.detach(), rows, state)
        if state is not None:
            key, value = state.append("key", key), state.append("value", value)

        window = self.config.local_window
        dropout = self.config.attention_dropout if self.training else 0.0
        y, total = flow_attention(query, key, value, fading, rows.index, rows.reach, neighbors, window, dropout)
        share = None
        if self.memory is not None:
            with torch.autocast(u.device.type, enabled=False):
                y, share = self.memory(y, total, query, sharpness, rows, state, u.dtype)
        weights = None
        if output_attentions:
            num_entities = int(rows.index.max()) + 1
            weights = flow_weights(query, key[:, :, :num_entities], fading, rows.index, rows.reach, neighbors, window)
            weights = weights if share is None else weights * share.unsqueeze(-1)
            places = torch.arange(num_entities, device=weights.device)[None]
            observed, weights_again = observe_weights(weights, places, rows, state)
            # Adds zero, and a gradient to what is returned.
            y = y + ((weights_again - weights) @ value[:, :, :num_entities]).to(y.dtype)
            weights = observed
        entities = Entities(rest, moved_on_ball, influence, neighbors)
        return y.transpose(1, 2).flatten(2), moved, entities, weights

    @torch.compiler.disable  # it sorts with NumPy, in place
    @torch.no_grad()
    def find(self, query: torch.Tensor, key: torch.Tensor, rows: Rows, state: StateLayer | None) -> torch.Tensor:
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
        index, reach = (x.repeat_interleave(heads, dim=0) for x in (rows.index, rows.reach))
        if config.search_implementation == "exact":
            if state is not None:
                key = state.append("place", key)
            found, _ = search_exact(
                query.flatten(0, 1), index, key.flatten(0, 1), config.num_neighbors, config.local_window, reach=reach
            )
        else:
            grids, chains = self._grids(), None
            query_cells, cells = (grids.cells(positions, on_grid=True) for positions in (query, key))
            if state is not None:
                key, cells = state.append("place", key), state.append("cell", cells)
                chains = self._chains(state, grids, batch)
            found, _ = search_cells(
                query.flatten(0, 1),
                query_cells.flatten(0, 1),
                index,
                key.flatten(0, 1),
                cells.flatten(0, 1),
                config.num_neighbors,
                config.local_window,
                config.candidates_per_table,
                reach=reach,
                counts=None if rows.counts is None else rows.counts.repeat_interleave(heads),
                chains=chains,
                table_offsets=grids.table_offsets,
            )
        return found.view(batch, heads, length, -1)

    def _grids(self) -> CellGrids:
        cells_per_axis = ball_cells_per_axis(self.config.position_dim, self.cell_sizes)
        return CellGrids(self.grid_rotation, self.grid_shift, self.cell_sizes, cells_per_axis)

    def _chains(self, state: StateLayer, grids: CellGrids, batch: int) -> CellChains:
        offsets = grids.table_offsets
        device = self.grid_rotation.device
        heads = state.table(
            "head",
            lambda: torch.full((batch, self.num_heads, offsets[-1]), -1, dtype=torch.int32, device=device),
            UndoChains(offsets, self.config.local_window),
        )
        fresh = torch.full(
            (batch, self.num_heads, state.incoming, len(offsets) - 1), -1, dtype=torch.int32, device=device
        )
        links = state.append("link", fresh)
        return CellChains(heads.flatten(0, 1), links.flatten(0, 1), offsets)


@dataclass
class UndoChains:
    """Takes the entities a crop removed, or put back into the local window, out of the chains again."""

    table_offsets: list[int]
    window: int

    def __call__(self, state: StateLayer, old: torch.Tensor, new: torch.Tensor) -> None:
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

    def __init__(self, config: DFNConfig, layer_idx: int):
        super().__init__()
        self.carry_positions = config.carry_positions
        self.flow_norm = make_norm(config, "flow_norm")
        self.conv = CausalConv(config.hidden_size, config.conv_kernel)
        self.attention = DynamicFlowAttention(config, layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if config.output_gate else None
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp_norm = make_norm(config, "mlp_norm")
        self.mlp = DynamicFieldMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        origin: torch.Tensor | None,
        rows: Rows,
        past_key_values: StateLayer | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Entities, torch.Tensor | None]:
        """Args: hidden_states `[B, M, hidden_size]`; origin: moved positions of the layer before, or None.

        Returns:
            (states of the same shape, what the next layer's positions start from, influence `[B, H, M]`, entities,
            flow weights or None). What gradients flow through stands in the tuple itself: re-entrant checkpointing
            sees no deeper.
        """
        u = self.conv(self.flow_norm(hidden_states, rows, past_key_values), rows, past_key_values)
        u = u.to(hidden_states.dtype)
        y, moved, entities, weights = self.attention(u, rows, past_key_values, origin, output_attentions)
        hidden_states = in_pieces(self._add_flow, hidden_states, u, y)
        normed = self.mlp_norm(hidden_states, rows, past_key_values)
        hidden_states = in_pieces(self._add_field, hidden_states, normed, y)
        return hidden_states, moved if self.carry_positions else None, entities.influence, entities, weights

    def _add_flow(self, states: torch.Tensor, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        read = y if self.gate_proj is None else y * F.silu(self.gate_proj(u))
        return states + self.dropout(self.out_proj(read))

    def _add_field(self, states: torch.Tensor, normed: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return states + self.dropout(self.mlp(normed, y.to(states.dtype)))


class DFNPreTrainedModel(PreTrainedModel):
    config: DFNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DFNLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_context_parallel = False
    _keep_in_fp32_modules = ["flow_map", "position_proj", "flow_proj", "influence_proj"]
    _keep_in_fp32_modules_strict = ["log_sharpness", "log_fading", "decay_logit"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=getattr(module, "init_std", config.initializer_range))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, nn.Conv1d):
            init.copy_(module.weight, near_identity(module.weight))
        elif isinstance(module, (RMSNorm, FlowNorm)):
            init.ones_(module.weight)
        elif isinstance(module, ChunkMemory):
            module.reset_parameters(config.initializer_range)
        elif isinstance(module, PersistentFieldMemory):
            init.normal_(module.position, std=1.0)
            init.zeros_(module.influence)
        elif isinstance(module, DynamicFlowAttention):
            # ‖q − k‖² grows with the dimension: 1.2 / P keeps the first logits within a few units.
            init.constant_(module.log_sharpness, math.log(1.2 / config.position_dim))
            init.copy_(module.log_fading, torch.linspace(0.7, -3.0, module.num_heads))
            module.reset_grids()


def near_identity(weight: torch.Tensor) -> torch.Tensor:
    """A filter like `weight` `[channels, 1, taps]` that passes the current input, and a little of those before.

    With the identity alone recall is learnt as well, in twice the steps: a key has to be found by what came before it.
    """
    taps = 0.3 * torch.randn_like(weight)
    taps[..., -1] = 1
    return taps


class DFNModel(DFNPreTrainedModel):
    """Embeddings, DFN layers, readout and final norm."""

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DFNLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        segment_ids: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_entities: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> DFNModelOutput:
        """
        Args:
            input_ids: int64 `[B, M]`, or `inputs_embeds` `[B, M, hidden_size]`: exactly one of them.
            attention_mask: `[B, M]`, or `[B, columns before + M]` with a cache; 0 is padding, anywhere in a row.
            position_ids: `[B, M]` or `[1, M]`. There are no position embeddings; without mask and cache, positions
                that start again mark packed segments.
            past_key_values: `DynamicCache(config=model.config)` to continue from; updated in place.
            use_cache: return the state; the config's value by default, never while gradients are checkpointed.
            segment_ids: int64 `[B, M]`, packed documents: an entity sees its own segment only; negative is padding.
            output_attentions: return dense flow weights, O(M²) memory.
            output_hidden_states: return the states of every layer.
            output_entities: return positions, influence and neighbours of every layer.
            cache: what transformers 5.24 and later call `past_key_values`.

        Raises:
            ValueError: inputs that do not fit together; the message names them and the remedy.
        """
        config = self.config
        past_key_values = given_cache(past_key_values, cache)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        inputs_embeds = embed(self, input_ids, inputs_embeds)
        rows, states, past_key_values = begin_call(
            self, inputs_embeds, attention_mask, position_ids, segment_ids, past_key_values, use_cache
        )
        check_search(config, states[0])
        layers = self.layers[: config.num_hidden_layers]  # early-exit decoding lowers it for its drafts
        hidden_states = rows.compact(inputs_embeds)
        del inputs_embeds  # a million tokens are a gigabyte of it
        all_states, all_weights, all_entities = [], [], []
        origin = None
        for layer, state in zip(layers, states, strict=True):
            if output_hidden_states:
                columns, hidden_states = rows.observe(hidden_states)
                all_states.append(columns)
            hidden_states, origin, influence, entities, weights = layer(
                hidden_states, origin, rows, past_key_values=state, output_attentions=output_attentions
            )
            if output_attentions:
                all_weights.append(weights)
            if output_entities:
                all_entities.append(entities_to_columns(entities, rows, state))
        if config.readout_window > 1:
            # Kept by the first layer, whose refusal of a crop comes before any layer was cropped.
            hidden_states = self._read_out(hidden_states, influence, rows, states[0])
        hidden_states = rows.scatter(in_pieces(self.norm, hidden_states))
        if output_hidden_states:
            all_states.append(hidden_states)
        end_call(past_key_values, states)
        return DFNModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: past_key_values},
            hidden_states=tuple(all_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            entities=tuple(all_entities) if output_entities else None,
        )

    def _read_out(self, hidden_states, influence, rows: Rows, state: StateLayer | None) -> torch.Tensor:
        """s̄ (paper §3): mean of the `readout_window` most recent entities, weighted by softmax of their influence."""
        before = self.config.readout_window - 1
        weight = influence.mean(dim=1).unsqueeze(-1)
        recent = torch.cat([hidden_states.to(weight.dtype), weight], dim=-1)
        recent = state.tail("readout", recent, before) if state is not None else F.pad(recent, (0, 0, before, 0))
        length = hidden_states.shape[1]
        windows = recent[..., -1:].unfold(1, before + 1, 1).flatten(2)  # [B, M, window], oldest first
        age = torch.arange(before, -1, -1, device=recent.device)
        weights = windows.masked_fill(age > rows.reach[..., None], -math.inf).softmax(dim=-1)
        mean = sum(weights[..., step, None] * recent[:, step : step + length, :-1] for step in range(before + 1))
        return mean.to(hidden_states.dtype)


def check_search(config: DFNConfig, state: StateLayer | None) -> None:
    """The search may be changed between calls, but the index of one is not kept up by the other."""
    if config.search_implementation not in SEARCHES:
        raise ValueError(f"`search_implementation` must be one of {SEARCHES}, got {config.search_implementation!r}.")
    if torch.compiler.is_exporting():
        check_export(config)
    if state is None or state.columns == 0 or config.num_neighbors == 0:
        return
    if (state.data("cell") is None) != (config.search_implementation == "exact"):
        raise ValueError(
            "`search_implementation` was changed while past_key_values was in use: start with an empty cache."
        )


def check_export(config: DFNConfig) -> None:
    """An exported program can search exactly; an ONNX one not at all."""
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            "DFN's search orders candidates by the bits of their distances, for which ONNX has no operator: "
            "use `torch.export.export`."
        )
    if config.search_implementation != "exact":
        raise ValueError(
            "Cell lists are walked as the data ask, which no exported program can do: set "
            "`model.config.search_implementation = 'exact'` first."
        )


def entities_to_columns(entities: Entities, rows: Rows, state: StateLayer | None) -> Entities:
    """Entities of the rows → of the columns; neighbours are named by their column."""
    columns = row_columns(rows, state)

    def scatter(x):
        return rows.scatter(x.transpose(1, 2)).transpose(1, 2)

    found = entities.neighbors
    named = columns[:, None, None].expand(*found.shape[:3], -1).gather(-1, found.clamp(min=0))
    # Shifted by one, so that the zero of padding means none.
    neighbors = scatter(torch.where(found < 0, 0, named + 1)) - 1
    return Entities(
        *(scatter(x) for x in (entities.rest_positions, entities.moved_positions, entities.influence)), neighbors
    )


class DFNForCausalLM(GrowingStateMixin, DFNPreTrainedModel, GenerationMixin):
    """DFN with a next-token head: P(t) = softmax(W_o s̄) (paper §3)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        self.model = DFNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        segment_ids: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_entities: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> DFNCausalLMOutput:
        """
        Args:
            labels: int64 `[B, M]`, the input ids themselves; −100 is not scored, nor is the first token of a segment.
            logits_to_keep: compute the last so many logits, or those at these columns; 0 is all.

        The others are those of `DFNModel.forward`.
        """
        outputs: DFNModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_entities=output_entities,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = None
        if labels is not None:
            labels = next_token_labels(labels, segment_ids)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return DFNCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            entities=outputs.entities,
        )


class DFNForSequenceClassification(LastStateClassification, DFNPreTrainedModel):
    """DFN with a linear head on the last real entity of each row."""

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DFNModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = ["DFNForCausalLM", "DFNForSequenceClassification", "DFNModel", "DFNPreTrainedModel"]
