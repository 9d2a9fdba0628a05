"""Sampling of a field into entities: spans of samples along a space-filling curve (docs/models/dfn.md, Fields).

A learnt density d_i > 0, in entities per sample, is high where the flow of neighbouring samples differs. The
cumulative density D_i = Σ_{j≤i} d_j cuts the curve at whole numbers: entity k covers D from k to k + 1. A sample that
contains a cut belongs to both entities in proportion to its density on either side, as in continuous
integrate-and-fire (Dong & Xu 2020, arXiv 1905.11235). The density therefore has a gradient.

Shape letters: B batch, N samples, E entities, S pieces of samples (N + E), c coordinate_dim, v value_dim, F features.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ..modules.linear import linear_in_weight_dtype
from ..ops.hilbert_curve import CURVE_SHIFTS, LAST_KEY, Box
from .configuration_dfn import DFNConfig

SMOOTHING = 2  # samples on each side, along a curve, in the moving average of the direction change
INITIAL_EXPONENT = 0.5  # of the direction change, a squared difference: the density starts linear in the difference
FLOW_STD = 4.0  # cosines do not depend on the scale; with large weights they change slowly during training
INITIAL_FLOOR = 5e-5  # added to the direction change, so that the density is positive everywhere


class FlowDensity(nn.Module):
    """Density of entities per sample, up to a factor: d = (p̄ + floor)^exponent.

    p̄_i is the moving average of the mean of p_ij = (1 − cos(f_i, f_j)) / 2 over the samples j next to i on a Hilbert
    curve, averaged over several curves. f is a learnt linear map of the samples' states, which get no gradient.
    """

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.flow_map = nn.Linear(config.hidden_size, config.num_attention_heads * config.position_dim, bias=False)
        self.flow_map.init_std = FLOW_STD  # type: ignore[assignment]  # torch declares tensors and modules only
        self.log_floor = nn.Parameter(torch.empty(1))
        self.log_exponent = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        """Set floor and exponent to their initial values."""
        init.constant_(self.log_floor, torch.tensor(INITIAL_FLOOR).log().item())
        init.constant_(self.log_exponent, torch.tensor(INITIAL_EXPONENT).log().item())

    def forward(self, states: torch.Tensor, coordinates: torch.Tensor, real: torch.Tensor, box: Box) -> torch.Tensor:
        """
        Args:
            states: `[B, N, hidden_size]`, in the order of the box's unshifted curve.
            coordinates: `[B, N, c]`.
            real: bool `[B, N]`, True where a sample exists; these come first in each row.
            box: bounding box of each row's coordinates.

        Returns:
            `[B, N]`, positive, in float32 or float64.
        """
        with torch.autocast(states.device.type, enabled=False):
            flow = linear_in_weight_dtype(self.flow_map, states.detach())
            flow = F.normalize(flow.to(torch.promote_types(flow.dtype, torch.float32)), dim=-1)
            changes = (self._change_along(flow, coordinates, real, box, shift) for shift in CURVE_SHIFTS)
            change: torch.Tensor = sum(changes) / len(CURVE_SHIFTS)  # type: ignore[assignment]  # at least one curve
            return (self.log_exponent.exp() * torch.log(change + self.log_floor.exp())).exp().to(change.dtype)

    def _change_along(self, flow, coordinates, real, box: Box, shift: float) -> torch.Tensor:
        """Smoothed direction change along the curve with this shift, `[B, N]`, in the order of the samples."""
        if not shift:
            return smooth(direction_change(flow, real), real)
        order = box.keys(coordinates, shift).masked_fill(~real, LAST_KEY).argsort(dim=1, stable=True)
        change = direction_change(flow.gather(1, order.unsqueeze(-1).expand_as(flow)), real)
        return torch.empty_like(change).scatter(1, order, smooth(change, real))


def direction_change(flow: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean of (1 − cos)/2 between each unit vector `[B, N, F]` and the previous and next one: `[B, N]`."""
    pairs = real[:, 1:]
    # For unit vectors ‖f − g‖²/4 equals (1 − cos)/2, without cancellation when they are nearly equal.
    change = (flow[:, 1:] - flow[:, :-1]).square().sum(dim=-1) / 4 * pairs
    neighbors = F.pad(pairs, (1, 0)).to(flow.dtype) + F.pad(pairs, (0, 1))
    return (F.pad(change, (1, 0)) + F.pad(change, (0, 1))) / neighbors.clamp(min=1)


def smooth(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Moving average of `[B, N]` over `SMOOTHING` samples on each side, among those where `real` is True."""
    sums, counts = (
        F.avg_pool1d((y * real).unsqueeze(1), 2 * SMOOTHING + 1, stride=1, padding=SMOOTHING).squeeze(1)
        for y in (x, torch.ones_like(x))
    )
    return torch.where(real, sums / torch.where(real, counts, 1), 0)


def normalize_density(density: torch.Tensor, real: torch.Tensor, num_entities: int) -> torch.Tensor:
    """Scale a density so that each row sums to `num_entities` and no sample exceeds 1.

    The excess of samples above 1 is distributed over the others (water-filling).

    Args:
        density: `[B, N]`, positive where `real`, bool `[B, N]`, is True.

    Returns:
        float64 `[B, N]`; 1 at every sample of a row that has at most `num_entities` samples.
    """
    density = torch.where(real, density.double(), 0)
    counts = real.sum(dim=1, keepdim=True)
    one_each = counts <= num_entities
    with torch.no_grad():
        descending = density.sort(dim=1, descending=True).values
        rest = descending.flip(1).cumsum(dim=1).flip(1)
        scale = (num_entities - torch.arange(density.shape[1], device=density.device)) / rest.clamp(min=1e-300)
        full = (scale * descending > 1).long().cumprod(dim=1).sum(dim=1, keepdim=True)
        scale = scale.gather(1, full.clamp(max=density.shape[1] - 1))
        below = real & (scale * density < 1) & ~one_each
    room = num_entities - (real & ~below).sum(dim=1, keepdim=True)
    scale = room / (density * below).sum(dim=1, keepdim=True).clamp(min=1e-300)
    return torch.where(below, scale * density, real.double())


@dataclass(frozen=True)
class Spans:
    """Samples along the curve, split at the cuts into pieces that each belong to one entity.

    Attributes:
        sample, entity: int64 `[B, S]`, the sample and the entity of each piece.
        share: `[B, S]`, the piece's fraction of its entity: pieces of an entity sum to 1.
        mass: `[B, S]`, the piece's fraction of its sample: pieces of a sample sum to 1.
        real: bool `[B, E]`, True where an entity exists; these come first in each row.
    """

    sample: torch.Tensor
    entity: torch.Tensor
    share: torch.Tensor
    mass: torch.Tensor
    real: torch.Tensor

    def of_samples(self, x: torch.Tensor) -> torch.Tensor:
        """Gather features of samples `[B, N, F]` for the pieces, `[B, S, F]`."""
        return x.gather(1, self.sample.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def of_entities(self, x: torch.Tensor) -> torch.Tensor:
        """Gather features of entities `[B, E, F]` for the pieces, `[B, S, F]`."""
        return x.gather(1, self.entity.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over each entity's pieces: `[B, S, F]` → `[B, E, F]`."""
        sums = x.new_zeros(x.shape[0], self.real.shape[1], x.shape[-1])
        return sums.scatter_add(1, self.entity.unsqueeze(-1).expand_as(x), x)

    def means(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over each entity's pieces, weighted by mass: `[B, S, F]` → `[B, E, F]`; 0 where there is no entity."""
        mass = self.mass.unsqueeze(-1)
        return self.sums(x * mass) / self.sums(mass).clamp(min=torch.finfo(mass.dtype).tiny)


def cut_spans(density: torch.Tensor, real: torch.Tensor, num_entities: int, dtype: torch.dtype) -> Spans:
    """Cut the curve where the cumulative density is a whole number.

    Args:
        density: float64 `[B, N]`, from `normalize_density`.
        real: bool `[B, N]`, True where a sample exists.
        dtype: dtype of `Spans.share` and `Spans.mass`.
    """
    batch, length = density.shape
    counts = real.sum(dim=1, keepdim=True)
    entities = counts.clamp(max=num_entities)
    borders = torch.arange(1, num_entities + 1, dtype=torch.float64, device=density.device).expand(batch, -1)
    ends, source = torch.cat([density.cumsum(dim=1), borders], dim=1).sort(dim=1, stable=True)
    share = ends.diff(dim=1, prepend=ends.new_zeros(batch, 1))
    is_sample = (source < length).long()
    sample = is_sample.cumsum(dim=1) - is_sample
    inside = sample < counts
    entity = torch.minimum(torch.arange(length + num_entities, device=density.device) - sample, entities - 1)
    sample = sample.clamp(max=length - 1)
    share = torch.where(inside, share, 0)
    mass = share / torch.where(inside, density.gather(1, sample), 1)
    exists = torch.arange(num_entities, device=density.device) < entities
    return Spans(sample, entity, share.to(dtype), mass.to(dtype), exists)


@dataclass(frozen=True)
class PlacedEntities:
    """Geometry and mean values of the entities, before any layer.

    Attributes:
        coordinates: `[B, E, c]`, mean of the samples' coordinates.
        values: `[B, E, v]`, mean of the samples' values.
        scale: `[B, E, 1]`, distance over which the entity acts, in units of the coordinates.
        log_mass: `[B, E]`, log of the number of samples; 0 where there is no entity.
    """

    coordinates: torch.Tensor
    values: torch.Tensor
    scale: torch.Tensor
    log_mass: torch.Tensor


def place_entities(spans: Spans, coordinates: torch.Tensor, values: torch.Tensor, box: Box) -> PlacedEntities:
    """Place the entities of samples with coordinates `[B, N, c]` and values `[B, N, v]`.

    scale² = E|x − c_k|² + min(|c_k − c_k−1|², |c_k − c_k+1|²): variance of the samples plus squared distance to the
    nearer neighbour along the curve.
    """
    mass = spans.sums(spans.mass.unsqueeze(-1)).squeeze(-1)
    samples = spans.of_samples(coordinates)
    centre, mean = spans.means(samples), spans.means(spans.of_samples(values))
    variance = spans.means((samples - spans.of_entities(centre)).square().sum(dim=-1, keepdim=True))
    steps = centre.diff(dim=1).square().sum(dim=-1, keepdim=True).masked_fill(~spans.real[:, 1:, None], torch.inf)
    nearer = torch.minimum(*(F.pad(steps, (0, 0, *side), value=torch.inf) for side in ((1, 0), (0, 1))))
    edge = box.edge.to(variance.dtype)
    # The lower bound applies where all samples of an entity and its neighbour have equal coordinates.
    min_scale = torch.where(spans.real.sum(dim=1).view(-1, 1, 1) > 1, 1e-6 * edge, edge)
    scale = torch.maximum(variance + torch.where(nearer.isinf(), 0, nearer), min_scale.square()).sqrt()
    return PlacedEntities(centre, mean, scale, torch.where(spans.real, mass, 1).log())
