"""A small memory of slots that closed chunks of a row write to and later entities read.

Chunk c of a segment is its entities c·T … (c + 1)·T − 1. Slot j after chunk c holds

    m_j,c = β_j m_j,c−1 + (1 − β_j) Σ_t softmax_t(a_j · x_t) x_t        over the entities t of chunk c,

and an entity of chunk c reads m_·,c−1: closed chunks only, so nothing depends on the future.

Shape letters: B batch, M entities of this call, S slots, D features, C chunks touched by this call, T chunk length.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


def ema_scan(decays: torch.Tensor, inputs: torch.Tensor, reach: int | None = None) -> torch.Tensor:
    """h_c = decays_c ⊙ h_c−1 + inputs_c along dimension 1, h_−1 = 0, in O(log C) steps.

    Args:
        decays: `[B, C, S, 1]`; inputs: `[B, C, S, D]`.
        reach: a power of two; so far back, decays are known to have made nothing of an input.
    """
    step = 1
    while step < min(inputs.shape[1], reach or inputs.shape[1]):
        inputs = torch.cat([inputs[:, :step], inputs[:, step:] + decays[:, step:] * inputs[:, :-step]], dim=1)
        decays = torch.cat([decays[:, :step], decays[:, step:] * decays[:, :-step]], dim=1)
        step *= 2
    return inputs


@dataclass(frozen=True)
class ChunkLayout:
    """Where the entities of a call lie in the chunks it touches.

    Attributes:
        slot: int64 `[B, M']`, chunk · T + place in the chunk; `num_chunks` · T where nothing real is.
        num_chunks: C; chunk_length: T.
        starts_segment: bool `[B, C]`, chunks that nothing of their segment comes before.
        start: slot of the first entity where each has the slot after the one before, in every row; negative if the
            first ones are not real. None where rows differ: the entities are then moved one by one.
    """

    slot: torch.Tensor
    num_chunks: int
    chunk_length: int
    starts_segment: torch.Tensor
    start: int | None = None

    def lay(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, M', F]` → `[B, C, T, F]`, zero where nothing is."""
        batch, length, features = x.shape
        slots = self.num_chunks * self.chunk_length
        if self.start is not None:
            laid = F.pad(x, (0, 0, self.start, slots - self.start - length))
        else:
            laid = x.new_zeros(batch, slots + 1, features)
            laid = laid.scatter(1, self.slot[..., None].expand_as(x), x)[:, :-1]
        return laid.view(batch, self.num_chunks, self.chunk_length, features)

    def take(self, laid: torch.Tensor) -> torch.Tensor:
        """The way back: `[B, C, T, F]` → `[B, M', F]`."""
        flat = laid.flatten(1, 2)
        if self.start is not None:
            return F.pad(flat, (0, 0, -self.start, self.start + self.slot.shape[1] - flat.shape[1]))
        slot = self.slot.clamp(max=flat.shape[1] - 1)
        return flat.gather(1, slot[..., None].expand(-1, -1, flat.shape[-1]))

    def of_chunks(self, x: torch.Tensor) -> torch.Tensor:
        """What belongs to each entity's chunk: `[B, C, F]` → `[B, M', F]`."""
        chunk = (self.slot // self.chunk_length).clamp(max=self.num_chunks - 1)
        return x.gather(1, chunk[..., None].expand(-1, -1, x.shape[-1]))

    def last(self, count: int) -> "ChunkLayout":
        """The same for the last `count` entities."""
        left_out = self.slot.shape[1] - count
        return replace(self, slot=self.slot[:, left_out:], start=None if self.start is None else self.start + left_out)


class ChunkMemory(nn.Module):
    """Slots that hold decaying averages of what closed chunks pooled.

    Args:
        features: D.
        num_slots: S; each slot pools with its own learnt query and decays at its own learnt rate.
        chunk_length: T.
        initial_decay: β before training, in (0, 1).
        name: of its state in the cache; one layer may hold several memories.
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
        """What the entities of each chunk may read.

        Args:
            x: `[B, M, D]`.
            rows: `row_layout.RowLayout` of this call.
            state: `cache.FlowCacheLayer`, or None.

        Returns:
            (slots `[B, C, S, D]` in at least float32, the layout of the M entities in the C chunks).
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

        pooled, decay = self._aggregate(layout.lay(entities.to(dtype)), layout)
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
        """The layout of `history` entities before this call, of which the open chunk's count, and the call's.

        Args:
            aligned: entities before this call if it is the same number in every row.
        """
        span = self.chunk_length
        index = rows.positions
        batch, length = index.shape
        device = index.device
        real = torch.ones_like(index, dtype=torch.bool)
        if rows.lengths is not None:
            real = torch.arange(length, device=device) < rows.lengths[:, None]
        if rows.segment is None:
            past = index[:, :1]
            place = torch.arange(-history, length, device=device) + past
            chunk = torch.div(place, span, rounding_mode="floor") - past // span
            real = torch.cat([chunk[:, :history] == 0, real], dim=1)
        else:
            place = rows.segment_positions
            chunk = (place % span == 0).cumsum(dim=1) - 1
        if rows.segment is not None:
            num_chunks = int(chunk.max()) + 1
        elif aligned is not None:
            num_chunks = (aligned + length - 1) // span - aligned // span + 1
        else:
            num_chunks = (span + length - 2) // span + 1  # the most that any row can touch
        slot = torch.where(real, chunk * span + place % span, num_chunks * span)
        starts = torch.zeros(batch, num_chunks, dtype=torch.bool, device=device)
        starts.scatter_(1, chunk.clamp(min=0), (place >= 0) & (place < span))
        starts[:, 0].fill_(True)
        in_step = rows.segment is None and rows.lengths is None and aligned is not None
        return ChunkLayout(slot, num_chunks, span, starts, aligned % span - history if in_step else None)

    def _decay(self, dtype: torch.dtype) -> torch.Tensor:
        """β of each slot, `[S]`."""
        return self.decay_logit.to(dtype).sigmoid()

    def _aggregate(self, laid: torch.Tensor, layout: ChunkLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """What each chunk writes, and the weight that slots keep when it does.

        Attention pooling, `[B, C, T, D]` → `[B, C, S, D]`, zero where a chunk is empty; β, `[B, C, S, 1]`.
        """
        held = layout.lay(torch.ones_like(layout.slot, dtype=laid.dtype)[..., None])
        scores = laid @ self.pooling_query.to(laid.dtype).T / math.sqrt(laid.shape[-1])
        scores = scores.masked_fill(held == 0, torch.finfo(laid.dtype).min)
        pooled = (scores.softmax(dim=2) * held).transpose(2, 3) @ laid
        return pooled, self._decay(laid.dtype)[:, None].expand(*pooled.shape[:3], 1)

    def _load(self, state, initial: torch.Tensor) -> torch.Tensor:
        """Slots after the chunks that were closed before this call, `[B, S, D]`."""
        closed = state.lengths // self.chunk_length
        entry = state.entry(self.slots_name, closed)
        if entry is None:
            return initial.expand(closed.shape[0], -1, -1)
        entry = entry.view(-1, *initial.shape).to(initial.dtype)
        return torch.where((closed == 0)[:, None, None], initial, entry)

    def _store(self, state, closed: torch.Tensor) -> None:
        """Keep the slots at each boundary: entry e is what e closed chunks left. An open one is overwritten."""
        at = state.lengths // self.chunk_length + 1
        state.write_entries(self.slots_name, closed.flatten(2)[:, None], at, self.chunk_length)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Small random slots and queries, so that slots differ; decays at their initial value."""
        init.normal_(self.pooling_query, std=std)
        init.normal_(self.initial_slots, std=std)
        init.constant_(self.decay_logit, math.log(self.initial_decay / (1 - self.initial_decay)))


def mix_slots(weights: torch.Tensor, values: torch.Tensor, layout: ChunkLayout) -> torch.Tensor:
    """Σ_s weight_is v_s over the slots that entity i reads, without a copy of the slots per entity.

    Args:
        weights: `[B, H, M, S]`; values: `[B, H, C, S, D]`.

    Returns:
        `[B, H, M, D]`.
    """
    batch, heads, length, _ = weights.shape
    laid = layout.lay(weights.transpose(1, 2).flatten(2)).unflatten(-1, (heads, -1))  # [B, C, T, H, S]
    mixed = laid.permute(0, 3, 1, 2, 4) @ values  # [B, H, C, T, D]
    mixed = layout.take(mixed.permute(0, 2, 3, 1, 4).flatten(3))
    return mixed.view(batch, length, heads, -1).transpose(1, 2)
