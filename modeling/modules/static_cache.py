"""Cache layer of fixed shape, for `StaticCache(config=model.config, max_cache_len=...)`.

A compiled step, or one captured in a CUDA graph, requires every tensor at the same address in the same shape. Each
tensor is therefore allocated whole at first use and written in place, and lengths are tensors, never Python numbers.

transformers finds `StaticFlowCacheLayer` by its `_layer_type`, "flow_state", once this module is imported.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer
from transformers.utils import is_torchdynamo_compiling

from .cache import FlowCacheLayer
from .cache_states import GrowingState, IndexShapes, IndexState, RollingState, empty_index, normal_tensor, roll_inputs
from .row_layout import RowLayout


class StaticFlowCacheLayer(FlowCacheLayer, StaticLayer):  # type: ignore[override]  # batch_size is read-only here
    """A `FlowCacheLayer` for at most `max_cache_len` columns. It supports reorder and reset, but not crop or repeat.

    Attributes:
        lengths: int64 `[B]`, entities of each row; None before the first call.
        aligned: always None, because lengths are tensors.
        longest: `max_cache_len`.
        seen: int64 scalar, columns so far; None before the first call.
        real: bool `[B, max_cache_len]`, False at padding; None if no column was padding.
    """

    is_croppable = False

    def __init__(self, max_cache_len: int, **kwargs):
        CacheLayerMixin.__init__(self)
        self.max_cache_len = self.longest = max_cache_len
        self.states: dict[str, Any] = {}  # GrowingState, RollingState or IndexState
        self.lengths: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        self.real: torch.Tensor | None = None
        self.aligned = None
        self._rows: RowLayout | None = None

    @property
    def seq_length(self) -> int:  # type: ignore[override]  # read-only here: it follows from `seen`
        """Columns so far; reading it synchronises the device."""
        return 0 if self.seen is None else int(self.seen)

    def static_seq_length(self) -> int | None:
        """Return the columns so far; None if reading them would synchronise a device or break a graph."""
        if is_torchdynamo_compiling() or (self.seen is not None and self.seen.device.type != "cpu"):
            return None
        return self.seq_length

    @property
    def mask(self) -> torch.Tensor | None:  # type: ignore[override]  # read-only here: it follows from `real`
        """Bool `[B, seq_length]`, False at padding; None if no column was padding."""
        return None if self.real is None else self.real[:, : self.seq_length]

    def start_forward(self, batch: int, length: int, device: torch.device) -> None:
        if (self.static_seq_length() or 0) + length > self.max_cache_len:
            raise ValueError(
                f"max_cache_len is {self.max_cache_len}, but the cache holds {self.seq_length} tokens and {length} "
                "more follow: create a StaticCache with a larger max_cache_len."
            )
        if self.lengths is None:
            self.lengths = mark_static(torch.zeros(batch, dtype=torch.int64, device=device))
            self.seen = mark_static(torch.zeros((), dtype=torch.int64, device=device))
            self.device = device
            self.is_initialized = True
        self.check_batch(batch)
        self.leave_inference_mode()

    def leave_inference_mode(self) -> None:
        if torch.compiler.is_compiling():
            return
        self._each(lambda state: state.leave_inference_mode())
        self.lengths, self.seen, self.real = map(normal_tensor, (self.lengths, self.seen, self.real))

    def finish_forward(self) -> None:
        rows, self._rows = self._rows, None
        length = rows.positions.shape[1]
        if rows.mask is not None and self.real is None:
            self.real = mark_static(rows.mask.new_ones(rows.mask.shape[0], self.max_cache_len))
        if rows.mask is not None:
            self.real.index_copy_(1, self.seen + torch.arange(length, device=self.device), rows.mask)
        self.lengths.add_(length if rows.lengths is None else rows.lengths)
        self.seen.add_(length)

    def append(self, name: str, new: torch.Tensor) -> torch.Tensor:
        return write_in_place(self._storage(name, new, self.max_cache_len), new, self.lengths)

    def write_entries(self, name: str, new: torch.Tensor, at: torch.Tensor, every: int) -> None:
        # A call writes equally many entries in all rows; 3 spare entries hold those beyond the row's own chunks.
        write_in_place(self._storage(name, new, self.max_cache_len // every + 3), new.detach(), at)

    def _storage(self, name: str, new: torch.Tensor, capacity: int) -> torch.Tensor:
        if name not in self.states:
            shape = (*new.shape[:2], capacity, new.shape[3])
            self.states[name] = GrowingState(mark_static(torch.zeros(shape, dtype=new.dtype, device=new.device)))
        return self.states[name].data

    def roll(self, name: str, new: torch.Tensor, size: int) -> torch.Tensor:
        if name not in self.states:
            shape = (new.shape[0], size, new.shape[2])
            self.states[name] = RollingState(mark_static(torch.zeros(shape, dtype=new.dtype, device=new.device)), size)
        kept = self.states[name].data
        history = torch.cat([kept, new], dim=1)
        kept.copy_(roll_inputs(history.detach(), size, new.shape[1], self._rows.lengths))
        return history

    def index(self, shapes: Callable[[], IndexShapes], undo: Callable) -> dict[str, torch.Tensor]:
        """As `FlowCacheLayer.index`; the first call determines names and shapes, for `max_cache_len` entities."""
        held = {name: state for name, state in self.states.items() if isinstance(state, IndexState)}
        if not held:
            held = empty_index(shapes(), self.device, undo)
            for state in held.values():
                mark_static(state.data)
            self.states |= held
        return {name: state.data for name, state in held.items()}

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> int | torch.Tensor:  # type: ignore[override]  # StaticLayer returns a tensor too
        return 0 if self.seen is None else self.seen

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        if self.lengths is None:
            return
        self.leave_inference_mode()
        for state in self.states.values():
            state.data.zero_()
        self.lengths.zero_()
        self.seen.zero_()
        if self.real is not None:
            self.real.fill_(True)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.lengths is None:
            return
        self.leave_inference_mode()
        indices = beam_idx.to(self.device)
        kept = [state.data for state in self.states.values()] + [self.lengths]
        for tensor in kept if self.real is None else [*kept, self.real]:
            tensor.copy_(tensor.index_select(0, indices))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise self._refusal("cannot change its rows")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise self._refusal("cannot change its rows")

    def offload(self) -> None:
        raise self._refusal("cannot be offloaded")

    def crop(self, tokens_to_remove: int) -> None:
        raise self._refusal("cannot be cropped")

    def _refusal(self, what: str) -> ValueError:
        return ValueError(f"A cache of fixed shape {what}: use DynamicCache(config=model.config).")


def write_in_place(storage: torch.Tensor, new: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Write `new` `[B, groups, length, features]` into the storage in place, from entry `at` int64 `[B]` on.

    Returns:
        The storage; with gradients enabled a copy through which gradients reach `new`.
    """
    batch, groups, length, _ = new.shape
    row, group, step = (torch.arange(size, device=new.device) for size in (batch, groups, length))
    # Compilers run index_put_ in place, but not scatter_.
    entries = (row[:, None, None], group[:, None], (at[:, None] + step)[:, None])
    storage.index_put_(entries, new.detach())
    return storage.clone().index_put(entries, new) if torch.is_grad_enabled() else storage


def mark_static(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a tensor as having a static address for compiled code, as transformers' StaticLayer does; return it."""
    if not is_torchdynamo_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


def check_static_support(model, cache: Cache) -> None:
    """Raise a ValueError if the cache has a fixed shape and the model does not support one."""
    if cache.is_compileable and not model._can_compile_fullgraph:
        raise ValueError(
            f"{type(model).__name__} does not support StaticCache: the size of its state depends on the input. Use "
            "DynamicCache(config=model.config)."
        )
