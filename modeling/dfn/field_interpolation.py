"""Values anywhere in a field, from the entities around: a Gaussian mixture of local waves.

    y(x) = Σ_j softmax_j(w_j − γ_j |δ_j|²) Σ_m a_jm φ_m(δ_j),   δ_j = (x − c_j) / scale_j

over the nearest entities j, distances counted in their own scale (architecture, "Fields"). φ are a constant and learnt
waves: random Fourier features, as of a kernel (Rahimi & Recht 2007). The states give γ, w and first amplitudes a; y is
linear in those, and a few steps of least squares with learnt lengths, as in SIRT (Gilbert 1972), give back to them
what they leave out at the samples that are given.

Shape letters: B batch, E entities, Q queries, K nearest entities, C candidates, M functions φ, c coordinate_dim,
v value_dim.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from ..modules.linear import linear_in_weight_dtype
from ..ops.chunking import apply_chunked
from ..ops.hilbert_curve import CURVE_SHIFTS, LAST_KEY, Box
from .configuration_dfn import DFNConfig

NUM_NEAREST = 4  # K, entities that a value is read from
NUM_WAVES = 16  # M is 1 and twice as many
FIRST_FREQUENCY = 5.0  # standard deviation, in radians per scale of an entity
FIRST_STEPS = (1.0, 2.0, 4.0)  # (1 − x)(1 − 2x)(1 − 4x) is small for x from 0.2 to 1, what SIRT's map makes of errors
CANDIDATES_PER_SIDE = 4  # of a query along each curve


class NearestEntities:
    """Finds the entities nearest to a query: those beside it on several Hilbert curves are candidates.

    Args:
        coordinates: `[B, E, c]`; scale: `[B, E, 1]`, in which the distance to each is counted.
        real: bool `[B, E]`, the first so many of each row.
    """

    def __init__(self, coordinates: torch.Tensor, scale: torch.Tensor, real: torch.Tensor):
        self.coordinates, self.scale = coordinates.detach(), scale.detach()
        self.counts = real.sum(dim=1).view(-1, 1, 1)
        self.box = Box.around(coordinates, real)
        self.curves = []
        for shift in CURVE_SHIFTS:
            keys = self.box.keys(coordinates, shift).masked_fill(~real, LAST_KEY)
            self.curves.append((shift, *keys.sort(dim=1, stable=True)))

    @torch.no_grad()
    def find(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries `[B, Q, c]` → int64 `[B, Q, K]`, −1 for none."""
        candidates = torch.cat([self._beside(queries, *curve) for curve in self.curves], dim=-1).sort(dim=-1).values
        twice = torch.zeros_like(candidates, dtype=torch.bool)
        twice[..., 1:] = candidates[..., 1:] == candidates[..., :-1]
        offsets = queries.unsqueeze(2) - take(self.coordinates, candidates)
        distances = (offsets / take(self.scale, candidates)).square().sum(dim=-1)
        distances = distances.masked_fill(twice | (candidates < 0), torch.inf)
        distances, best = distances.topk(min(NUM_NEAREST, candidates.shape[-1]), dim=-1, largest=False)
        return candidates.gather(-1, best).masked_fill(distances == torch.inf, -1)

    def _beside(self, queries, shift: float, keys, order) -> torch.Tensor:
        """The `CANDIDATES_PER_SIDE` entities before and behind each query on one curve, int64 `[B, Q, C]`."""
        place = torch.searchsorted(keys, self.box.keys(queries, shift)).unsqueeze(-1)
        place = place + torch.arange(-CANDIDATES_PER_SIDE, CANDIDATES_PER_SIDE, device=place.device)
        inside = (place >= 0) & (place < self.counts)
        found = order.gather(1, torch.where(inside, place, 0).flatten(1)).view_as(place)
        return found.masked_fill(~inside, -1)


def flat_places(places: torch.Tensor, length: int) -> torch.Tensor:
    """Places in rows of `length`, `[B, …]` → in all rows one behind the other, flat; −1 becomes any of the row."""
    rows = torch.arange(places.shape[0], device=places.device).view(-1, *(1,) * (places.dim() - 1)) * length
    return (places.clamp(min=0) + rows).flatten()


def take(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Entities `[B, E, F]` at places `[B, Q, K]` → `[B, Q, K, F]`; place −1 gives any."""
    taken = x.flatten(0, 1).index_select(0, flat_places(places, x.shape[1]))
    return taken.view(*places.shape, x.shape[-1])


class FourierBasis(nn.Module):
    """cos and sin of learnt waves over offsets, in units of an entity's scale; their squares sum to 1."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.frequency = nn.Linear(config.coordinate_dim, NUM_WAVES, bias=False)
        self.frequency.init_std = FIRST_FREQUENCY

    def forward(self, offsets: torch.Tensor) -> torch.Tensor:
        """`[..., c]` → `[..., 2 NUM_WAVES]`."""
        angles = linear_in_weight_dtype(self.frequency, offsets).to(offsets.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * NUM_WAVES**-0.5


@dataclass(frozen=True)
class Basis:
    """What a value at each of some places is made of: y is linear in the amplitudes of the entities found.

    Attributes:
        found: int64 `[B, Q, K]`.
        weights: `[B, Q, K]`, of the entities; they sum to 1.
        functions: `[B, Q, K, M]`.
    """

    found: torch.Tensor
    weights: torch.Tensor
    functions: torch.Tensor

    def values(self, amplitudes: torch.Tensor) -> torch.Tensor:
        """Amplitudes `[B, E, M, v]` → values `[B, Q, v]`."""
        return apply_chunked(lambda *basis: _mix(amplitudes, *basis), self.found, self.weights, self.functions)

    def gather_back(self, values: torch.Tensor, num_entities: int) -> torch.Tensor:
        """Values `[B, Q, v]` → `[B, E, M, v]`, the transpose of `values` over the sums of weights."""
        parts = apply_chunked(_spread, self.weights, self.functions, values)
        both = torch.cat([parts.flatten(3), self.weights.unsqueeze(-1)], dim=-1).flatten(0, 2)
        sums = both.new_zeros(values.shape[0] * num_entities, both.shape[-1])
        sums = sums.index_add(0, flat_places(self.found, num_entities), both)
        sums = sums.view(values.shape[0], num_entities, -1)
        mean = sums[..., :-1] / sums[..., -1:].clamp(min=torch.finfo(sums.dtype).tiny)
        return mean.unflatten(-1, parts.shape[3:])

    def masked(self, mask: torch.Tensor) -> "Basis":
        """Without the places where `mask`, bool `[B, Q]`, is False: entities weigh nothing there."""
        return Basis(self.found, self.weights * mask.unsqueeze(-1), self.functions)


def _mix(amplitudes, found, weights, functions) -> torch.Tensor:
    taken = take(amplitudes.flatten(2), found).unflatten(-1, amplitudes.shape[2:])
    return ((weights.unsqueeze(-1) * functions).unsqueeze(-1) * taken).sum(dim=(2, 3))


def _spread(weights, functions, values) -> torch.Tensor:
    return (weights.unsqueeze(-1) * functions).unsqueeze(-1) * values[:, :, None, None]


class GaussianInterpolation(nn.Module):
    """Values at any coordinates, from the states of the nearest entities and the samples that are given."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.value_dim = config.value_dim
        self.waves = FourierBasis(config)
        self.amplitude_proj = nn.Linear(config.hidden_size, config.value_dim * 2 * NUM_WAVES, bias=False)
        self.amplitude_proj.init_std = 0.1 * config.hidden_size**-0.5
        self.shape_proj = nn.Linear(config.hidden_size, 2)  # log γ and w
        self.shape_proj.init_std = 0.1 * config.hidden_size**-0.5
        self.log_steps = nn.Parameter(torch.empty(len(FIRST_STEPS)))

    def reset_parameters(self) -> None:
        init.copy_(self.log_steps, torch.tensor(FIRST_STEPS).log())

    def forward(
        self,
        queries: torch.Tensor | None,
        states: torch.Tensor,
        coordinates: torch.Tensor,
        scale: torch.Tensor,
        mean: torch.Tensor,
        real: torch.Tensor,
        samples: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            queries: `[B, Q, c]`; None for the samples.
            states: `[B, E, hidden_size]`; coordinates: `[B, E, c]`; scale: `[B, E, 1]`; mean: of their samples'
                values, `[B, E, v]`; real: bool `[B, E]`, the first so many of each row.
            samples: `[B, N, c]`; values: `[B, N, v]`; mask: bool `[B, N]`, which are given; the others are finite.

        Returns:
            `[B, Q, v]`.
        """
        nearest = NearestEntities(coordinates, scale, real)
        with torch.autocast(states.device.type, enabled=False):
            shape = torch.cat([coordinates, scale, linear_in_weight_dtype(self.shape_proj, states)], dim=-1)
            waves = linear_in_weight_dtype(self.amplitude_proj, states).unflatten(-1, (-1, self.value_dim))
            amplitudes = torch.cat([mean.unsqueeze(2), waves], dim=2).to(shape.dtype)
            of_samples = self._basis(samples, nearest, shape)
            given = of_samples.masked(mask)
            for step in self.log_steps.exp():
                left = (values - of_samples.values(amplitudes)) * mask.unsqueeze(-1)
                amplitudes = amplitudes + step.to(left.dtype) * given.gather_back(left, states.shape[1])
            basis = of_samples if queries is None else self._basis(queries, nearest, shape)
            return basis.values(amplitudes)

    def _basis(self, places: torch.Tensor, nearest: NearestEntities, shape: torch.Tensor) -> Basis:
        def functions(places):
            found = nearest.find(places)
            centre, scale, log_gamma, influence = take(shape, found).split([places.shape[-1], 1, 1, 1], dim=-1)
            offsets = (places.unsqueeze(2) - centre) / scale
            logits = (influence - log_gamma.exp() * offsets.square().sum(dim=-1, keepdim=True)).squeeze(-1)
            weights = logits.masked_fill(found < 0, -torch.inf).softmax(dim=-1)
            return found, weights, torch.cat([torch.ones_like(scale), self.waves(offsets)], dim=-1)

        return Basis(*apply_chunked(functions, places))
