"""The cache of one layer: named states, each of one of four kinds.

| kind | class | contents |
|---|---|---|
| append | `GrowingState` | one entry per entity of a row, in preallocated storage |
| roll | `RollingState` | the last n inputs of a module that looks back n steps |
| index | `IndexState` | a tensor of an index over appended entities; `undo` removes the newest ones |
| replace | `ReplaceState` | a tensor that is replaced whole |

Reorder, repeat, select, offload, reset and crop are implemented once per kind (`cache_states`). Rows are left-aligned
(`row_layout`) and may differ in length: a layer stores the length of each row and the mask of each column, so that
cropping n columns removes the right number of entities from each row.

There are three cache layers: `FlowCacheLayer` grows (`DynamicCache`), `static_cache.StaticFlowCacheLayer` has a fixed
shape (`StaticCache`), and `chunked_forward.ChunkCarry` carries state with gradients between the chunks of one pass.

States of the families. B batch, H attention heads, N entities, D features, P position_dim, L leaves, Q pages:

| name | kind | shape | written by |
|---|---|---|---|
| conv | roll | `[B, conv_kernel − 1, D]` | `CausalConv` |
| key, value | append | `[B, H, N, features]` | `DynamicFlowAttention`; `SelfAttention` without window |
| key, value | roll | `[B, window − 1, H · features]` | the same without neighbours, or with window |
| position | append | int16 `[B, H, N, P]` | `DynamicFlowAttention`: rest positions on the grid |
| tree_counters | index | int32 `[B, H, 4]` | `search_tree`: entities, leaves, pages, root page of each box tree |
| tree_leaf_ids | index | int32 `[B, H, L, 16]` | `search_tree`: members of each leaf |
| tree_leaf_boxes | index | int16 `[B, H, L, 4, P]` | `search_tree`: bounding box and cell of each leaf |
| tree_leaves | index | int32 `[B, H, L, words]` | `search_tree` in C: leaves, instead of the last two |
| tree_leaf_pages | index | int32 `[B, H, L]` | `search_tree` in C: page of each leaf |
| tree_cuts | index | int32 `[B, H, L, 3]` | `search_tree` in C: the cuts of space |
| tree_pages | index | int32 `[B, H, Q, words]` | `search_tree` in C: pages of the hierarchy over the leaves |
| flow_norm, mlp_norm | append | float64 `[B, 1, N, 1]` | `FlowNorm` with `flow_norm="running"`: sum of energies |
| readout | roll | `[B, readout_window − 1, D + 1]` | `DFNModel`: states and influence of entities |
| sampled | append | float64 `[B, 1, N, 2]` | `EntitySampling`: summed probability, last boundary |
| open | roll | `[B, max_entity_length − 1, D + 2]` | `EntitySampling`: tokens of the incomplete entity |
| smoothed | roll | `[B, 1, D]` | `EntitySampling`: last smoothed entity state |
| memory_tail, context_tail | roll | `[B, chunk_length − 1, D]` | `ChunkMemory`: entities of the open chunk |
| memory_slots, context_slots | append | `[B, 1, chunks + 1, S · D]` | `ChunkMemory`: S slots after each closed chunk |
| flow_key, flow_value | roll | `[B, flow_window − 1, features]` | `FlowLayer` of FlowNetwork |
| conv1, conv2, frames | roll | `[B, history, D]` | `CausalLiquidEmbedding` |
| deformable | roll | `[B, history, D]` | `DeformableConv1d` of Liquid |
| lstm | replace | `[B, 2, layers, lstm_hidden_size]` | `EnhancedLSTM`: h and c |
| source_key, source_value | replace | `[B, H, S, head_dim]` | `CrossAttention`: S source tokens |
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_states import (
    GrowingState,
    IndexShapes,
    IndexState,
    ReplaceState,
    RollingState,
    empty_index,
    normal_tensor,
    roll_inputs,
)
from .row_layout import RowLayout

# Name of the cache in outputs and in `generate()`: `cache` from transformers 5.24 on.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def resolve_cache_argument(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache passed under either name; warn if transformers deprecates the name `past_key_values`."""
    if past_key_values is not None and CACHE_NAME != "past_key_values":
        warnings.warn(f"`past_key_values` is deprecated: pass `{CACHE_NAME}` instead.", FutureWarning, stacklevel=3)
    return past_key_values if cache is None else cache


class FlowCacheLayer(CacheLayerMixin):
    """The cache of one layer of a flow model.

    A model calls `start_forward` and `set_layout` on every layer before its first module runs, and `finish_forward`
    after the last one. In between each module reads and writes its own states. `lengths`, `mask` and `seq_length`
    count earlier calls only, until `finish_forward` adds the current one.

    Attributes:
        lengths: int64 `[B]`, entities of each row; None before the first call.
        aligned: the number of entities if it is equal in all rows, else None.
        mask: bool `[B, seq_length]`, False at padding; None if no column was padding.
        longest: an upper bound on the entities of a row.
        seq_length: columns so far, including padding, which is transformers' sequence length. With dynamic chunking
            there are fewer entities than columns: only a column that completes an entity is real.
        new_columns: columns of the current call.
    """

    _layer_type = "flow_state"
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Delete all states and counts."""
        self.states: dict[str, Any] = {}  # subclasses of ReplaceState
        self.lengths: torch.Tensor | None = None
        self.aligned: int | None = 0
        self.mask: torch.Tensor | None = None
        self.longest = 0
        self.seq_length = 0
        self.is_initialized = False
        self.new_columns = 0
        self._rows: RowLayout | None = None

    @property
    def batch_size(self) -> int:
        """Number of rows, known after the first call."""
        if self.lengths is None:
            raise AttributeError("batch_size is known after the first call.")
        return self.lengths.shape[0]

    def start_forward(self, batch: int, length: int, device: torch.device) -> None:
        """Begin a call.

        Args:
            batch: rows of the input.
            length: columns of the input.
            device: of the input; the cache stays on the device of the first call.

        Raises:
            ValueError: the cache holds another number of rows.
        """
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            self.device = device
            self.is_initialized = True
        self.check_batch(batch)
        self.leave_inference_mode()
        self.prefetch()
        self.new_columns = length

    def leave_inference_mode(self) -> None:
        """Copy the tensors that were made in inference mode, so that they can be changed outside of it."""
        if torch.compiler.is_compiling():
            return
        self._each(lambda state: state.leave_inference_mode())
        self.lengths, self.mask = normal_tensor(self.lengths), normal_tensor(self.mask)

    def check_batch(self, batch: int) -> None:
        """Raise a ValueError if the layer does not hold `batch` rows."""
        if self.lengths.shape[0] != batch:
            raise ValueError(
                f"past_key_values holds {self.lengths.shape[0]} rows and the input has {batch}: "
                "use a cache with the same number of rows, or repeat its rows with batch_repeat_interleave()."
            )

    def set_layout(self, rows: RowLayout) -> None:
        """Set the layout of the current call."""
        self._rows = rows

    def record_mask(self, rows: RowLayout) -> None:
        """Record the mask of columns that were counted chunk by chunk; `rows` is their `RowLayout`."""
        if rows.mask is None:
            return
        length = rows.mask.shape[1]
        before = rows.mask.new_ones(rows.mask.shape[0], self.seq_length - length)
        before = before if self.mask is None else self.mask[:, : self.seq_length - length]
        self.mask = torch.cat([before, rows.mask], dim=1)

    def finish_forward(self) -> None:
        """End the call: count its entities and columns. Does nothing if they were counted chunk by chunk."""
        if self._rows is None:
            return
        columns, length = self.new_columns, self._rows.positions.shape[1]
        mask, lengths = self._rows.mask, self._rows.lengths
        self._rows = None
        if mask is not None or self.mask is not None:
            batch, device = self.lengths.shape[0], self.lengths.device
            before = (
                self.mask
                if self.mask is not None
                else torch.ones(batch, self.seq_length, dtype=torch.bool, device=device)
            )
            now = mask if mask is not None else torch.ones(batch, columns, dtype=torch.bool, device=device)
            self.mask = torch.cat([before, now], dim=1)
        self.lengths = self.lengths + (length if lengths is None else lengths)
        self.aligned = self.aligned + length if lengths is None and self.aligned is not None else None
        self.longest += length
        self.seq_length += columns

    def append(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """Append `new` `[B, groups, length, features]`; return the storage, which may have unused capacity."""
        state = self.states.get(name)
        if state is None:
            state = self.states[name] = GrowingState(new.new_zeros(*new.shape[:2], 0, new.shape[3]).detach())
        if self.aligned is not None:
            return state.write(new, self.aligned)
        state.reserve(self.longest + new.shape[2])
        return state.write(new, self.lengths)

    def write_entries(self, name: str, new: torch.Tensor, at: torch.Tensor, every: int) -> None:
        """Write `new` `[B, groups, length, features]` from entry `at` int64 `[B]` on, one per `every` entities."""
        state = self.states.get(name)
        if state is None:
            state = self.states[name] = GrowingState(new.new_zeros(*new.shape[:2], 0, new.shape[3]).detach())
        state.reserve(self.longest // every + 1 + new.shape[2])
        state.write(new.detach(), at)

    def entry(self, name: str, at: torch.Tensor) -> torch.Tensor | None:
        """Return entry `at` int64 `[B]` of a state with one group, `[B, features]`; None without the state."""
        stored = self.data(name)
        return None if stored is None else stored[torch.arange(len(at), device=at.device), 0, at]

    def roll(self, name: str, new: torch.Tensor, size: int) -> torch.Tensor:
        """Prepend the last inputs of earlier calls and store those of this call.

        Args:
            name: of the state.
            new: `[B, length, features]`, inputs of this call.
            size: number of earlier inputs.

        Returns:
            `[B, size + length, features]`, zero before a row's start, with the gradient of `new`.
        """
        state = self.states.get(name)
        if state is None:
            state = self.states[name] = RollingState(new.new_zeros(new.shape[0], size, new.shape[2]).detach(), size)
        past = state.data[:, state.data.shape[1] - size :]
        history = torch.cat([past, new], dim=1)
        everything = torch.cat([state.data, new.detach()], dim=1)
        keep = everything.shape[1] if self.record_past and size else size
        state.data = roll_inputs(everything, keep, new.shape[1], self._rows.lengths)
        return history

    def index(self, shapes: Callable[[], IndexShapes], undo: Callable) -> dict[str, torch.Tensor]:
        """Return the tensors of the layer's index, for its owner to update in place.

        Tensors grow to the shapes of the call. An index with other names is replaced by an empty one: its tensors have
        another layout, for example that of the device on which the cache was before.

        Args:
            shapes: returns shape `[B, ...]` and dtype of each tensor by its name.
            undo: as for `IndexState`.
        """
        wanted = shapes()
        held = {name: state for name, state in self.states.items() if isinstance(state, IndexState)}
        if held.keys() != wanted.keys():
            self.states = {name: state for name, state in self.states.items() if name not in held}
            self.states |= empty_index(wanted, self.device, undo)
        for name, (shape, _) in wanted.items():
            self.states[name].reserve(shape)
        return {name: self.states[name].data for name in wanted}

    def replace(self, name: str, data: torch.Tensor) -> None:
        """Store `data` `[B, ...]` under a name. A layer with such a state cannot be cropped."""
        self.states[name] = ReplaceState(data)

    def data(self, name: str) -> torch.Tensor | None:
        """Return the tensor of a state; None if it does not exist yet."""
        state = self.states.get(name)
        return None if state is None else state.data

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Raise a ValueError: the states are created by the model's modules."""
        raise ValueError("A flow model's cache cannot be initialised from keys and values: run the model on a prompt.")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Raise a ValueError: the states are written by the model's modules."""
        raise ValueError("This cache layer belongs to a flow model: create a new cache for another model.")

    def static_seq_length(self) -> int | None:
        """Return the columns so far if they are known without a device synchronisation, else None."""
        return self.seq_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (columns after a call of `query_length` columns, offset 0)."""
        return self.seq_length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the columns so far, including padding."""
        return self.seq_length

    def get_max_length(self) -> int:
        """Return −1: the cache grows without a limit."""
        return -1

    def _each(self, change: Callable[[ReplaceState], None]) -> None:
        """Apply `change` to every state."""
        for state in self.states.values():
            change(state)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select the rows `beam_idx` for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, int64 `[B']`."""
        if self.lengths is None:
            return
        self._each(lambda state: state.select(indices))
        indices = indices.to(self.lengths.device)
        self.lengths = self.lengths.index_select(0, indices)
        self.mask = None if self.mask is None else self.mask.index_select(0, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.lengths is None:
            return
        self._each(lambda state: state.repeat(repeats))
        self.lengths = self.lengths.repeat_interleave(repeats)
        self.mask = None if self.mask is None else self.mask.repeat_interleave(repeats, dim=0)

    def offload(self) -> None:
        """Move all states to the CPU."""
        if self.is_initialized:
            self._each(lambda state: state.to(torch.device("cpu")))

    def prefetch(self) -> None:
        """Move all states back to the device of the first call."""
        if self.is_initialized:
            self._each(lambda state: state.to(self.device))

    def activate_past_recording(self) -> None:
        """Record all inputs of rolling states from now on, so that the next `crop` can remove any number of tokens."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns, and the inputs recorded only for cropping.

        A positive number is the number of columns to keep, the earlier meaning in transformers.

        Raises:
            ValueError: the number exceeds the columns of the cache or the recorded inputs.
        """
        removed = -int(tokens_to_remove)  # some releases of transformers pass a tensor
        if removed < 0:
            removed = max(self.seq_length + removed, 0)
        if self.lengths is None:
            return
        self.leave_inference_mode()
        if removed > self.seq_length:
            raise ValueError(f"crop({-removed}) removes more than the {self.seq_length} tokens of the cache.")
        if removed:
            old = self.lengths
            new = old - (removed if self.mask is None else self.mask[:, self.seq_length - removed :].sum(dim=1))
            self._each(lambda state: state.check_crop(old, new))
            self._each(lambda state: state.crop(self, old, new))
            if self.mask is None:
                self.aligned -= removed
            else:
                self.mask = self.mask[:, : self.seq_length - removed]
                self.aligned = None
            self.lengths = new
            self.longest = int(new.max())
            self.seq_length -= removed
        self._each(lambda state: state.trim())


def state_layers(past_key_values: Cache, num_layers: int) -> list[FlowCacheLayer]:
    """Return the first `num_layers` layers of a flow model's cache.

    Raises:
        ValueError: the cache was not created for a flow model with this number of layers.
    """
    layers: list[FlowCacheLayer] = getattr(past_key_values, "layers", [])
    # Test an attribute, not the class: code from the Hub and the installed package define different classes.
    if len(layers) < num_layers or not all(hasattr(layer, "finish_forward") for layer in layers[:num_layers]):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__} that cannot hold this model's state: "
            "use DynamicCache(config=model.config). Prefix tuning provides keys and values only: use prompt tuning."
        )
    return layers[:num_layers]
