"""Runs a layer on a long row chunk by chunk, so that peak memory depends on the chunk, not on the row."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .cache import FlowCacheLayer
from .row_layout import RowLayout

FORWARD_CHUNK = 4096


def forward_chunk_length(chunk_length: int, block: int) -> int:
    """Return the length of a forward chunk, close to `FORWARD_CHUNK`.

    Args:
        chunk_length: of the layer's memory; the result is a multiple of it, so that memory chunks are not split.
        block: length of an attention block; the result nearly fills whole blocks.
    """
    whole_blocks = max(FORWARD_CHUNK // block * block, chunk_length)
    return whole_blocks // chunk_length * chunk_length


class ChunkCarry(FlowCacheLayer):
    """Carries the state of one layer from chunk to chunk of the same pass, with gradients, unlike a cache.

    A forward chunk starts at a memory chunk, so the next one needs only the last entry that it wrote.
    """

    _layer_type = None  # not registered: transformers creates no cache of these

    def __init__(self) -> None:
        super().__init__()
        self.histories: dict[str, torch.Tensor] = {}
        self.entries: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def roll(self, name: str, new: torch.Tensor, size: int) -> torch.Tensor:
        """As `FlowCacheLayer.roll`, without regard to padding: no chunk follows the one in which a row ends."""
        past = self.histories.get(name)
        history = F.pad(new, (0, 0, size, 0)) if past is None else torch.cat([past, new], dim=1)
        self.histories[name] = history[:, history.shape[1] - size :]
        return history

    def write_entries(self, name: str, new: torch.Tensor, at: torch.Tensor, every: int) -> None:
        """As `FlowCacheLayer.write_entries`, but deletes the entries of earlier chunks."""
        self.entries[name] = new, at

    def entry(self, name: str, at: torch.Tensor) -> torch.Tensor | None:
        """As `FlowCacheLayer.entry`; an arbitrary entry for a row that has ended."""
        if name not in self.entries:
            return None
        new, first = self.entries[name]
        entry = (at - first).clamp(0, new.shape[2] - 1)
        return new[torch.arange(len(entry), device=entry.device), 0, entry]


def forward_in_chunks(
    read: Callable, state: FlowCacheLayer | None, rows: RowLayout, size: int, *tensors: torch.Tensor
) -> list[tuple[RowLayout, tuple]]:
    """Call `read(rows, state, *tensors)` for one chunk of the row after the other.

    Args:
        read: the layer's forward function.
        state: the layer's cache, or None. With gradients enabled it must be None.
        rows: layout of the call.
        size: entities per chunk, from `forward_chunk_length`.
        tensors: `[B, M, ...]`, split along M.

    Returns:
        (layout, result of `read`) of each chunk.
    """
    length = rows.positions.shape[1]
    state = ChunkCarry() if state is None else state
    results = []
    starts = range(0, length, size)
    for start, *pieces in zip(starts, *(x.split(size, dim=1) for x in tensors), strict=True):
        chunk = rows.chunk(start, min(start + size, length))
        batch, chunk_length = chunk.positions.shape
        state.start_forward(batch, chunk_length, chunk.positions.device)
        state.set_layout(chunk)
        results.append((chunk, read(chunk, state, *pieces)))
        state.finish_forward()
    state.record_mask(rows)
    return results
