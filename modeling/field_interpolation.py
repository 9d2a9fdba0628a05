"""Values anywhere in a field, from the entities around: a Gaussian mixture of local waves.

    y(x) = Σ_j softmax_j(−γ_j |δ_j|² + w_j) (v_j + Σ_m a_jm cos(b_m · δ_j) + a'_jm sin(b_m · δ_j)),  δ_j = (x − c_j) / scale_j

over the nearest entities j, distances counted in their own scale (architecture, "Fields"). Shape letters: B batch,
E entities, Q queries, K nearest entities, C candidates, M waves, c coordinate_dim, v value_dim.
"""

import torch
from torch import nn

from .configuration_dfn import DFNConfig
from .hilbert_curve import LAST_KEY, Box
from .pieces import in_pieces

NUM_NEAREST = 8  # K, entities that a value is read from
NUM_WAVES = 16  # M
CURVE_SHIFTS = (0.0, 1 / 3, 2 / 3)
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


def take(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Entities `[B, E, F]` at places `[B, Q, K]` → `[B, Q, K, F]`; place −1 gives any."""
    rows = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (places.clamp(min=0) + rows).flatten()).view(*places.shape, x.shape[-1])


class LocalWaves(nn.Module):
    """cos and sin of learnt waves over offsets, in units of an entity's scale."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.frequency = nn.Linear(config.coordinate_dim, NUM_WAVES, bias=False)
        self.frequency.init_std = 2.0

    def forward(self, offsets: torch.Tensor) -> torch.Tensor:
        """`[..., c]` → `[..., 2 M]`."""
        angles = self.frequency(offsets)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GaussianInterpolation(nn.Module):
    """Values at any coordinates, from the states of the nearest entities."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.value_dim = config.value_dim
        self.waves = LocalWaves(config)
        self.amplitude_proj = nn.Linear(config.hidden_size, config.value_dim * 2 * NUM_WAVES, bias=False)
        self.amplitude_proj.init_std = 0.1 * (config.hidden_size * NUM_WAVES) ** -0.5
        self.shape_proj = nn.Linear(config.hidden_size, 2)  # log γ and w
        self.shape_proj.init_std = 0.1 * config.hidden_size**-0.5

    def forward(
        self,
        queries: torch.Tensor,
        states: torch.Tensor,
        coordinates: torch.Tensor,
        scale: torch.Tensor,
        values: torch.Tensor,
        real: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            queries: `[B, Q, c]`.
            states: `[B, E, hidden_size]`; coordinates: `[B, E, c]`; scale: `[B, E, 1]`; values: their means,
                `[B, E, v]`; real: bool `[B, E]`, the first so many of each row.

        Returns:
            `[B, Q, v]`.
        """
        nearest = NearestEntities(coordinates, scale, real)
        entities = torch.cat(
            [coordinates, scale, self.shape_proj(states), values, self.amplitude_proj(states)], dim=-1
        )
        return in_pieces(lambda queries: self._read(queries, nearest.find(queries), entities), queries)

    def _read(self, queries, found, entities) -> torch.Tensor:
        c, v = queries.shape[-1], self.value_dim
        centre, scale, shape, mean, amplitude = take(entities, found).split([c, 1, 2, v, v * 2 * NUM_WAVES], dim=-1)
        offsets = (queries.unsqueeze(2) - centre) / scale
        logits = shape[..., 1] - shape[..., 0].exp() * offsets.square().sum(dim=-1)
        weights = logits.masked_fill(found < 0, -torch.inf).softmax(dim=-1)
        waves = self.waves(offsets).unsqueeze(-1)  # [B, Q, K, 2 M, 1]
        values = mean + (amplitude.unflatten(-1, (v, -1)) @ waves).squeeze(-1)
        return (weights.unsqueeze(-1) * values).sum(dim=2)
