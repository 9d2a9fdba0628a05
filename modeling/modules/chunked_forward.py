"""Long rows read span by span: what a layer holds at a time has the length of a span, not of the row."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .cache import FlowCacheLayer
from .row_layout import RowLayout

FORWARD_CHUNK = 4096


def forward_chunk_length(chunk_length: int, block: int) -> int:
    """Almost `FORWARD_CHUNK`: whole chunks, so that spans begin where chunks do, that all but fill whole blocks."""
    filled = max(FORWARD_CHUNK // block * block, chunk_length)
    return filled // chunk_length * chunk_length


class ChunkCarry(FlowCacheLayer):
    """What one layer hands from span to span of the same pass; unlike a cache's state it carries gradients.

    Spans begin where chunks do: of the entries that a span wrote, the next one needs none but the last.
    """

    _layer_type = None  # transformers makes no cache of these

    def __init__(self):
        super().__init__()
        self.histories: dict[str, torch.Tensor] = {}
        self.entries: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def roll(self, name: str, new: torch.Tensor, size: int) -> torch.Tensor:
        """As `FlowCacheLayer.tail`. A row that ends within a span has nothing behind it to read its tail."""
        past = self.histories.get(name)
        history = F.pad(new, (0, 0, size, 0)) if past is None else torch.cat([past, new], dim=1)
        self.histories[name] = history[:, history.shape[1] - size :]
        return history

    def write_entries(self, name: str, new: torch.Tensor, at: torch.Tensor, every: int) -> None:
        """As `FlowCacheLayer.write_entries`; those of earlier spans are forgotten."""
        self.entries[name] = new, at

    def entry(self, name: str, at: torch.Tensor) -> torch.Tensor | None:
        """As `FlowCacheLayer.entry`; for a row that has ended, any."""
        if name not in self.entries:
            return None
        new, first = self.entries[name]
        place = (at - first).clamp(0, new.shape[2] - 1)
        return new[torch.arange(len(place), device=place.device), 0, place]


def forward_in_chunks(
    read: Callable, state: FlowCacheLayer | None, rows: RowLayout, size: int, *tensors: torch.Tensor
) -> list[tuple[RowLayout, tuple]]:
    """`read(rows of the span, state, *tensors of the span)` of each span in turn.

    Args:
        state: of the layer, a cache's or none; where gradients are taken it must be none.
        tensors: `[B, M, ...]`.

    Returns:
        What each span gave, with its rows.
    """
    length = rows.positions.shape[1]
    state = ChunkCarry() if state is None else state
    results = []
    starts = range(0, length, size)
    for start, *pieces in zip(starts, *(x.split(size, dim=1) for x in tensors), strict=True):
        span = rows.span(slice(start, min(start + size, length)))
        state.start_forward(*span.index.shape, span.index.device)
        state.set_layout(span)
        results.append((span, read(span, state, *pieces)))
        state.finish_forward()
    state.record_mask(rows)
    return results
