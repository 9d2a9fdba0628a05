"""Dynamic chunking: spans of bytes become entities, and entities are spread back to bytes.

Dynamic Flow Networks (Stürtz), §2.1. A linear map of the byte-level state, f = W RMSNorm(h), predicts the next byte's
embedding x, normalised to length 1, with the loss ‖x_{t+1} − f_t‖². The minimiser is the mean of the possible next
embeddings: long where the next byte is certain, short where it is uncertain, since E‖x_{t+1} − f_t‖² = 1 − ‖f_t‖².
A short prediction marks high information density. The boundary probability is

    d_t = sigmoid(β (θ − ‖f_t‖²))        θ, β learnt; 1 at the start of a segment.

A byte with d ≥ 1/2 completes an entity, which covers the span of bytes since the previous entity. Its state is the
mean of the byte states weighted by d, its coordinate the sum of d up to the entity's last byte, its mass the number of
bytes. It is visible from its last byte t on:

    z_e = D_e x_e + (1 − D_e) z_{e−1}        D_e: d at the last byte of e; x_e: output of the entity-level DFN layers
    h_t ← h_t + z_e(t)                       e(t): the newest entity completed at or before t

As in H-Net (Hwang et al. 2025), boundary decisions get their gradient from a straight-through estimator. H-Net places
boundaries where consecutive states are dissimilar; placing them where the next byte is uncertain follows BLT (Pagnoni
et al. 2024), which uses a separate model for it.

Shape letters: B batch, M samples (bytes) of this call, E entities completed in it, D features, F coordinate features.
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
from ..modules.outputs import add_grad_only
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout
from ..ops.chunking import apply_chunked
from ..ops.higher_order import is_vmapped
from .configuration_dfn import DFNConfig

BOUNDARY_THRESHOLD = 0.5  # boundary probability at and above which a sample completes an entity
INITIAL_STEEPNESS = 20.0  # β
INITIAL_THRESHOLD = 0.2  # θ
MIN_WEIGHT = 1e-3  # lower bound on the weight of a sample in its entity's state
SMOOTHING_REACH = 64  # entities: D ≥ 1/2, so an older entity's weight is below 2^-64
WAVELENGTHS = tuple(4.0**power for power in range(1, 9))  # of the entity coordinate, which grows by about 1 per entity
COORDINATE_FEATURES = 2 * len(WAVELENGTHS)


@dataclass(frozen=True)
class EntityLayout:
    """Correspondence between the entities completed in one call and its samples.

    Attributes:
        rows: layout of the entities, left-aligned; its `mask` is True at columns whose sample completes an entity.
        last_samples: int64 `[B, E]`, index of the sample that completes the entity; 0 where there is no entity.
        completed: int64 `[B, M]`, number of entities of this call completed at or before the sample.
    """

    rows: RowLayout
    last_samples: torch.Tensor
    completed: torch.Tensor

    def gather_from_samples(self, x: torch.Tensor) -> torch.Tensor:
        """Values `[B, M, ...]` at the samples that complete the entities, `[B, E, ...]`."""
        indices = self.last_samples.view(*self.last_samples.shape, *(1,) * (x.dim() - 2))
        return x.gather(1, indices.expand(-1, -1, *x.shape[2:]))

    def completes_entity(self) -> torch.Tensor:
        """Bool `[B, M]`, True at samples that complete an entity."""
        return F.pad(self.completed, (1, 0)).diff(dim=1) > 0

    def scatter_to_samples(self, x: torch.Tensor) -> torch.Tensor:
        """Entities `[B, E, D]` at the samples that complete them `[B, M, D]`; zero at the other samples."""
        if x.shape[1] == 0:
            return x.new_zeros(*self.completed.shape, x.shape[2])
        newest = x.gather(1, (self.completed - 1).clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
        return newest * self.completes_entity()[..., None]


@dataclass(frozen=True)
class SampledEntities:
    """Entities made from the samples of one call.

    Attributes:
        states: `[B, E, D]`.
        coordinates: `[B, E, F]`, features of the accumulated boundary probability.
        log_mass: `[B, E]`, log of the number of samples.
        boundary_probs: `[B, M]`, of the samples, float32 or float64; 1 with `entity_sampling="uniform"`.
        layout: correspondence between entities and samples.
        prediction_loss: `[B]`, squared error of the predicted next embedding, averaged over the row's samples of this
            call that have a next one; None if no embeddings were given.
    """

    states: torch.Tensor
    coordinates: torch.Tensor
    log_mass: torch.Tensor
    boundary_probs: torch.Tensor
    layout: EntityLayout
    prediction_loss: torch.Tensor | None


class EntitySampling(nn.Module):
    """Pools spans of samples into entities.

    With `entity_sampling="adaptive"` a span ends where the next sample is uncertain, and at `max_entity_length`
    samples. With "uniform" all spans have round(1 / `entity_rate`) samples.

    Attributes:
        scales: names of the parameters that are kept in float32.
    """

    scales = ("threshold", "log_steepness")

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.entity_rate = config.entity_rate
        self.adaptive = config.entity_sampling == "adaptive"
        self.max_length = config.max_entity_length if self.adaptive else round(1 / config.entity_rate)
        self.flow_map = None
        if self.adaptive:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.flow_map = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.flow_map.init_std = INITIAL_THRESHOLD**0.5 / config.hidden_size  # ‖f‖² starts near θ
            self.threshold = nn.Parameter(torch.empty(1, dtype=torch.float32))
            self.log_steepness = nn.Parameter(torch.empty(1, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set θ and β to their initial values."""
        if self.adaptive:
            init.constant_(self.threshold, INITIAL_THRESHOLD)
            init.constant_(self.log_steepness, math.log(INITIAL_STEEPNESS))

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
            states: `[B, M, D]`, of the samples. They must be causal if `embeddings` are given.
            rows: layout of the samples.
            state: cache of a sample-level layer, or None.
            entity_state: cache of an entity-level layer, or None.
            embeddings: `[B, M, D]`, targets of the prediction, detached; None for no prediction loss.
        """
        starts = rows.segment_positions == 0
        boundary_probs = torch.ones_like(starts, dtype=torch.promote_types(states.dtype, torch.float32))
        prediction_loss, boundaries = None, starts
        if self.adaptive:
            flow = self._flow(states, boundary_probs.dtype)
            boundary_probs = self._boundary_probs(flow, starts)
            prediction_loss = None if embeddings is None else self._prediction_loss(flow, embeddings, rows)
            boundaries = starts | (boundary_probs >= BOUNDARY_THRESHOLD)
        accumulated, last_boundary, open_start = self._segment_history(boundary_probs, boundaries, rows, state)
        completes = ((rows.positions - last_boundary) % self.max_length == 0) & rows.token_mask()
        layout = make_entity_layout(completes, rows, entity_state)
        pooled, mass = self._pool(states, boundary_probs, layout, rows, open_start, state)
        coordinates = sinusoidal_features(layout.gather_from_samples(accumulated), pooled.dtype)
        return SampledEntities(pooled, coordinates, mass.clamp(min=1).log(), boundary_probs, layout, prediction_loss)

    def _flow(self, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Predicted embedding of the next sample, `[B, M, D]`."""
        with torch.autocast(states.device.type, enabled=False):
            return apply_chunked(
                lambda chunk: linear_in_weight_dtype(self.flow_map, self.norm(chunk)).to(dtype), states
            )

    def _boundary_probs(self, flow: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Return d, `[B, M]`, of predictions `[B, M, D]`; `starts`, bool `[B, M]`, is True where a segment starts."""
        steepness, threshold = self.log_steepness.to(flow.dtype).exp(), self.threshold.to(flow.dtype)
        return torch.where(starts, 1, (steepness * (threshold - flow.square().sum(dim=-1))).sigmoid())

    def _prediction_loss(self, flow: torch.Tensor, embeddings: torch.Tensor, rows: RowLayout) -> torch.Tensor:
        """Mean prediction error of each row, `[B]`; 0 for a row without two consecutive samples of a segment."""
        has_previous = (rows.token_mask() & (rows.segment_positions > 0))[:, 1:]
        errors = apply_chunked(prediction_error, flow[:, :-1], embeddings[:, 1:])
        return (errors * has_previous).sum(dim=1) / has_previous.sum(dim=1).clamp(min=1)

    def _segment_history(
        self, boundary_probs: torch.Tensor, boundaries: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Summarise the segment up to each sample, earlier calls included.

        Args:
            boundaries: bool `[B, M]`, True at segment starts and where the boundary probability reaches 1/2.

        Returns:
            (boundary probability accumulated in the segment, float64 `[B, M]`; position of the last boundary, int64
            `[B, M]`; first position of the span that is open when the call starts, int64 `[B]`).
        """
        accumulated = (boundary_probs.detach().double() * rows.token_mask()).cumsum(dim=1)
        last_boundary = torch.where(boundaries, rows.positions, -1).cummax(dim=1).values
        open_start = rows.positions[:, 0]
        if state is None:
            if rows.segment is not None:
                indices = torch.arange(boundaries.shape[1], device=boundaries.device)
                before = indices - rows.segment_positions - 1
                accumulated = accumulated - torch.where(before < 0, 0, accumulated.gather(1, before.clamp(min=0)))
            return accumulated, last_boundary, open_start
        stored = state.data("sampled")
        if stored is not None:
            has_past = state.lengths > 0
            last = (state.lengths - 1).clamp(min=0).view(-1, 1, 1, 1).expand(-1, 1, 1, 2)
            accumulated_before, boundary_before = stored.gather(2, last)[:, 0, 0].unbind(dim=-1)
            accumulated = accumulated + torch.where(has_past, accumulated_before, 0)[:, None]
            boundary_before = torch.where(has_past, boundary_before.long(), -1)
            last_boundary = torch.maximum(last_boundary, boundary_before[:, None])
            span_so_far = (open_start - 1 - boundary_before) % self.max_length
            open_start = torch.where(has_past, open_start - span_so_far, open_start)
        state.append("sampled", torch.stack([accumulated, last_boundary.double()], dim=-1).unsqueeze(1))
        return accumulated, last_boundary, open_start

    def _pool(
        self,
        states: torch.Tensor,
        boundary_probs: torch.Tensor,
        layout: EntityLayout,
        rows: RowLayout,
        open_start: torch.Tensor,
        state: FlowCacheLayer | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Average the states of each entity's samples, weighted by boundary probability.

        Returns:
            (entity states `[B, E, D]`, number of samples `[B, E]`).
        """
        batch, length = layout.last_samples.shape
        weight = boundary_probs.clamp(min=MIN_WEIGHT).unsqueeze(-1)
        content = torch.cat([weight * states.to(weight.dtype), weight, torch.ones_like(weight)], dim=-1)
        entity = layout.completed - layout.completes_entity().long()
        if rows.segment is not None and length:
            # Samples of a span that its segment leaves incomplete do not count for the next segment's first entity.
            first = layout.last_samples - layout.gather_from_samples(rows.segment_positions)
            indices = torch.arange(entity.shape[1], device=entity.device)
            in_segment = first.gather(1, entity.clamp(max=length - 1)) <= indices
            entity = torch.where(in_segment, entity, length)
        if state is not None:
            before = self.max_length - 1
            content = state.roll("open", content, before)
            positions = rows.positions[:, :1] + torch.arange(-before, 0, device=entity.device)
            entity = torch.cat([torch.where(positions >= open_start[:, None], 0, length), entity], dim=1)
        # One extra entity per row collects the samples that belong to no completed entity.
        row = torch.arange(batch, device=entity.device)[:, None] * (length + 1)
        sums = content.new_zeros(batch * (length + 1), content.shape[-1])
        sums = sums.index_add(0, (row + entity.clamp(max=length)).flatten(), content.flatten(0, 1))
        sums = sums.unflatten(0, (batch, length + 1))[:, :length]
        pooled = sums[..., :-2] / sums[..., -2:-1].clamp(min=MIN_WEIGHT)
        return pooled.to(states.dtype), sums[..., -1].detach()

    def ratio_loss(self, sampled: SampledEntities, rows: RowLayout) -> torch.Tensor:
        """H-Net's ratio loss minus its minimum, `[B]`: 0 for a row with `entity_rate` entities per sample.

        N/(N − 1) · ((N − 1) F G + (1 − F)(1 − G)) − 1, where N = 1 / `entity_rate`, F is the fraction of samples that
        complete an entity (no gradient) and G the mean boundary probability.
        """
        counts = rows.token_mask().sum(dim=1).clamp(min=1)
        fraction = sampled.layout.completed[:, -1] / counts
        mean = (sampled.boundary_probs * rows.token_mask()).sum(dim=1) / counts
        target = 1 / self.entity_rate
        return target / (target - 1) * ((target - 1) * fraction * mean + (1 - fraction) * (1 - mean)) - 1


def prediction_error(flow: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Squared distance of predictions `[B, M, D]` to the normalised next embeddings `[B, M, D]`: `[B, M]`."""
    return (F.normalize(following.detach().to(flow.dtype), dim=-1) - flow).square().sum(dim=-1)


def make_entity_layout(completes: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None) -> EntityLayout:
    """Lay out the entities of a call.

    Args:
        completes: bool `[B, M]`, True at samples that complete an entity.
        rows: layout of the samples.
        state: cache of an entity-level layer, or None.

    Raises:
        RuntimeError: called under `torch.func.vmap`.
    """
    if not torch.compiler.is_compiling() and is_vmapped(completes):
        raise RuntimeError(
            "torch.func.vmap does not support `entity_sampling`, because the number of entities depends on the row's "
            "content: call the model once per row."
        )
    completed = completes.long().cumsum(dim=1)
    counts, samples = completed[:, -1], torch.arange(completes.shape[1], device=completes.device)
    length = int(counts.max())
    entity = torch.where(completes, completed - 1, length)
    last_samples = completed.new_zeros(len(counts), length + 1)
    last_samples = last_samples.scatter(1, entity, samples.expand_as(entity))[:, :length]
    positions = torch.arange(length, device=last_samples.device).expand_as(last_samples)
    if state is not None:
        positions = positions + state.lengths[:, None]
    columns, counts = rows.pad(completes), None if bool((counts == length).all()) else counts
    layout = EntityLayout(RowLayout(columns, None, counts, positions, positions, None), last_samples, completed)
    if rows.segment is not None:
        # The first sample of a segment always completes an entity.
        starts = layout.gather_from_samples(rows.segment_positions) == 0
        first = torch.where(starts, positions, 0).cummax(dim=1).values
        segment = starts.long().cumsum(dim=1) - 1
        entity_rows = RowLayout(columns, None, counts, positions, positions - first, segment)
        layout = EntityLayout(entity_rows, last_samples, completed)
    return layout


def sinusoidal_features(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return sin and cos of x, float64 `[...]`, at every wavelength: `[..., F]`."""
    angles = x.unsqueeze(-1) * (2 * math.pi / torch.tensor(WAVELENGTHS, dtype=x.dtype, device=x.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


class PackedEntities:
    """The entities of all rows concatenated into one row without padding; each row or segment becomes a segment.

    Attributes:
        rows: layout of the packed row, `[1, number of entities]`.
        row_positions: int64 `[1, number of entities]`, position of each entity in its original row.
    """

    def __init__(self, rows: RowLayout):
        self.shape = rows.positions.shape
        self.indices = rows.token_mask().flatten().nonzero()[:, 0]
        segment_positions = self.pack(rows.segment_positions)
        positions = torch.arange(len(self.indices), device=segment_positions.device)[None]
        self.row_positions = self.pack(rows.positions)
        segment = (segment_positions == 0).long().cumsum(dim=1) - 1
        self.rows = RowLayout(None, None, None, positions, segment_positions, segment)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, E, ...]` → `[1, number of entities, ...]`."""
        return x.flatten(0, 1).index_select(0, self.indices)[None]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, number of entities, ...]` → `[B, E, ...]`, zero where there is no entity."""
        unpacked = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return unpacked.index_copy(0, self.indices, x[0]).unflatten(0, self.shape)


def should_pack(rows: RowLayout) -> bool:
    """Return whether at least a fifth of the padded entity rows is padding."""
    return rows.lengths is not None and 5 * int(rows.lengths.sum()) <= 4 * rows.positions.numel()


class Dechunking(nn.Module):
    """Adds to each sample the newest entity, smoothed by an exponential moving average over entities."""

    def forward(
        self, samples: torch.Tensor, entities: torch.Tensor, sampled: SampledEntities, state: FlowCacheLayer | None
    ) -> torch.Tensor:
        """
        Args:
            samples: `[B, M, D]`, states before chunking.
            entities: `[B, E, D]`, output of the entity-level layers.
            sampled: the entities as `EntitySampling` returned them.
            state: cache of an entity-level layer, or None.

        Returns:
            `[B, M, D]`.
        """
        layout, boundary_probs = sampled.layout, sampled.boundary_probs
        before = None if state is None else state.data("smoothed")
        last = entities.new_zeros(entities.shape[0], entities.shape[2]) if before is None else before[:, -1]
        last = last.to(boundary_probs.dtype)
        if entities.shape[1]:
            weight = layout.gather_from_samples(boundary_probs).clamp(min=BOUNDARY_THRESHOLD).unsqueeze(-1)
            inputs = weight * entities.to(boundary_probs.dtype)
            inputs = torch.cat([inputs[:, :1] + (1 - weight[:, :1]) * last[:, None], inputs[:, 1:]], dim=1)
            smoothed = ema_scan((1 - weight)[..., None, :], inputs[..., None, :], SMOOTHING_REACH).squeeze(-2)
            if state is not None:
                state.roll("smoothed", smoothed, 1)
            last = torch.cat([last[:, None], smoothed], dim=1)
        else:
            last = last[:, None]
        newest = last.gather(1, layout.completed[..., None].expand_as(samples))
        decision_probs = torch.where(layout.completes_entity(), boundary_probs, 1 - boundary_probs)
        straight_through = add_grad_only(1, decision_probs)
        return samples + (newest * straight_through.unsqueeze(-1)).to(samples.dtype)
