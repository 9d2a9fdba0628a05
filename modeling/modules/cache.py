"""One cache layer for all families: named state tensors, each of a kind.

- append: grows with the entities of a row, in preallocated storage;
- tail: the last n inputs of something that looks back n steps;
- table: an index over appended entities, with a way to take the newest out again;
- fixed: replaced whole.

Reorder, repeat, select, offload, reset and crop are written once per kind. Rows are left-aligned (`padding.py`) and
may have different lengths: `FlowCacheLayer` keeps the length of each and the mask of each column, so that cropping n
columns takes the right number of entities from each row.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

# What outputs call the state for continuation, `generate()` too: `cache` from transformers 5.24 on.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def resolve_cache_argument(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """What a caller passed under either name; the old one is deprecated where transformers has a new one."""
    if past_key_values is not None and CACHE_NAME != "past_key_values":
        warnings.warn(f"`past_key_values` is deprecated: pass `{CACHE_NAME}`.", FutureWarning, stacklevel=3)
    return past_key_values if cache is None else cache


class ReplaceState:
    """A tensor `[batch, ...]` that is replaced whole. It cannot be cropped."""

    def __init__(self, data: torch.Tensor):
        self.data = data

    def select(self, indices: torch.Tensor) -> None:
        self.data = self.data.index_select(0, indices.to(self.data.device))

    def repeat(self, repeats: int) -> None:
        self.data = self.data.repeat_interleave(repeats, dim=0)

    def to(self, device: torch.device) -> None:
        self.data = self.data.to(device)

    def check_crop(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Raise a ValueError if rows of `old` entities cannot be cut to `new`; nothing has been cropped yet."""
        raise ValueError("This cache holds state that cannot be taken back: crop() is not possible.")

    def crop(self, layer: "FlowCacheLayer", old: torch.Tensor, new: torch.Tensor) -> None:
        """Cut rows of `old` entities to `new`, int64 `[batch]`."""

    def trim(self) -> None:
        """Forget what only `crop` needs."""


class GrowingState(ReplaceState):
    """Storage `[batch, groups, capacity, features]`; the lengths of the rows say how much of it counts."""

    def reserve(self, capacity: int) -> None:
        """Grow to hold `capacity` entries, at least doubling: each entry is copied a bounded number of times."""
        held = self.data.shape[2]
        if capacity <= held:
            return
        grown = self.data.new_zeros(*self.data.shape[:2], max(capacity, 2 * held), self.data.shape[3])
        grown[:, :, :held] = self.data
        self.data = grown

    def write(self, new: torch.Tensor, at: torch.Tensor | int) -> torch.Tensor:
        """Put `new` `[batch, groups, length, features]` at `at` (one place, or one per row).

        Returns the whole storage; a copy where gradients are taken, which flow through `new`: later calls write over
        the storage, and backward needs it as it was.
        """
        length = new.shape[2]
        if isinstance(at, int):
            self.reserve(at + length)
            self.data[:, :, at : at + length] = new.detach()
            if torch.is_grad_enabled():
                return torch.cat([self.data[:, :, :at], new, self.data[:, :, at + length :]], dim=2)
            return self.data
        places = at[:, None] + torch.arange(length, device=new.device)
        places = places[:, None, :, None].expand_as(new)
        self.data.scatter_(2, places, new.detach())
        if torch.is_grad_enabled():
            return self.data.clone().scatter(2, places, new)
        return self.data

    def check_crop(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Nothing to do, here and in `crop`: what lies beyond a row's length is never read and will be overwritten."""


class RollingState(ReplaceState):
    """The last inputs of each row, right-aligned: `[batch, held, features]`, zero before a row's start."""

    def __init__(self, data: torch.Tensor, size: int):
        super().__init__(data)
        self.size = size

    def check_crop(self, old: torch.Tensor, new: torch.Tensor) -> None:
        held = self.data.shape[1]
        needed = old - new + self.size
        if self.size and bool(((needed > held) & (old > held)).any()):
            raise ValueError(
                f"crop() can take back {max(held - self.size, 0)} tokens here, not {int((old - new).max())}: inputs "
                "of more were not kept. Call activate_past_recording() on the cache before what may be cropped."
            )

    def crop(self, layer: "FlowCacheLayer", old: torch.Tensor, new: torch.Tensor) -> None:
        removed = (old - new).to(self.data.device)
        held = self.data.shape[1]
        places = torch.arange(held, device=self.data.device) - removed[:, None]
        rows = self.data.gather(1, places.clamp(min=0)[..., None].expand_as(self.data))
        self.data = torch.where((places >= 0)[..., None], rows, rows.new_zeros(()))

    def trim(self) -> None:
        self.data = self.data[:, -self.size :] if self.size else self.data[:, :0]


def roll_inputs(inputs: torch.Tensor, keep: int, length: int, counts: torch.Tensor | None) -> torch.Tensor:
    """The last `keep` real ones of `[batch, inputs, features]`, in memory of their own; zero before a row's start.

    Args:
        length: how many of the inputs are new; counts: int64 `[batch]`, of how many the rest is padding. All if None.
    """
    first = inputs.shape[1] - keep
    if counts is None:
        return inputs[:, first:].clone()
    # Right-align each row: its padding, at the end, leaves.
    places = (first - length + counts)[:, None] + torch.arange(keep, device=inputs.device)
    rows = inputs.gather(1, places.clamp(min=0)[..., None].expand(-1, -1, inputs.shape[2]))
    return torch.where((places >= 0)[..., None], rows, rows.new_zeros(()))


class IndexState(ReplaceState):
    """An index `[batch, ...]` over appended entities; `undo(layer, old, new)` takes the newest out again."""

    def __init__(self, data: torch.Tensor, undo: Callable[["FlowCacheLayer", torch.Tensor, torch.Tensor], None]):
        super().__init__(data)
        self.undo = undo

    def check_crop(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Nothing to do: `undo` takes back any number."""

    def crop(self, layer: "FlowCacheLayer", old: torch.Tensor, new: torch.Tensor) -> None:
        self.undo(layer, old, new)


class FlowCacheLayer(CacheLayerMixin):
    """The state of one layer of a flow model.

    A model calls `start_forward` on every layer before its first module runs and `finish_forward` after its last; in between each
    module reads and writes its own names. Until `finish_forward` the lengths are those of before the call.

    Attributes:
        lengths: int64 `[batch]`, entities of each row; None before the first call.
        aligned: their number if it is the same in every row, else None.
        mask: bool `[batch, columns]`, which columns were real; None if all were.
        longest: a bound on the entities of a row.
        columns: columns seen, padding included: what transformers calls the sequence length. There may be more of them
            than entities: a column is real where its sample completed one.
        incoming: columns of the call that has begun.
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
        self.states: dict[str, ReplaceState] = {}
        self.constants: dict[str, Any] = {}
        self.lengths: torch.Tensor | None = None
        self.aligned: int | None = 0
        self.mask: torch.Tensor | None = None
        self.longest = 0
        self.seq_length = 0
        self.is_initialized = False
        self.new_columns = 0
        self._rows = None

    @property
    def batch_size(self) -> int:
        if self.lengths is None:
            raise AttributeError("batch_size is known after the first call.")
        return self.lengths.shape[0]

    # one call of the model

    def start_forward(self, batch: int, length: int, device: torch.device) -> None:
        """Get ready for `length` columns of a batch."""
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            self.device = device
            self.is_initialized = True
        self.check_batch(batch)
        self.prefetch()
        self.new_columns = length

    def check_batch(self, batch: int) -> None:
        """Raise a ValueError if this is not the batch that the layer holds."""
        if self.lengths.shape[0] != batch:
            raise ValueError(
                f"past_key_values holds {self.lengths.shape[0]} rows and the input has {batch}: "
                "use a cache of the same batch, or repeat it with batch_repeat_interleave()."
            )

    def set_layout(self, rows) -> None:
        """The entities of the call, and which of its columns are real: `row_layout.RowLayout`."""
        self._rows = rows

    def record_mask(self, rows) -> None:
        """Which of the columns just counted, span by span, were real: `row_layout.RowLayout` of them all."""
        if rows.mask is None:
            return
        length = rows.mask.shape[1]
        before = rows.mask.new_ones(rows.mask.shape[0], self.seq_length - length)
        before = before if self.mask is None else self.mask[:, : self.seq_length - length]
        self.mask = torch.cat([before, rows.mask], dim=1)

    def finish_forward(self) -> None:
        """Count the entities of this call, if they were not counted span by span."""
        if self._rows is None:
            return
        columns, length = self.new_columns, self._rows.positions.shape[1]
        mask, counts = self._rows.mask, self._rows.lengths
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
        self.lengths = self.lengths + (length if counts is None else counts)
        self.aligned = self.aligned + length if counts is None and self.aligned is not None else None
        self.longest += length
        self.seq_length += columns

    # the kinds of state

    def append(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """Append `[batch, groups, length, features]`; returns all entries, past and new, and room behind them."""
        state = self.states.get(name)
        if state is None:
            state = self.states[name] = GrowingState(new.new_zeros(*new.shape[:2], 0, new.shape[3]).detach())
        if self.aligned is not None:
            return state.write(new, self.aligned)
        state.reserve(self.longest + new.shape[2])
        return state.write(new, self.lengths)

    def reserve(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """As `append`, with anything in the place of `new`: for what is written later."""
        state = self.states.get(name)
        if state is None:
            state = self.states[name] = GrowingState(new.new_zeros(*new.shape[:2], 0, new.shape[3]))
        state.reserve(self.longest + new.shape[2])
        return state.data

    def constant(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` made on first use: the same for every row and call."""
        if name not in self.constants:
            self.constants[name] = make()
        return self.constants[name]

    def write_entries(self, name: str, new: torch.Tensor, at: torch.Tensor, every: int) -> None:
        """Write `[batch, groups, length, features]` from entry `at` `[batch]` on: one entry for `every` entities."""
        state = self.states.get(name)
        if state is None:
            state = self.states[name] = GrowingState(new.new_zeros(*new.shape[:2], 0, new.shape[3]).detach())
        state.reserve(self.longest // every + 1 + new.shape[2])
        state.write(new.detach(), at)

    def entry(self, name: str, at: torch.Tensor) -> torch.Tensor | None:
        """What `write_entries` put at `at` `[batch]` in its one group, `[batch, features]`; None if nothing."""
        stored = self.data(name)
        return None if stored is None else stored[torch.arange(len(at), device=at.device), 0, at]

    def roll(self, name: str, new: torch.Tensor, size: int) -> torch.Tensor:
        """The `size` inputs before this call (zero before a row's start), then `new`: `[batch, size + length, ...]`.

        The result keeps the gradient of `new`.
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

    def index_state(self, name: str, make: Callable[[], torch.Tensor], undo) -> torch.Tensor:
        """The index of this name, made on first use; updated in place by its owner."""
        if name not in self.states:
            self.states[name] = IndexState(make(), undo)
        return self.states[name].data

    def replace(self, name: str, data: torch.Tensor) -> None:
        """Keep `[batch, ...]` in the place of what stood there. A layer that holds such a state cannot be cropped."""
        self.states[name] = ReplaceState(data)

    def data(self, name: str) -> torch.Tensor | None:
        """The tensor behind a name, None if nothing was stored yet."""
        state = self.states.get(name)
        return None if state is None else state.data

    # what transformers asks of a cache layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise ValueError("A flow model's state has no keys and values to initialise from: run the model on a prompt.")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise ValueError("This cache layer belongs to a flow model; other models cannot store keys and values in it.")

    def static_seq_length(self) -> int | None:
        """Columns so far, if they are known as a number."""
        return self.seq_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seq_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.seq_length

    def get_max_length(self) -> int:
        return -1

    def _each(self, change: Callable[[ReplaceState], None]) -> None:
        for state in self.states.values():
            change(state)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.lengths is None:
            return
        self._each(lambda state: state.select(indices))
        indices = indices.to(self.lengths.device)
        self.lengths = self.lengths.index_select(0, indices)
        self.mask = None if self.mask is None else self.mask.index_select(0, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.lengths is None:
            return
        self._each(lambda state: state.repeat(repeats))
        self.lengths = self.lengths.repeat_interleave(repeats)
        self.mask = None if self.mask is None else self.mask.repeat_interleave(repeats, dim=0)

    def offload(self) -> None:
        if self.is_initialized:
            self._each(lambda state: state.to(torch.device("cpu")))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._each(lambda state: state.to(self.device))

    def activate_past_recording(self) -> None:
        """From now on tails keep everything, until the next `crop`, which may take any of it back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` columns; what was kept only for this is forgotten.

        Raises:
            ValueError: a positive number, more columns than there are, or a tail that was not recorded so far back.
        """
        removed = -int(tokens_to_remove)  # a tensor of one element in some releases of transformers
        if removed < 0:
            raise ValueError(f"crop() takes minus the number of tokens to remove, got {-removed}.")
        if self.lengths is None:
            return
        if removed > self.seq_length:
            raise ValueError(f"crop({-removed}) was asked of a cache that holds {self.seq_length} tokens.")
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
    """The layers of a cache made for a flow model of `num_layers` layers.

    Raises:
        ValueError: the cache was made for something else.
    """
    layers = getattr(past_key_values, "layers", ())
    # Reached by attribute, not by class: code loaded from the Hub and the installed package have each their own class.
    if len(layers) < num_layers or not all(hasattr(layer, "finish_forward") for layer in layers[:num_layers]):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__} that cannot hold this model's state: "
            "use DynamicCache(config=model.config). Prefix tuning, which brings keys and values alone, cannot work: "
            "use prompt tuning."
        )
    return layers[:num_layers]
