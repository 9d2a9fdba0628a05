"""Flow attention of a DFN layer: neighbour search, softmax over window and neighbours, persistent field memory.

The neighbours are found by a causal box tree: a kd-tree over the predecessors whose leaves are read by the distance of
the query to their bounding boxes (`ops.box_tree`), or by an exact search over all predecessors.

Shape letters: B batch, M entities of this call, N stored entities, H heads, P position_dim, D value features per head,
K neighbours, C memory chunks, S memory slots.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from ..modules.cache import FlowCacheLayer
from ..modules.chunk_memory import ChunkMemory, mix_slots
from ..modules.linear import linear_of_batch
from ..modules.row_layout import RowLayout, pad_attention_with_grad
from ..ops.box_tree import INDEX_DTYPES, TreeIndex, index_layout, index_shapes, to_grid, tree_base
from ..ops.dispatch import is_decode_step
from ..ops.flow_attention import flow_attention, flow_weights
from ..ops.flow_attention_decode import attention_step
from ..ops.neighbor_search import crop_tree, search_exact, search_tree
from .configuration_dfn import DFNConfig
from .entities import ContinuousEntities, Entities, squash_to_ball

TREE = "tree_"  # start of the names of the box tree's tensors in the cache


def augment_key(positions: torch.Tensor, influence: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
    """Append a bias to the key so that a dot product gives the Gaussian affinity: [k, w − γ‖k‖²].

    Its product with [2γ q, 1] is −γ‖q − k‖² + w + γ‖q‖². The last term is the same for all keys and cancels in the
    softmax.

    Args:
        positions: k, `[..., H, N, P]`.
        influence: w, `[..., H, N]`.
        sharpness: γ, `[H]`.

    Returns:
        `[..., H, N, P + 1]`.
    """
    bias = influence - sharpness[:, None] * positions.square().sum(dim=-1)
    return torch.cat([positions, bias.unsqueeze(-1)], dim=-1)


class PersistentFieldMemory(nn.Module):
    """Memory slots m_1 … m_S that join the softmax beside the neighbours (Dynamic Flow Networks (Stürtz), §2.5).

    m_j ← β_j m_j + (1 − β_j) Aggregate_j(y) once per closed chunk, where Aggregate_j is an attention pooling of the
    chunk's y. The pooled y excludes what was read from memory: otherwise each chunk would depend on the one before and
    chunks could not be computed in parallel. A slot has a learnt position and a learnt influence, and no decay with
    distance.
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
        lse: torch.Tensor,
        query: torch.Tensor,
        sharpness: torch.Tensor,
        rows: RowLayout,
        state: FlowCacheLayer | None,
        state_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Extend a softmax over entities by the memory slots.

        Args:
            y: `[B, H, M, D]`, softmax average over entities.
            lse: `[B, H, M]`, log-sum-exp of the logits of those entities.
            query: `[B, H, M, P + 1]`, as for `flow_attention`.
            sharpness: γ, `[H]`.
            rows: layout of the call's rows.
            state: the layer's cache, or None.
            state_dtype: dtype of the entities' states and of `value_proj`.

        Returns:
            (average over entities and slots `[B, H, M, D]`, softmax weight of all entities together `[B, H, M]`).
        """
        slots, layout = self.slots(y.transpose(1, 2).flatten(2), rows, state)
        values = linear_of_batch(self.value_proj, slots.to(state_dtype))
        values = values.unflatten(-1, (self.num_heads, -1))
        values = values.permute(0, 3, 1, 2, 4).to(query.dtype)  # [B, H, C, S, D]
        key = augment_key(squash_to_ball(self.position.to(query.dtype)), self.influence.to(query.dtype), sharpness)
        logits = query @ key.transpose(-1, -2)
        weights = torch.cat([lse.unsqueeze(-1), logits], dim=-1).softmax(dim=-1)
        entity_weight = weights[..., 0]
        y = (y * entity_weight.unsqueeze(-1) + mix_slots(weights[..., 1:], values, layout)).to(y.dtype)
        return y, entity_weight


@dataclass
class FlowInputs:
    """Arguments of `flow_attention` for one layer.

    Attributes:
        query: `[B, H, M, P + 1]`.
        key: `[B, H, N, P + 1]`.
        value: `[B, H, N, D]`.
        decay: λ, `[H]`.
        positions: int64 `[B, M]`, index of each query among the N keys.
        first_position: position in its row of key 0, int64 `[B, 1]`, or 0 for all rows.
        neighbors: int64 `[B, H, M, K]`, −1 for none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    decay: torch.Tensor
    positions: torch.Tensor
    first_position: torch.Tensor | int
    neighbors: torch.Tensor


class DynamicFlowAttention(nn.Module):
    """Attention of each entity to its local window, its nearest predecessors beyond the window, and the memory.

    Dynamic Flow Networks (Stürtz), §2.2. The equations are in the docstring of `layers.py`.

    Args:
        coordinate_features: F, as for `ContinuousEntities`.

    Example:
        >>> import torch
        >>> from dfn_hf import DFNConfig, DFNModel
        >>> config = DFNConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> attention = DFNModel(config).layers[0].attention
        >>> u = torch.randn(1, 50, 16)
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> rows = make_row_layout(1, 50, u.device)
        >>> y, moved, entities, weights = attention(u, rows, state=None, origin=None, output_attentions=True)
        >>> y.shape, entities.neighbors.shape, weights.shape
        (torch.Size([1, 50, 16]), torch.Size([1, 2, 50, 16]), torch.Size([1, 2, 50, 50]))
    """

    def __init__(self, config: DFNConfig, coordinate_features: int = 0):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.entities = ContinuousEntities(config, coordinate_features)
        self.value_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.memory = PersistentFieldMemory(config) if config.memory_slots else None
        self.log_sharpness = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.log_fading = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))

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
        """
        Args:
            u: `[B, M, hidden_size]`, left-aligned rows.
            rows: layout of the call's rows.
            state: the layer's cache, or None.
            origin: `[B, H, M, P]`, moved positions of the previous layer, or None.
            output_attentions: also return dense attention weights, O(M N) memory.
            coordinates, log_mass: as for `ContinuousEntities`.

        Returns:
            (y `[B, M, hidden_size]`, unbounded moved positions `[B, H, M, P]`, entities, attention weights between the
            input's columns `[B, H, M, N]` or None).
        """
        rest, moved_on_ball, influence, moved = self.entities(u, origin, coordinates, log_mass)
        value = self.value_proj(u).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        sharpness, decay = self.log_sharpness.to(rest.dtype).exp(), self.log_fading.to(rest.dtype).exp()
        key = augment_key(rest, influence, sharpness)
        query = torch.cat([2 * sharpness[:, None, None] * moved_on_ball, torch.ones_like(key[..., :1])], dim=-1)
        if self.config.is_causal:
            neighbors = self.search_neighbors(moved_on_ball.detach(), rest.detach(), rows, state)
            inputs = self._with_cached_keys(query, key, value, decay, neighbors, rows, state)
            y, lse = self._attend(inputs, rows, state)
        else:
            y, lse, inputs = self._attend_bidirectional(query, key, value, decay, moved_on_ball, rest, rows)
        entity_weight = None
        if self.memory is not None:
            with torch.autocast(u.device.type, enabled=False):
                y, entity_weight = self.memory(y, lse, query, sharpness, rows, state, u.dtype)
        weights = None
        if output_attentions:
            y, weights = self._dense_weights(y, inputs, entity_weight, rows, state)
        entities = Entities(rest, moved_on_ball, influence, inputs.neighbors)
        return y.transpose(1, 2).flatten(2), moved, entities, weights

    def _with_cached_keys(
        self, query, key, value, decay, neighbors, rows: RowLayout, state: FlowCacheLayer | None
    ) -> FlowInputs:
        """Append keys `[B, H, M, P + 1]` and values `[B, H, M, D]` to the cache and return all that queries can see.

        Without neighbours the cache keeps only the last `local_window` − 1 entities.
        """
        positions = rows.positions
        first: torch.Tensor | int = 0
        if state is not None and self.config.num_neighbors == 0:
            before = self.config.local_window - 1
            key, value = self._roll(state, "key", key, before), self._roll(state, "value", value, before)
            first = positions[:, :1] - before
            positions = before + torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        elif state is not None:
            key, value = state.append("key", key), state.append("value", value)
        return FlowInputs(query, key, value, decay, positions, first, neighbors)

    def _roll(self, state: FlowCacheLayer, name: str, x: torch.Tensor, before: int) -> torch.Tensor:
        """Prepend the `before` previous entities: `[B, H, M, features]` → `[B, H, before + M, features]`."""
        heads = x.shape[1]
        return state.roll(name, x.transpose(1, 2).flatten(2), before).unflatten(-1, (heads, -1)).transpose(1, 2)

    def _attend(
        self, inputs: FlowInputs, rows: RowLayout, state: FlowCacheLayer | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y `[B, H, M, D]` and the log-sum-exp of its logits `[B, H, M]`."""
        dropout = self.config.attention_dropout if self.training else 0.0
        tensors = inputs.query, inputs.key, inputs.value, inputs.decay, inputs.positions, rows.segment_positions
        arguments = *tensors, inputs.neighbors, self.config.local_window
        if dropout == 0 and is_decode_step(state, inputs.query):
            return attention_step(*arguments)
        return flow_attention(*arguments, dropout)

    def _attend_bidirectional(
        self, query, key, value, decay, moved: torch.Tensor, rest: torch.Tensor, rows: RowLayout
    ) -> tuple[torch.Tensor, torch.Tensor, FlowInputs]:
        """Combine two causal passes, one over the rows and one over the reversed rows.

        Both passes contain the entity itself, with decay 0, so it is subtracted once:
        Z = Z_before + Z_after − e^ℓ_ii, and the same for y.

        Args:
            query, key, value, decay: see `FlowInputs`; N = M.
            moved, rest: `[B, H, M, P]`, positions on the ball.

        Returns:
            (y `[B, H, M, D]`, log-sum-exp of its logits `[B, H, M]`, inputs with the neighbours on both sides
            `[B, H, M, 2 K]`).
        """
        before = self.search_neighbors(moved.detach(), rest.detach(), rows, None)
        inputs = FlowInputs(query, key, value, decay, rows.positions, 0, before)
        y_before, lse_before = self._attend(inputs, rows, None)
        reversed_rows = rows.flipped()
        moved, rest = rows.flip(moved.detach(), dim=2), rows.flip(rest.detach(), dim=2)
        after = self.search_neighbors(moved, rest, reversed_rows, None)
        flipped_query, flipped_key, flipped_value = (rows.flip(x, dim=2) for x in (query, key, value))
        reversed_inputs = FlowInputs(
            flipped_query, flipped_key, flipped_value, decay, reversed_rows.positions, 0, after
        )
        y_after, lse_after = (rows.flip(x, dim=2) for x in self._attend(reversed_inputs, reversed_rows, None))
        own = (query * key).sum(dim=-1)
        maximum = torch.maximum(lse_before, lse_after)
        z_before, z_after, z_own = ((x - maximum).exp() for x in (lse_before, lse_after, own))
        z = z_before + z_after - z_own
        parts = ((z_before, y_before), (z_after, y_after), (-z_own, value))
        y: torch.Tensor = sum((part / z).unsqueeze(-1) * x for part, x in parts)  # type: ignore[assignment]  # 3 parts
        neighbors = torch.cat([before, rows.flip(rows.flip_positions(after), dim=2)], dim=-1)
        return y.to(value.dtype), maximum + z.log(), replace(inputs, neighbors=neighbors)

    def _dense_weights(
        self,
        y: torch.Tensor,
        inputs: FlowInputs,
        entity_weight: torch.Tensor | None,
        rows: RowLayout,
        state: FlowCacheLayer | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the attention weights that gave y, and make y depend on them for autograd.

        Args:
            y: `[B, H, M, D]`.
            entity_weight: `[B, H, M]`, softmax weight that the memory leaves to entities; None without memory.

        Returns:
            (y with a gradient through the returned weights, weights between the input's columns `[B, H, M, N]`).
        """
        num_entities = int(inputs.positions.max()) + 1
        key, value = inputs.key[:, :, :num_entities], inputs.value[:, :, :num_entities]
        ahead = torch.zeros_like(rows.positions)
        if not self.config.is_causal:
            ahead = rows.flip(rows.flipped().segment_positions)
        tensors = inputs.query, key, inputs.decay, inputs.positions, rows.segment_positions, ahead, inputs.neighbors
        weights = flow_weights(*tensors, self.config.local_window)
        if entity_weight is not None:
            weights = weights * entity_weight.unsqueeze(-1)
        positions = inputs.first_position + torch.arange(num_entities, device=weights.device)[None]
        columns, weights_from_columns = pad_attention_with_grad(weights, positions, rows, state)
        # The difference is zero; it gives a loss on y a gradient at the returned weights.
        return y + ((weights_from_columns - weights) @ value).to(y.dtype), columns

    @torch.no_grad()
    def search_neighbors(
        self, query: torch.Tensor, key: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None
    ) -> torch.Tensor:
        """Find the nearest predecessors beyond the local window.

        Args:
            query, key: moved and rest positions on the ball, `[B, H, M, P]`.
            rows: layout of the call's rows.
            state: the layer's cache, or None. The keys are appended to it.

        Returns:
            int64 `[B, H, M, K]`, positions of the neighbours in their row; −1 if there are fewer than K.
        """
        config = self.config
        batch, heads, length, position_dim = query.shape
        if config.num_neighbors == 0:
            return torch.empty(batch, heads, length, 0, dtype=torch.int64, device=query.device)
        # Rounded positions: a product over one entity and one over many differ in their last bits. Without rounding,
        # equal contexts would tie in one and not in the other.
        query, key = to_grid(query), to_grid(key)
        if state is not None:
            key = state.append("position", key)
        queries, keys, positions = query.flatten(0, 1), key.flatten(0, 1), self._per_head(rows.positions)
        # A cache holds rows of one segment.
        in_segments = state is None and rows.segment_positions is not rows.positions
        reach = self._per_head(rows.segment_positions) if in_segments else None
        arguments = queries, positions, keys, config.num_neighbors, config.local_window
        if config.search_implementation == "exact":
            neighbors, _ = search_exact(*arguments, reach=reach)
        else:
            counts = None if rows.lengths is None else self._per_head(rows.lengths)
            index = None if state is None else self._tree(state, batch, key.shape[2], position_dim)
            neighbors, _ = search_tree(*arguments, config.num_leaves, reach=reach, counts=counts, index=index)
        return neighbors.view(batch, heads, length, -1)

    def _tree(self, state: FlowCacheLayer, batch: int, capacity: int, position_dim: int) -> TreeIndex:
        """Return the cached box trees of all rows and heads, for `capacity` entities in each row."""

        def shapes():
            entered = tree_base(capacity - self.config.local_window)
            parts = index_shapes(index_layout(state.device, position_dim), entered, position_dim)
            return {
                f"{TREE}{name}": ((batch, self.num_heads, *shape), INDEX_DTYPES.get(name, torch.int32))
                for name, shape in parts.items()
            }

        return tree_index(state.index(shapes, CropTree(self.config.local_window)))

    def _per_head(self, x: torch.Tensor) -> torch.Tensor:
        """Repeat each row for every head: `[B, ...]` → `[B * H, ...]`."""
        return x.repeat_interleave(self.num_heads, dim=0)


@dataclass
class CropTree:
    """Takes the entities that a crop deletes or returns to the recent ones out of the box trees.

    Attributes:
        window: `local_window`.
    """

    window: int

    def __call__(self, state: FlowCacheLayer, old: torch.Tensor, new: torch.Tensor) -> None:
        """Crop rows of `old` entities to `new`, int64 `[B]` each."""
        index = tree_index({name: held.data for name, held in state.states.items() if name.startswith(TREE)})
        base = tree_base(new.to(index.counters.device) - self.window + 1)
        crop_tree(index, base.repeat_interleave(len(index.counters) // len(base)))


def tree_index(tensors: dict[str, torch.Tensor]) -> TreeIndex:
    """Return the trees of all rows and heads from the states `[B, H, ...]` of a cache."""
    return TreeIndex(**{name.removeprefix(TREE): tensor.flatten(0, 1) for name, tensor in tensors.items()})
