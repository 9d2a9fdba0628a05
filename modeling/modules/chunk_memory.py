"""Memory slots that each completed chunk of a row updates and later entities read.

Chunk c of a segment holds its entities c·T … (c + 1)·T − 1. After chunk c, slot j holds

    m_j,c = β_j m_j,c−1 + (1 − β_j) Σ_t softmax_t(a_j · x_t) x_t        over the entities t of chunk c,

and an entity of chunk c reads m_·,c−1. It reads closed chunks only, so the memory is causal.

Shape letters: B batch, M entities of this call, S slots, D features, C chunks touched by this call, T chunk length.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


def ema_scan(decays: torch.Tensor, inputs: torch.Tensor, reach: int | None = None) -> torch.Tensor:
    """Compute h_c = decays_c ⊙ h_c−1 + inputs_c along dimension 1, with h_−1 = 0, in O(log C) steps.

    Args:
        decays: `[B, C, S, 1]`.
        inputs: `[B, C, S, D]`.
        reach: a power of two, number of steps after which the caller knows an input to have decayed to 0; None for C.

    Returns:
        h, `[B, C, S, D]`.
    """
    step = 1
    while step < min(inputs.shape[1], reach or inputs.shape[1]):
        inputs = torch.cat([inputs[:, :step], inputs[:, step:] + decays[:, step:] * inputs[:, :-step]], dim=1)
        decays = torch.cat([decays[:, :step], decays[:, step:] * decays[:, :-step]], dim=1)
        step *= 2
    return inputs


@dataclass(frozen=True)
class ChunkLayout:
    """The assignment of entities to chunks. M' counts the entities of this call and of the open chunk before it.

    Attributes:
        slot: int64 `[B, M']`, chunk · T + index in the chunk; `num_chunks` · T for padding.
        num_chunks: C.
        chunk_length: T.
        starts_segment: bool `[B, C]`, whether a chunk is the first of its segment.
        start: slot of the first entity if slots are consecutive and equal in all rows, negative if the first entities
            are padding. Entities are then moved by padding instead of a scatter. None if rows differ.
    """

    slot: torch.Tensor
    num_chunks: int
    chunk_length: int
    starts_segment: torch.Tensor
    start: int | None = None

    def to_chunks(self, x: torch.Tensor) -> torch.Tensor:
        """Arrange entities by chunk: `[B, M', F]` → `[B, C, T, F]`, zero at empty entries."""
        batch, length, features = x.shape
        slots = self.num_chunks * self.chunk_length
        if self.start is not None:
            chunks = F.pad(x, (0, 0, self.start, slots - self.start - length))
        else:
            chunks = x.new_zeros(batch, slots + 1, features)
            chunks = chunks.scatter(1, self.slot[..., None].expand_as(x), x)[:, :-1]
        return chunks.view(batch, self.num_chunks, self.chunk_length, features)

    def from_chunks(self, chunks: torch.Tensor) -> torch.Tensor:
        """Undo `to_chunks`: `[B, C, T, F]` → `[B, M', F]`."""
        flat = chunks.flatten(1, 2)
        if self.start is not None:
            return F.pad(flat, (0, 0, -self.start, self.start + self.slot.shape[1] - flat.shape[1]))
        slot = self.slot.clamp(max=flat.shape[1] - 1)
        return flat.gather(1, slot[..., None].expand(-1, -1, flat.shape[-1]))

    def of_chunks(self, x: torch.Tensor) -> torch.Tensor:
        """Return the value of each entity's chunk: `[B, C, F]` → `[B, M', F]`."""
        chunk = (self.slot // self.chunk_length).clamp(max=self.num_chunks - 1)
        return x.gather(1, chunk[..., None].expand(-1, -1, x.shape[-1]))

    def last(self, count: int) -> "ChunkLayout":
        """Return the layout of the last `count` entities."""
        dropped = self.slot.shape[1] - count
        return replace(self, slot=self.slot[:, dropped:], start=None if self.start is None else self.start + dropped)


class ChunkMemory(nn.Module):
    """Slots that hold an exponential moving average of the attention-pooled chunks (module docstring).

    Args:
        features: D.
        num_slots: S; each slot has its own learnt pooling query and decay.
        chunk_length: T.
        initial_decay: β at initialisation, in (0, 1).
        name: prefix of its states in the cache; a layer may have several memories.

    Example:
        >>> import torch
        >>> from dfn_hf.modeling.modules.chunk_memory import ChunkMemory
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> memory = ChunkMemory(features=8, num_slots=2, chunk_length=4, initial_decay=0.9)
        >>> memory.reset_parameters(std=0.02)
        >>> slots, layout = memory(torch.randn(1, 10, 8), make_row_layout(1, 10, torch.device("cpu")))
        >>> slots.shape  # slots read by each of the 3 chunks
        torch.Size([1, 3, 2, 8])
    """

    def __init__(self, features: int, num_slots: int, chunk_length: int, initial_decay: float, name: str = "memory"):
        super().__init__()
        self.tail_name, self.slots_name = f"{name}_tail", f"{name}_slots"
        self.chunk_length = chunk_length
        self.initial_decay = initial_decay
        self.pooling_query = nn.Parameter(torch.empty(num_slots, features))
        self.initial_slots = nn.Parameter(torch.empty(num_slots, features))
        self.decay_logit = nn.Parameter(torch.empty(num_slots, dtype=torch.float32))

    def forward(self, x: torch.Tensor, rows, state=None) -> tuple[torch.Tensor, ChunkLayout]:
        """Compute the slots that the entities of each chunk read.

        Args:
            x: `[B, M, D]`.
            rows: `row_layout.RowLayout` of this call.
            state: `cache.FlowCacheLayer`, or None.

        Returns:
            (slots `[B, C, S, D]` in at least float32, layout of the M entities in the C chunks).
        """
        batch, length, features = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        initial = self.initial_slots.to(dtype)
        if state is None:
            entities, before = x, initial.expand(batch, -1, -1)
        else:
            entities = state.roll(self.tail_name, x, self.chunk_length - 1)
            before = self._load(state, initial)
        layout = self._lay_out(entities.shape[1] - length, rows, 0 if state is None else state.aligned)

        pooled, decay = self._aggregate(layout.to_chunks(entities.to(dtype)), layout)
        restart = layout.starts_segment[..., None, None]
        start = torch.where(restart, initial, 0)
        start = torch.cat([before[:, None], start[:, 1:]], dim=1)
        inputs = (1 - decay) * pooled + decay * start
        closed = ema_scan(torch.where(restart, 0, decay), inputs)
        if state is not None:
            self._store(state, closed)
        read = torch.where(restart[:, 1:], initial, closed[:, :-1])
        return torch.cat([before[:, None], read], dim=1), layout.last(length)

    def _lay_out(self, history: int, rows, aligned: int | None) -> ChunkLayout:
        """Return the layout of the open chunk's entities from earlier calls and of this call's entities.

        Args:
            history: number of earlier entities in front of this call's; those before the open chunk are ignored.
            rows: `row_layout.RowLayout` of this call.
            aligned: number of entities before this call if equal in all rows, else None.
        """
        chunk_length = self.chunk_length
        positions = rows.positions
        batch, length = positions.shape
        device = positions.device
        real = torch.ones_like(positions, dtype=torch.bool)
        if rows.lengths is not None:
            real = torch.arange(length, device=device) < rows.lengths[:, None]
        if rows.segment is None:
            past = positions[:, :1]
            place = torch.arange(-history, length, device=device) + past
            chunk = torch.div(place, chunk_length, rounding_mode="floor") - past // chunk_length
            real = torch.cat([chunk[:, :history] == 0, real], dim=1)
        else:
            place = rows.segment_positions
            chunk = (place % chunk_length == 0).cumsum(dim=1) - 1
        if rows.segment is not None:
            num_chunks = int(chunk.max()) + 1
        elif aligned is not None:
            num_chunks = (aligned + length - 1) // chunk_length - aligned // chunk_length + 1
        else:
            num_chunks = (chunk_length + length - 2) // chunk_length + 1  # an upper bound
        slot = torch.where(real, chunk * chunk_length + place % chunk_length, num_chunks * chunk_length)
        starts = torch.zeros(batch, num_chunks, dtype=torch.bool, device=device)
        starts.scatter_(1, chunk.clamp(min=0), (place >= 0) & (place < chunk_length))
        starts[:, 0].fill_(True)
        in_step = rows.segment is None and rows.lengths is None and aligned is not None
        return ChunkLayout(
            slot, num_chunks, chunk_length, starts, aligned % chunk_length - history if in_step else None
        )

    def _decay(self, dtype: torch.dtype) -> torch.Tensor:
        """Return β of each slot, `[S]`."""
        return self.decay_logit.to(dtype).sigmoid()

    def _aggregate(self, chunks: torch.Tensor, layout: ChunkLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool the entities of each chunk `[B, C, T, D]` by attention.

        Returns:
            (pooled `[B, C, S, D]`, zero for an empty chunk; β `[B, C, S, 1]`).
        """
        present = layout.to_chunks(torch.ones_like(layout.slot, dtype=chunks.dtype)[..., None])
        scores = chunks @ self.pooling_query.to(chunks.dtype).T / math.sqrt(chunks.shape[-1])
        scores = scores.masked_fill(present == 0, torch.finfo(chunks.dtype).min)
        pooled = (scores.softmax(dim=2) * present).transpose(2, 3) @ chunks
        return pooled, self._decay(chunks.dtype)[:, None].expand(*pooled.shape[:3], 1)

    def _load(self, state, initial: torch.Tensor) -> torch.Tensor:
        """Load the slots after the chunks closed before this call, `[B, S, D]`."""
        closed = state.lengths // self.chunk_length
        entry = state.entry(self.slots_name, closed)
        if entry is None:
            return initial.expand(closed.shape[0], -1, -1)
        entry = entry.view(-1, *initial.shape).to(initial.dtype)
        return torch.where((closed == 0)[:, None, None], initial, entry)

    def _store(self, state, closed: torch.Tensor) -> None:
        """Store the slots after each chunk; entry e follows e closed chunks. An open chunk's entry is overwritten."""
        at = state.lengths // self.chunk_length + 1
        state.write_entries(self.slots_name, closed.flatten(2)[:, None], at, self.chunk_length)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Initialise slots and pooling queries with standard deviation `std`, and decays with `initial_decay`."""
        init.normal_(self.pooling_query, std=std)
        init.normal_(self.initial_slots, std=std)
        init.constant_(self.decay_logit, math.log(self.initial_decay / (1 - self.initial_decay)))


def mix_slots(weights: torch.Tensor, values: torch.Tensor, layout: ChunkLayout) -> torch.Tensor:
    """Compute Σ_s weight_is v_s over the slots that entity i reads, without a copy of the slots per entity.

    Args:
        weights: `[B, H, M, S]`.
        values: `[B, H, C, S, D]`.
        layout: of the M entities in the C chunks.

    Returns:
        `[B, H, M, D]`.
    """
    batch, heads, length, _ = weights.shape
    chunks = layout.to_chunks(weights.transpose(1, 2).flatten(2)).unflatten(-1, (heads, -1))  # [B, C, T, H, S]
    mixed = chunks.permute(0, 3, 1, 2, 4) @ values  # [B, H, C, T, D]
    mixed = layout.from_chunks(mixed.permute(0, 2, 3, 1, 4).flatten(3))
    return mixed.view(batch, length, heads, -1).transpose(1, 2)
