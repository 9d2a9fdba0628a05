"""The four kinds of state of a cache layer, see `cache`: how each is stored, selected, moved and cropped."""

from collections.abc import Callable

import torch
from transformers.cache_utils import CacheLayerMixin

# Shape and dtype of each tensor of an index by its name in the cache.
IndexShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def normal_tensor(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return `x`, or a copy if `x` was made in inference mode and this is not inference mode."""
    return x.clone() if x is not None and x.is_inference() and not torch.is_inference_mode_enabled() else x


class ReplaceState:
    """A tensor `[B, ...]` that is replaced whole. It cannot be cropped."""

    def __init__(self, data: torch.Tensor):
        self.data = data

    def select(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, int64 `[B']`."""
        self.data = self.data.index_select(0, indices.to(self.data.device))

    def repeat(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.data = self.data.repeat_interleave(repeats, dim=0)

    def to(self, device: torch.device) -> None:
        """Move the tensor to `device`."""
        self.data = self.data.to(device)

    def leave_inference_mode(self) -> None:
        """Copy a tensor that was made in inference mode, because it cannot be changed outside of it."""
        self.data = normal_tensor(self.data)

    def check_crop(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Raise a ValueError if rows of `old` entities cannot be cropped to `new` entities; changes nothing."""
        raise ValueError("This cache cannot be cropped: it holds a state without a history. Use a new cache instead.")

    def crop(self, layer: CacheLayerMixin, old: torch.Tensor, new: torch.Tensor) -> None:
        """Crop rows of `old` entities to `new` entities, int64 `[B]`."""

    def trim(self) -> None:
        """Delete what only `crop` needs."""


class GrowingState(ReplaceState):
    """Storage `[B, groups, capacity, features]`; the row's length says how many of its entries are valid."""

    def reserve(self, capacity: int) -> None:
        """Grow to at least `capacity` entries, and by a quarter: O(1) copies per entry, little unused memory."""
        old = self.data.shape[2]
        if capacity <= old:
            return
        capacity = max(capacity, old + old // 4 + 16) if old else capacity
        grown = self.data.new_zeros(*self.data.shape[:2], capacity, self.data.shape[3])
        grown[:, :, :old] = self.data
        self.data = grown

    def write(self, new: torch.Tensor, at: torch.Tensor | int) -> torch.Tensor:
        """Write new entries.

        Args:
            new: `[B, groups, length, features]`.
            at: index of the first new entry, one for all rows or int64 `[B]`.

        Returns:
            The whole storage. With gradients enabled a copy through which gradients reach `new`, because later calls
            overwrite the storage before the backward pass.
        """
        length = new.shape[2]
        if isinstance(at, int):
            self.reserve(at + length)
            self.data[:, :, at : at + length] = new.detach()
            if torch.is_grad_enabled():
                return torch.cat([self.data[:, :, :at], new, self.data[:, :, at + length :]], dim=2)
            return self.data
        entries = at[:, None] + torch.arange(length, device=new.device)
        entries = entries[:, None, :, None].expand_as(new)
        self.data.scatter_(2, entries, new.detach())
        if torch.is_grad_enabled():
            return self.data.clone().scatter(2, entries, new)
        return self.data

    def check_crop(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Do nothing, like `crop`: entries after a row's length are never read and will be overwritten."""


class RollingState(ReplaceState):
    """The last inputs of each row, right-aligned: `[B, recorded, features]`, zero before the row's start.

    Args:
        data: `[B, size, features]`.
        size: number of inputs that the module looks back to. More are recorded after `activate_past_recording()`.
    """

    def __init__(self, data: torch.Tensor, size: int):
        super().__init__(data)
        self.size = size

    def check_crop(self, old: torch.Tensor, new: torch.Tensor) -> None:
        recorded = self.data.shape[1]
        needed = old - new + self.size
        if self.size and bool(((needed > recorded) & (old > recorded)).any()):
            raise ValueError(
                f"crop() can remove at most {max(recorded - self.size, 0)} tokens from this cache, not "
                f"{int((old - new).max())}: call activate_past_recording() on the cache before the tokens to crop."
            )

    def crop(self, layer: CacheLayerMixin, old: torch.Tensor, new: torch.Tensor) -> None:
        removed = (old - new).to(self.data.device)
        recorded = self.data.shape[1]
        entries = torch.arange(recorded, device=self.data.device) - removed[:, None]
        rows = self.data.gather(1, entries.clamp(min=0)[..., None].expand_as(self.data))
        self.data = torch.where((entries >= 0)[..., None], rows, rows.new_zeros(()))

    def trim(self) -> None:
        self.data = self.data[:, -self.size :] if self.size else self.data[:, :0]


def roll_inputs(inputs: torch.Tensor, keep: int, length: int, lengths: torch.Tensor | None) -> torch.Tensor:
    """Return a copy of the last `keep` real inputs of each row, zero before the row's start: `[B, keep, features]`.

    Args:
        inputs: `[B, past + length, features]`, past inputs and those of this call.
        keep: number of inputs to return.
        length: columns of this call.
        lengths: int64 `[B]`, real inputs of this call, the others are padding; None if all are real.
    """
    first = inputs.shape[1] - keep
    if lengths is None:
        return inputs[:, first:].clone()
    # Right-align each row, which drops the padding at its end.
    entries = (first - length + lengths)[:, None] + torch.arange(keep, device=inputs.device)
    rows = inputs.gather(1, entries.clamp(min=0)[..., None].expand(-1, -1, inputs.shape[2]))
    return torch.where((entries >= 0)[..., None], rows, rows.new_zeros(()))


class IndexState(ReplaceState):
    """One tensor `[B, ...]` of an index over appended entities. Zeros are an index without entities.

    Args:
        data: the tensor; the owner of the index updates it in place.
        undo: `undo(layer, old, new)` removes the newest entities from the whole index when rows of `old` entities are
            cropped to `new`; None if another tensor of the index has it.
    """

    def __init__(self, data: torch.Tensor, undo: Callable[[CacheLayerMixin, torch.Tensor, torch.Tensor], None] | None):
        super().__init__(data)
        self.undo = undo

    def reserve(self, shape: tuple[int, ...]) -> None:
        """Grow to at least `shape`; new entries are zero."""
        old = self.data.shape
        if all(least <= size for least, size in zip(shape, old, strict=True)):
            return
        grown = self.data.new_zeros([max(sizes) for sizes in zip(shape, old, strict=True)])
        grown[tuple(slice(size) for size in old)] = self.data
        self.data = grown

    def check_crop(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Do nothing: `undo` removes any number of entities."""

    def crop(self, layer: CacheLayerMixin, old: torch.Tensor, new: torch.Tensor) -> None:
        if self.undo is not None:
            self.undo(layer, old, new)


def empty_index(shapes: IndexShapes, device: torch.device, undo: Callable) -> dict[str, IndexState]:
    """Return the states of an index without entities, by name; the first one has `undo` (see `IndexState`)."""
    first = next(iter(shapes))
    return {
        name: IndexState(torch.zeros(shape, dtype=dtype, device=device), undo if name == first else None)
        for name, (shape, dtype) in shapes.items()
    }
