"""Interpolation of a field's values from the entities around a query (docs/models/dfn.md, Fields).

    y(x) = Σ_j softmax_j(w_j − γ_j |δ_j|²) Σ_m a_jm φ_m(δ_j),   δ_j = (x − c_j) / scale_j

j runs over the K nearest entities, with distances in units of each entity's scale. φ are a constant and learnt random
Fourier features (Rahimi & Recht 2007). γ, w and initial amplitudes a are linear maps of the entities' states. y is
linear in a, so a few iterations of least squares with learnt step lengths, as in SIRT (Gilbert 1972), then reduce the
residual at the given samples.

Shape letters: B batch, E entities, Q queries, K nearest entities, C candidates, M functions φ, c coordinate_dim,
v value_dim, F features.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from ..modules.linear import linear_in_weight_dtype
from ..ops.chunking import apply_chunked
from ..ops.hilbert_curve import CURVE_SHIFTS, LAST_KEY, Box
from .configuration_dfn import DFNConfig

NUM_NEAREST = 4  # K
NUM_WAVES = 16  # M = 1 + 2 NUM_WAVES
INITIAL_FREQUENCY_STD = 5.0  # radians per entity scale
# An iteration with step s multiplies an error component with eigenvalue x by 1 − s x. The product over these steps is
# small for x from 0.2 to 1.
INITIAL_STEPS = (1.0, 2.0, 4.0)
CANDIDATES_PER_SIDE = 4  # entities before, and after, a query along each curve


class NearestEntities:
    """Approximate nearest-entity search: candidates are the entities next to the query on several Hilbert curves.

    Args:
        coordinates: `[B, E, c]`.
        scale: `[B, E, 1]`, unit of the distance to each entity.
        real: bool `[B, E]`, True where an entity exists; these come first in each row.
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
        """Return the nearest entities of queries `[B, Q, c]`: int64 `[B, Q, K]`, −1 if there are fewer than K."""
        candidates = torch.cat([self._candidates(queries, *curve) for curve in self.curves], dim=-1)
        candidates = candidates.sort(dim=-1).values
        duplicate = torch.zeros_like(candidates, dtype=torch.bool)
        duplicate[..., 1:] = candidates[..., 1:] == candidates[..., :-1]
        offsets = queries.unsqueeze(2) - gather_rows(self.coordinates, candidates)
        distances = (offsets / gather_rows(self.scale, candidates)).square().sum(dim=-1)
        distances = distances.masked_fill(duplicate | (candidates < 0), torch.inf)
        distances, best = distances.topk(min(NUM_NEAREST, candidates.shape[-1]), dim=-1, largest=False)
        return candidates.gather(-1, best).masked_fill(distances == torch.inf, -1)

    def _candidates(
        self, queries: torch.Tensor, shift: float, keys: torch.Tensor, order: torch.Tensor
    ) -> torch.Tensor:
        """Return `CANDIDATES_PER_SIDE` entities before and after each query on one curve, int64 `[B, Q, C]`."""
        rank = torch.searchsorted(keys, self.box.keys(queries, shift)).unsqueeze(-1)
        rank = rank + torch.arange(-CANDIDATES_PER_SIDE, CANDIDATES_PER_SIDE, device=rank.device)
        inside = (rank >= 0) & (rank < self.counts)
        candidates = order.gather(1, torch.where(inside, rank, 0).flatten(1)).view_as(rank)
        return candidates.masked_fill(~inside, -1)


def flat_indices(indices: torch.Tensor, length: int) -> torch.Tensor:
    """Flatten indices `[B, …]` into rows of `length` to indices into all rows concatenated; −1 is treated as 0."""
    rows = torch.arange(indices.shape[0], device=indices.device).view(-1, *(1,) * (indices.dim() - 1)) * length
    return (indices.clamp(min=0) + rows).flatten()


def gather_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gather `[B, E, F]` at indices `[B, Q, K]` into `[B, Q, K, F]`; index −1 reads index 0."""
    gathered = x.flatten(0, 1).index_select(0, flat_indices(indices, x.shape[1]))
    return gathered.view(*indices.shape, x.shape[-1])


def scatter_rows(x: torch.Tensor, indices: torch.Tensor, length: int) -> torch.Tensor:
    """Sum `[B, Q, K, F]` at indices `[B, Q, K]` into `[B, length, F]`; index −1 adds to index 0."""
    sums = x.new_zeros(x.shape[0] * length, x.shape[-1])
    sums = sums.index_add(0, flat_indices(indices, length), x.flatten(0, 2))
    return sums.view(x.shape[0], length, -1)


class FourierBasis(nn.Module):
    """cos and sin of learnt waves over offsets in units of an entity's scale; the squares sum to 1."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.frequency = nn.Linear(config.coordinate_dim, NUM_WAVES, bias=False)
        self.frequency.init_std = INITIAL_FREQUENCY_STD  # type: ignore[assignment]  # see FlowDensity

    def forward(self, offsets: torch.Tensor) -> torch.Tensor:
        """`[..., c]` → `[..., 2 NUM_WAVES]`."""
        angles = linear_in_weight_dtype(self.frequency, offsets).to(offsets.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * NUM_WAVES**-0.5


@dataclass(frozen=True)
class Basis:
    """The linear map from amplitudes of entities to values at Q queries.

    Attributes:
        nearest: int64 `[B, Q, K]`, entities; −1 for none.
        weights: `[B, Q, K]`, softmax weights of these entities.
        functions: `[B, Q, K, M]`, φ_m(δ).
    """

    nearest: torch.Tensor
    weights: torch.Tensor
    functions: torch.Tensor

    def values(self, amplitudes: torch.Tensor) -> torch.Tensor:
        """Amplitudes `[B, E, M, v]` → values `[B, Q, v]`."""
        return apply_chunked(lambda *basis: _mix(amplitudes, *basis), self.nearest, self.weights, self.functions)

    def gather_back(self, values: torch.Tensor, num_entities: int) -> torch.Tensor:
        """Values `[B, Q, v]` → `[B, E, M, v]`: the transpose of `values`, divided by each entity's sum of weights."""
        parts = apply_chunked(_weighted_outer, self.weights, self.functions, values)
        sums = scatter_rows(
            torch.cat([parts.flatten(3), self.weights.unsqueeze(-1)], dim=-1), self.nearest, num_entities
        )
        mean = sums[..., :-1] / sums[..., -1:].clamp(min=torch.finfo(sums.dtype).tiny)
        return mean.unflatten(-1, parts.shape[3:])

    def masked(self, mask: torch.Tensor) -> "Basis":
        """Set the weights of queries to 0 where `mask`, bool `[B, Q]`, is False."""
        return Basis(self.nearest, self.weights * mask.unsqueeze(-1), self.functions)


def _mix(amplitudes, nearest, weights, functions) -> torch.Tensor:
    """Σ_k weight_k Σ_m φ_m a_km: `[B, Q, v]`."""
    gathered = gather_rows(amplitudes.flatten(2), nearest).unflatten(-1, amplitudes.shape[2:])
    return ((weights.unsqueeze(-1) * functions).unsqueeze(-1) * gathered).sum(dim=(2, 3))


def _weighted_outer(weights, functions, values) -> torch.Tensor:
    """weight_k φ_m ⊗ values: `[B, Q, K, M, v]`."""
    return (weights.unsqueeze(-1) * functions).unsqueeze(-1) * values[:, :, None, None]


class GaussianInterpolation(nn.Module):
    """Values at any coordinates, from the states of the nearest entities and the given samples."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.value_dim = config.value_dim
        self.waves = FourierBasis(config)
        self.amplitude_proj = nn.Linear(config.hidden_size, config.value_dim * 2 * NUM_WAVES, bias=False)
        self.amplitude_proj.init_std = 0.1 * config.hidden_size**-0.5
        self.shape_proj = nn.Linear(config.hidden_size, 2)  # log γ and w
        self.shape_proj.init_std = 0.1 * config.hidden_size**-0.5
        self.log_steps = nn.Parameter(torch.empty(len(INITIAL_STEPS)))

    def reset_parameters(self) -> None:
        """Set the step lengths of the least-squares iterations to their initial values."""
        init.copy_(self.log_steps, torch.tensor(INITIAL_STEPS).log())

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
            queries: `[B, Q, c]`; None for the samples' coordinates.
            states: `[B, E, hidden_size]`.
            coordinates: `[B, E, c]`, of the entities.
            scale: `[B, E, 1]`, distance over which an entity acts.
            mean: `[B, E, v]`, mean value of each entity's samples.
            real: bool `[B, E]`, True where an entity exists; these come first in each row.
            samples: `[B, N, c]`, finite coordinates of the samples.
            values: `[B, N, v]`, finite.
            mask: bool `[B, N]`, True where a sample is given.

        Returns:
            `[B, Q, v]`.
        """
        nearest = NearestEntities(coordinates, scale, real)
        with torch.autocast(states.device.type, enabled=False):
            shape = torch.cat([coordinates, scale, linear_in_weight_dtype(self.shape_proj, states)], dim=-1)
            waves = linear_in_weight_dtype(self.amplitude_proj, states).unflatten(-1, (-1, self.value_dim))
            amplitudes = torch.cat([mean.unsqueeze(2), waves], dim=2).to(shape.dtype)
            at_samples = self._basis(samples, nearest, shape)
            at_given = at_samples.masked(mask)
            for step in self.log_steps.exp():
                residual = (values - at_samples.values(amplitudes)) * mask.unsqueeze(-1)
                amplitudes = amplitudes + step.to(residual.dtype) * at_given.gather_back(residual, states.shape[1])
            basis = at_samples if queries is None else self._basis(queries, nearest, shape)
            return basis.values(amplitudes)

    def _basis(self, queries: torch.Tensor, nearest: NearestEntities, shape: torch.Tensor) -> Basis:
        """Return the basis at queries `[B, Q, c]`; `shape` `[B, E, c + 3]` holds coordinates, scale, log γ and w."""

        def parts(queries):
            indices = nearest.find(queries)
            sizes = [queries.shape[-1], 1, 1, 1]
            centre, scale, log_gamma, influence = gather_rows(shape, indices).split(sizes, dim=-1)
            offsets = (queries.unsqueeze(2) - centre) / scale
            logits = (influence - log_gamma.exp() * offsets.square().sum(dim=-1, keepdim=True)).squeeze(-1)
            weights = logits.masked_fill(indices < 0, -torch.inf).softmax(dim=-1)
            return indices, weights, torch.cat([torch.ones_like(scale), self.waves(offsets)], dim=-1)

        return Basis(*apply_chunked(parts, queries))
