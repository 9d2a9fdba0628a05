"""Entities sampled from a text of bytes, and the way back (paper §2.1).

A flow over the samples, f = W RMSNorm(h), foretells the next one: ‖x_{t+1} − f_t‖² is a loss, x the samples'
embeddings at length 1. So it comes to be the mean of what may follow, long where that is certain and short where it
may turn anywhere, E‖x_{t+1} − f_t‖² = 1 − ‖f_t‖²: where it is short, information is dense. The density of samples is

    d_t = sigmoid(β (θ − ‖f_t‖²))        θ, β learnt; 1 at the start of a segment,

and where it reaches 1/2 the span of samples since the entity before is completed as an entity: its state the mean of
theirs weighted by boundary_probs, its coordinate the density accumulated so far, its mass their number. It is seen from t on:

    z_e = D_e x_e + (1 − D_e) z_{e−1}        D_e = d at the sample that completes e, x_e what the DFN layers make of it
    h_t ← h_t + z_e(t)                       e(t) the newest entity completed at or before t

As in H-Net (Hwang et al. 2025), the choice gets its gradient straight through. There a boundary is where one state is
unlike the next; where the next is uncertain is what Pagnoni et al. (2024) take from a model of its own.

Shape letters: B batch, M samples of this call, E entities completed in it, D features, F coordinate features.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ..modules.cache import FlowCacheLayer
from ..modules.chunk_memory import ema_scan
from ..modules.linear import linear_in_weight_dtype
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout
from ..ops.chunking import apply_chunked
from .configuration_dfn import DFNConfig

BOUNDARY = 0.5  # density from which on an entity is completed
STEEPNESS = 20.0  # β before training
THRESHOLD = 0.2  # θ, likewise
MIN_WEIGHT = 1e-3  # of a sample in its entity's state
SMOOTHED_OVER = 64  # entities: those before weigh less than 2^-64
WAVELENGTHS = tuple(4.0**power for power in range(1, 9))  # of accumulated boundary_probs, about 1 per entity
COORDINATE_FEATURES = 2 * len(WAVELENGTHS)


@dataclass(frozen=True)
class EntityLayout:
    """Where the entities of one call lie among its samples.

    Attributes:
        rows: of the entities, left-aligned; its `mask` marks the columns whose samples completed one.
        places: int64 `[B, E]`, place of the sample that completed the entity; 0 where there is none.
        completed: int64 `[B, M]`, entities of this call completed at or before the sample.
    """

    rows: RowLayout
    places: torch.Tensor
    completed: torch.Tensor

    def of_samples(self, x: torch.Tensor) -> torch.Tensor:
        """What the samples that completed the entities have: `[B, M, ...]` → `[B, E, ...]`."""
        places = self.places.view(*self.places.shape, *(1,) * (x.dim() - 2))
        return x.gather(1, places.expand(-1, -1, *x.shape[2:]))

    def completes(self) -> torch.Tensor:
        """Which samples complete an entity, bool `[B, M]`."""
        return F.pad(self.completed, (1, 0)).diff(dim=1) > 0

    def at_samples(self, x: torch.Tensor) -> torch.Tensor:
        """Entities `[B, E, D]` at the samples that completed them `[B, M, D]`, zero at the others."""
        if x.shape[1] == 0:
            return x.new_zeros(*self.completed.shape, x.shape[2])
        laid = x.gather(1, (self.completed - 1).clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
        return laid * self.completes()[..., None]


@dataclass(frozen=True)
class SampledEntities:
    """What the samples of one call became.

    Attributes:
        states: `[B, E, D]`.
        coordinates: `[B, E, F]`.
        log_mass: `[B, E]`.
        boundary_probs: `[B, M]`, of the samples, in at least float32; 1 where all spans are of one length.
        layout: where the entities lie.
        prediction_loss: `[B]`, how far from the flow of a sample the next one of this call lies; None where nothing is
            foretold.
    """

    states: torch.Tensor
    coordinates: torch.Tensor
    log_mass: torch.Tensor
    boundary_probs: torch.Tensor
    layout: EntityLayout
    prediction_loss: torch.Tensor | None


class EntitySampling(nn.Module):
    """Spans of samples → entities: short where what follows is uncertain, or all of one length.

    Attributes:
        scales: names of the parameters that are learnt scales.
    """

    scales = ("threshold", "log_steepness")

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.rate = config.entity_rate
        self.adaptive = config.entity_sampling == "adaptive"
        self.longest = config.max_entity_length if self.adaptive else round(1 / config.entity_rate)
        self.flow_map = None
        if self.adaptive:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.flow_map = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.flow_map.init_std = THRESHOLD**0.5 / config.hidden_size  # ‖f‖² is about θ
            self.threshold = nn.Parameter(torch.empty(1, dtype=torch.float32))
            self.log_steepness = nn.Parameter(torch.empty(1, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.adaptive:
            init.constant_(self.threshold, THRESHOLD)
            init.constant_(self.log_steepness, math.log(STEEPNESS))

    def forward(
        self,
        states: torch.Tensor,
        rows: RowLayout,
        state: FlowCacheLayer | None,
        entity_state: FlowCacheLayer | None,
        embeddings: torch.Tensor | None = None,
    ) -> SampledEntities:
        """
        Args:
            states: `[B, M, D]`, of the samples, each from those before it; or on both sides, without `embeddings`.
            rows: theirs.
            state: of a layer over samples, or None.
            entity_state: of a layer over entities, or None.
            embeddings: `[B, M, D]` of the samples, to be foretold; they get no gradient. None if they are not.
        """
        starts = rows.segment_positions == 0
        prediction_loss, boundary_probs = (
            None,
            torch.ones_like(starts, dtype=torch.promote_types(states.dtype, torch.float32)),
        )
        if self.adaptive:
            flow = self._flow(states, boundary_probs.dtype)
            boundary_probs = self._density(flow, starts)
            prediction_loss = None if embeddings is None else self._flow_loss(flow, embeddings, rows)
        dense = starts | (boundary_probs >= BOUNDARY) if self.adaptive else starts
        accumulated, last_dense, opened = self._since(boundary_probs, dense, rows, state)
        completes = ((rows.positions - last_dense) % self.longest == 0) & rows.token_mask()
        layout = lay_entities(completes, rows, entity_state)
        pooled, mass = self._pool(states, boundary_probs, layout, rows, opened, state)
        coordinates = sinusoidal_features(layout.of_samples(accumulated), pooled.dtype)
        return SampledEntities(pooled, coordinates, mass.clamp(min=1).log(), boundary_probs, layout, prediction_loss)

    def _flow(self, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return apply_chunked(
                lambda piece: linear_in_weight_dtype(self.flow_map, self.norm(piece)).to(dtype), states
            )

    def _density(self, flow: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        steepness, threshold = self.log_steepness.to(flow.dtype).exp(), self.threshold.to(flow.dtype)
        return torch.where(starts, 1, (steepness * (threshold - flow.square().sum(dim=-1))).sigmoid())

    def _flow_loss(self, flow: torch.Tensor, embeddings: torch.Tensor, rows: RowLayout) -> torch.Tensor:
        follows = (rows.token_mask() & (rows.segment_positions > 0))[:, 1:]
        missed = apply_chunked(_missed, flow[:, :-1], embeddings[:, 1:])
        return (missed * follows).sum(dim=1) / follows.sum(dim=1).clamp(min=1)

    def _since(
        self, boundary_probs: torch.Tensor, dense: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a sample knows of its past.

        Returns:
            (density accumulated in its segment, float64 `[B, M]`; the last dense place, int64
            `[B, M]`; the first place of the entity that was open before this call, int64 `[B]`).
        """
        accumulated = (boundary_probs.detach().double() * rows.token_mask()).cumsum(dim=1)
        last_dense = torch.where(dense, rows.positions, -1).cummax(dim=1).values
        opened = rows.positions[:, 0]
        if state is None:
            if rows.segment is not None:
                before = torch.arange(dense.shape[1], device=dense.device) - rows.segment_positions - 1
                accumulated = accumulated - torch.where(before < 0, 0, accumulated.gather(1, before.clamp(min=0)))
            return accumulated, last_dense, opened
        stored = state.data("sampled")
        if stored is not None:
            past = state.lengths > 0
            last = (state.lengths - 1).clamp(min=0).view(-1, 1, 1, 1).expand(-1, 1, 1, 2)
            accumulated_before, dense_before = stored.gather(2, last)[:, 0, 0].unbind(dim=-1)
            accumulated = accumulated + torch.where(past, accumulated_before, 0)[:, None]
            dense_before = torch.where(past, dense_before.long(), -1)
            last_dense = torch.maximum(last_dense, dense_before[:, None])
            opened = torch.where(past, opened - (opened - 1 - dense_before) % self.longest, opened)
        state.append("sampled", torch.stack([accumulated, last_dense.double()], dim=-1).unsqueeze(1))
        return accumulated, last_dense, opened

    def _pool(
        self,
        states: torch.Tensor,
        boundary_probs: torch.Tensor,
        layout: EntityLayout,
        rows: RowLayout,
        opened: torch.Tensor,
        state: FlowCacheLayer | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean state of each entity's samples, weighted by their boundary_probs, `[B, E, D]`, and their number `[B, E]`."""
        batch, length = layout.places.shape
        weight = boundary_probs.clamp(min=MIN_WEIGHT).unsqueeze(-1)
        content = torch.cat([weight * states.to(weight.dtype), weight, torch.ones_like(weight)], dim=-1)
        entity = layout.completed - layout.completes().long()
        if rows.segment is not None and length:
            # What is open when a segment ends is no part of the next one's first entity.
            first = layout.places - layout.of_samples(rows.segment_positions)
            place = torch.arange(entity.shape[1], device=entity.device)
            own = first.gather(1, entity.clamp(max=length - 1)) <= place
            entity = torch.where(own, entity, length)
        if state is not None:
            before = self.longest - 1
            content = state.roll("open", content, before)
            place = rows.positions[:, :1] + torch.arange(-before, 0, device=entity.device)
            entity = torch.cat([torch.where(place >= opened[:, None], 0, length), entity], dim=1)
        row = torch.arange(batch, device=entity.device)[:, None] * (length + 1)
        sums = content.new_zeros(batch * (length + 1), content.shape[-1])
        sums = sums.index_add(0, (row + entity.clamp(max=length)).flatten(), content.flatten(0, 1))
        sums = sums.unflatten(0, (batch, length + 1))[:, :length]
        pooled = sums[..., :-2] / sums[..., -2:-1].clamp(min=MIN_WEIGHT)
        return pooled.to(states.dtype), sums[..., -1].detach()

    def ratio_loss(self, sampled: SampledEntities, rows: RowLayout) -> torch.Tensor:
        """How far each row is from `entity_rate`, `[B]`, 0 where it has it (H-Net's ratio loss, less its minimum).

        N/(N − 1) · ((N − 1) F G + (1 − F)(1 − G)) − 1, N the samples per entity that are wanted, F the share of
        samples that complete one, which has no gradient, G their mean boundary_probs.
        """
        counts = rows.token_mask().sum(dim=1).clamp(min=1)
        share = sampled.layout.completed[:, -1] / counts
        mean = (sampled.boundary_probs * rows.token_mask()).sum(dim=1) / counts
        wanted = 1 / self.rate
        return wanted / (wanted - 1) * ((wanted - 1) * share * mean + (1 - share) * (1 - mean)) - 1


def _missed(flow: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    return (F.normalize(following.detach().to(flow.dtype), dim=-1) - flow).square().sum(dim=-1)


def lay_entities(completes: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None) -> EntityLayout:
    """The layout of entities that samples complete, bool `[B, M]`; `state` is of a layer over entities or None."""
    completed = completes.long().cumsum(dim=1)
    counts, samples = completed[:, -1], torch.arange(completes.shape[1], device=completes.device)
    length = int(counts.max())
    at = torch.where(completes, completed - 1, length)
    places = completed.new_zeros(len(counts), length + 1).scatter(1, at, samples.expand_as(at))[:, :length]
    index = torch.arange(length, device=places.device).expand_as(places)
    if state is not None:
        index = index + state.lengths[:, None]
    columns, counts = rows.pad(completes), None if bool((counts == length).all()) else counts
    layout = EntityLayout(RowLayout(columns, None, counts, index, index, None), places, completed)
    if rows.segment is not None:
        # The first sample of a segment completes an entity.
        starts = layout.of_samples(rows.segment_positions) == 0
        first = torch.where(starts, index, 0).cummax(dim=1).values
        entity_rows = RowLayout(columns, None, counts, index, index - first, starts.long().cumsum(dim=1) - 1)
        layout = EntityLayout(entity_rows, places, completed)
    return layout


def sinusoidal_features(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """sin and cos of x at every wavelength: float64 `[...]` → `[..., F]`, bounded however far x has come."""
    angles = x.unsqueeze(-1) * (2 * math.pi / torch.tensor(WAVELENGTHS, dtype=x.dtype, device=x.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


class PackedEntities:
    """Entities of all rows one behind the other in one row, each row (or each of its segments) a segment of it.

    Attributes:
        rows: `[1, real ones of all rows]`.
        place: int64, of the same shape, an entity's place in the row it comes from.
    """

    def __init__(self, rows: RowLayout):
        self.shape = rows.positions.shape
        self.chosen = rows.token_mask().flatten().nonzero()[:, 0]
        reach = self.pack(rows.segment_positions)
        index = torch.arange(len(self.chosen), device=reach.device)[None]
        self.place = self.pack(rows.positions)
        self.rows = RowLayout(None, None, None, index, reach, (reach == 0).long().cumsum(dim=1) - 1)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, E, ...]` → `[1, real ones of all rows, ...]`."""
        return x.flatten(0, 1).index_select(0, self.chosen)[None]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """The way back, zero where there is no entity."""
        laid = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return laid.index_copy(0, self.chosen, x[0]).unflatten(0, self.shape)


def should_pack(rows: RowLayout) -> bool:
    """Whether a fifth of the places or more hold no entity."""
    return rows.lengths is not None and 5 * int(rows.lengths.sum()) <= 4 * rows.positions.numel()


class Dechunking(nn.Module):
    """Entities back to samples: each sample takes in the newest entity, smoothed by its boundary_probs."""

    def forward(
        self, samples: torch.Tensor, entities: torch.Tensor, sampled: SampledEntities, state: FlowCacheLayer | None
    ) -> torch.Tensor:
        """
        Args:
            samples: `[B, M, D]`, what is added to.
            entities: `[B, E, D]`.
            state: of a layer over entities, or None.
        """
        layout, boundary_probs = sampled.layout, sampled.boundary_probs
        before = None if state is None else state.data("smoothed")
        last = entities.new_zeros(entities.shape[0], entities.shape[2]) if before is None else before[:, -1]
        last = last.to(boundary_probs.dtype)
        if entities.shape[1]:
            taken = layout.of_samples(boundary_probs).clamp(min=BOUNDARY).unsqueeze(-1)
            inputs = taken * entities.to(boundary_probs.dtype)
            inputs = torch.cat([inputs[:, :1] + (1 - taken[:, :1]) * last[:, None], inputs[:, 1:]], dim=1)
            smoothed = ema_scan((1 - taken)[..., None, :], inputs[..., None, :], SMOOTHED_OVER).squeeze(-2)
            if state is not None:
                state.roll("smoothed", smoothed, 1)
            last = torch.cat([last[:, None], smoothed], dim=1)
        else:
            last = last[:, None]
        newest = last.gather(1, layout.completed[..., None].expand_as(samples))
        chosen = torch.where(layout.completes(), boundary_probs, 1 - boundary_probs)
        straight_through = 1 + chosen - chosen.detach()
        return samples + (newest * straight_through.unsqueeze(-1)).to(samples.dtype)
