"""Entities of a field: spans of samples along a space-filling curve, short where the flow turns.

A learnt density d_i > 0 rises where the flow turns between neighbours (architecture, "Continuous entities").
Accumulated, D_i = Σ_{j≤i} d_j, it cuts the curve at whole numbers: entity k is what lies between D = k and D = k + 1.
A sample that a cut goes through belongs to both sides, to each by its share of the density, as in continuous
integrate-and-fire (Dong & Xu 2020, arXiv 1905.11235): so the density has a gradient.

Shape letters: B batch, N samples, E entities, S pieces of samples (N + E), c coordinate_dim, F features.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ..modules.linear import linear_in_weight_dtype
from ..ops.hilbert_curve import CURVE_SHIFTS, LAST_KEY, Box
from .configuration_dfn import DFNConfig

SMOOTHING = 2  # samples on each side along a curve whose turning is averaged
FIRST_EXPONENT = 0.5  # of the turning, which is a squared difference: densities that rise with the difference
FLOW_STD = 4.0  # the cosine is the same at any scale; large weights turn slowly, and borders with them
FIRST_FLOOR = 5e-5  # turning that is added everywhere


class FlowDensity(nn.Module):
    """d = (p̄ + floor)^exponent, p̄ the smoothed mean over neighbours of p = (1 − cos(f_i, f_j)) / 2.

    Neighbours are those side by side on one of several curves; f is a learnt map of the samples' states.
    """

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.flow_map = nn.Linear(config.hidden_size, config.num_attention_heads * config.position_dim, bias=False)
        self.flow_map.init_std = FLOW_STD
        self.log_floor = nn.Parameter(torch.empty(1))
        self.log_exponent = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        init.constant_(self.log_floor, torch.tensor(FIRST_FLOOR).log().item())
        init.constant_(self.log_exponent, torch.tensor(FIRST_EXPONENT).log().item())

    def forward(self, states: torch.Tensor, coordinates: torch.Tensor, real: torch.Tensor, box: Box) -> torch.Tensor:
        """
        Args:
            states: `[B, N, hidden_size]`, in the order of the box's own curve; coordinates: `[B, N, c]`.
            real: bool `[B, N]`, the first so many of each row.

        Returns:
            `[B, N]`, positive, in float32 or float64.
        """
        with torch.autocast(states.device.type, enabled=False):
            flow = linear_in_weight_dtype(self.flow_map, states.detach())
            flow = F.normalize(flow.to(torch.promote_types(flow.dtype, torch.float32)), dim=-1)
            turning = sum(self._along(flow, coordinates, real, box, shift) for shift in CURVE_SHIFTS)
            turning = turning / len(CURVE_SHIFTS)
            return (self.log_exponent.exp() * torch.log(turning + self.log_floor.exp())).exp().to(turning.dtype)

    def _along(self, flow, coordinates, real, box: Box, shift: float) -> torch.Tensor:
        if not shift:
            return smooth(direction_change(flow, real), real)
        order = box.keys(coordinates, shift).masked_fill(~real, LAST_KEY).argsort(dim=1, stable=True)
        turning = direction_change(flow.gather(1, order.unsqueeze(-1).expand_as(flow)), real)
        return torch.empty_like(turning).scatter(1, order, smooth(turning, real))


def direction_change(flow: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean of (1 − cos)/2 to the one before and the one behind, of unit vectors `[B, N, F]` → `[B, N]`."""
    pairs = real[:, 1:]
    # ‖f − g‖²/4 is (1 − cos)/2 of unit vectors, and exact where they are almost the same.
    turning = (flow[:, 1:] - flow[:, :-1]).square().sum(dim=-1) / 4 * pairs
    neighbors = F.pad(pairs, (1, 0)).to(flow.dtype) + F.pad(pairs, (0, 1))
    return (F.pad(turning, (1, 0)) + F.pad(turning, (0, 1))) / neighbors.clamp(min=1)


def smooth(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean of `[B, N]` over the real ones of `SMOOTHING` on each side and the place itself."""
    sums, counts = (
        F.avg_pool1d((y * real).unsqueeze(1), 2 * SMOOTHING + 1, stride=1, padding=SMOOTHING).squeeze(1)
        for y in (x, torch.ones_like(x))
    )
    return torch.where(real, sums / torch.where(real, counts, 1), 0)


def fill(density: torch.Tensor, real: torch.Tensor, num_entities: int) -> torch.Tensor:
    """The density scaled so that each row holds `num_entities`, and no sample more than one.

    What a sample would hold beyond one goes to the others, by water-filling.

    Args:
        density: `[B, N]`, positive where `real`, bool `[B, N]`, is True.

    Returns:
        float64 `[B, N]`; 1 at every real sample of a row that has no more than `num_entities`.
    """
    density = torch.where(real, density.double(), 0)
    counts = real.sum(dim=1, keepdim=True)
    few = counts <= num_entities
    with torch.no_grad():
        falling = density.sort(dim=1, descending=True).values
        rest = falling.flip(1).cumsum(dim=1).flip(1)
        scale = (num_entities - torch.arange(density.shape[1], device=density.device)) / rest.clamp(min=1e-300)
        full = (scale * falling > 1).long().cumprod(dim=1).sum(dim=1, keepdim=True)
        scale = scale.gather(1, full.clamp(max=density.shape[1] - 1))
        below = real & (scale * density < 1) & ~few
    room = num_entities - (real & ~below).sum(dim=1, keepdim=True)
    scale = room / (density * below).sum(dim=1, keepdim=True).clamp(min=1e-300)
    return torch.where(below, scale * density, real.double())


@dataclass(frozen=True)
class Spans:
    """Samples along the curve, cut into the pieces that lie in one entity each.

    Attributes:
        sample, entity: int64 `[B, S]`, of each piece.
        share: `[B, S]`, its density: 1 in all of an entity.
        mass: `[B, S]`, its part of the sample: 1 in all of a sample.
        real: bool `[B, E]`, which entities there are: the first so many of each row.
    """

    sample: torch.Tensor
    entity: torch.Tensor
    share: torch.Tensor
    mass: torch.Tensor
    real: torch.Tensor

    def of_samples(self, x: torch.Tensor) -> torch.Tensor:
        """Features of samples `[B, N, F]` → of pieces `[B, S, F]`."""
        return x.gather(1, self.sample.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def of_entities(self, x: torch.Tensor) -> torch.Tensor:
        """Features of entities `[B, E, F]` → of pieces `[B, S, F]`."""
        return x.gather(1, self.entity.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """Sums over each entity's pieces, `[B, S, F]` → `[B, E, F]`."""
        sums = x.new_zeros(x.shape[0], self.real.shape[1], x.shape[-1])
        return sums.scatter_add(1, self.entity.unsqueeze(-1).expand_as(x), x)

    def means(self, x: torch.Tensor) -> torch.Tensor:
        """Means over each entity's samples, `[B, S, F]` → `[B, E, F]`; 0 where there is no entity."""
        mass = self.mass.unsqueeze(-1)
        return self.sums(x * mass) / self.sums(mass).clamp(min=torch.finfo(mass.dtype).tiny)


def cut(density: torch.Tensor, real: torch.Tensor, num_entities: int, dtype: torch.dtype) -> Spans:
    """Cut the curve where the accumulated density is a whole number.

    Args:
        density: float64 `[B, N]` from `fill`.
        dtype: of the pieces' shares and masses.
    """
    batch, length = density.shape
    counts = real.sum(dim=1, keepdim=True)
    entities = counts.clamp(max=num_entities)
    borders = torch.arange(1, num_entities + 1, dtype=torch.float64, device=density.device).expand(batch, -1)
    ends, place = torch.cat([density.cumsum(dim=1), borders], dim=1).sort(dim=1, stable=True)
    share = ends.diff(dim=1, prepend=ends.new_zeros(batch, 1))
    is_sample = (place < length).long()
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
    """What entities are before any layer.

    Attributes:
        coordinates: `[B, E, c]` and values: `[B, E, v]`, means of their samples'.
        scale: `[B, E, 1]`, how far each reaches.
        log_mass: `[B, E]`, log of how many samples each stands for; 0 where there is none.
    """

    coordinates: torch.Tensor
    values: torch.Tensor
    scale: torch.Tensor
    log_mass: torch.Tensor


def place_entities(spans: Spans, coordinates: torch.Tensor, values: torch.Tensor, box: Box) -> PlacedEntities:
    """The entities of samples with coordinates `[B, N, c]` and values `[B, N, v]`.

    An entity reaches as far as its samples spread and the nearer of its neighbours along the curve lies:
    scale² = E|x − c_k|² + min(|c_k − c_k−1|², |c_k − c_k+1|²).
    """
    mass = spans.sums(spans.mass.unsqueeze(-1)).squeeze(-1)
    samples = spans.of_samples(coordinates)
    centre, mean = spans.means(samples), spans.means(spans.of_samples(values))
    spread = spans.means((samples - spans.of_entities(centre)).square().sum(dim=-1, keepdim=True))
    steps = centre.diff(dim=1).square().sum(dim=-1, keepdim=True).masked_fill(~spans.real[:, 1:, None], torch.inf)
    nearer = torch.minimum(*(F.pad(steps, (0, 0, *side), value=torch.inf) for side in ((1, 0), (0, 1))))
    edge = box.edge.to(spread.dtype)
    least = torch.where(spans.real.sum(dim=1).view(-1, 1, 1) > 1, 1e-6 * edge, edge)  # where samples share a place
    scale = torch.maximum(spread + torch.where(nearer.isinf(), 0, nearer), least.square()).sqrt()
    return PlacedEntities(centre, mean, scale, torch.where(spans.real, mass, 1).log())
