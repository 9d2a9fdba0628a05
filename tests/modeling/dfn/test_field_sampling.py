"""Sampling of fields compared with loops: normalisation and cutting of the density, and its gradient."""

import pytest
import torch

from dfn_hf import DFNConfig
from dfn_hf.modeling.dfn.field_sampling import SMOOTHING, FlowDensity, cut_spans, normalize_density
from dfn_hf.modeling.ops.hilbert_curve import CURVE_SHIFTS, Box

SEEDS = range(6)
STRICT = {"atol": 1e-9, "rtol": 0}


def draw_density(seed, counts=(37, 11, 5), length=37):
    torch.manual_seed(seed)
    density = torch.rand(len(counts), length, dtype=torch.float64) ** 4 + 1e-3
    real = torch.arange(length) < torch.tensor(counts)[:, None]
    return density, real


def water_fill_reference(density: torch.Tensor, num_entities: int) -> torch.Tensor:
    """Normalise one row `[N]`: fix samples above 1 and scale the others, until no sample is above 1."""
    if len(density) <= num_entities:
        return torch.ones_like(density)
    full = torch.zeros_like(density, dtype=torch.bool)
    while True:
        scale = (num_entities - full.sum()) / density[~full].sum()
        over = (density * scale > 1) & ~full
        if not over.any():
            return torch.where(full, 1.0, density * scale)
        full = full | over


def overlap(density: torch.Tensor, num_entities: int) -> torch.Tensor:
    """Return `[E, N]`, the overlap of each sample of one row with the interval [k, k + 1] of each entity k."""
    ends = density.cumsum(dim=0)
    starts = ends - density
    k = torch.arange(num_entities, dtype=density.dtype)[:, None]
    return (torch.minimum(ends, k + 1) - torch.maximum(starts, k)).clamp(min=0)


@pytest.mark.parametrize("num_entities", [1, 4, 8, 20])
@pytest.mark.parametrize("seed", SEEDS)
def test_normalized_density_equals_iterative_water_filling(seed, num_entities):
    density, real = draw_density(seed)
    density.requires_grad_()
    probe = torch.randn_like(density)
    filled = normalize_density(density, real, num_entities)
    gradient = torch.autograd.grad((filled * probe).sum(), density)[0]
    expected = torch.zeros_like(filled)
    for row, n in enumerate(real.sum(dim=1).tolist()):
        expected[row, :n] = water_fill_reference(density[row, :n], num_entities)
        assert filled[row].sum().item() == pytest.approx(min(n, num_entities), abs=1e-9)
    assert torch.allclose(filled, expected, **STRICT) and filled.max() <= 1
    if expected.requires_grad:
        expected_gradient = torch.autograd.grad((expected * probe).sum(), density)[0]
        assert torch.allclose(gradient, expected_gradient, **STRICT)


def test_equal_densities_are_normalized_exactly():
    density, real = torch.full((1, 8), 0.3), torch.ones(1, 8, dtype=torch.bool)
    assert torch.equal(normalize_density(density, real, 2), torch.full((1, 8), 0.25, dtype=torch.float64))
    for enough in (8, 9):
        assert torch.equal(normalize_density(density, real, enough), torch.ones(1, 8, dtype=torch.float64))


@pytest.mark.parametrize("num_entities", [1, 4, 8, 20])
@pytest.mark.parametrize("seed", SEEDS)
def test_sums_over_entities_equal_overlaps(seed, num_entities):
    density, real = draw_density(seed)
    features = torch.randn(*density.shape, 3, dtype=torch.float64)
    probe = torch.randn(3, num_entities, 3, dtype=torch.float64)
    inputs = [density.requires_grad_(), features.requires_grad_()]
    filled = normalize_density(density, real, num_entities)
    spans = cut_spans(filled, real, num_entities, torch.float64)
    sums = spans.sums(spans.of_samples(features) * spans.share[..., None])
    mass = spans.sums(spans.mass[..., None])
    results = [sums, mass, *torch.autograd.grad((sums * probe * mass).sum(), inputs, retain_graph=True)]
    shares = torch.stack([overlap(row, num_entities) for row in filled])
    parts = shares / torch.where(filled > 0, filled, 1)[:, None]
    sums, mass = shares @ features, parts.sum(dim=-1, keepdim=True)
    expected = [sums, mass, *torch.autograd.grad((sums * probe * mass).sum(), inputs)]
    for ours, reference in zip(results, expected, strict=True):
        assert torch.allclose(ours, reference, **STRICT)
    assert torch.equal(spans.real.sum(dim=1), real.sum(dim=1).clamp(max=num_entities))
    assert torch.allclose(mass.sum(dim=(1, 2)), real.sum(dim=1).double(), **STRICT)


def draw_module():
    module = FlowDensity(DFNConfig(hidden_size=8, num_attention_heads=2)).double()
    torch.nn.init.normal_(module.flow_map.weight)
    module.reset_parameters()
    return module


def density_reference(module, states, coordinates, box):
    """Compute the density of one row by loops over curves and samples."""
    flow = torch.nn.functional.normalize(module.flow_map(states), dim=-1)
    length, total = len(states), torch.zeros(len(states), dtype=states.dtype)
    for shift in CURVE_SHIFTS:
        order = box.keys(coordinates[None], shift)[0].argsort(stable=True).tolist()
        change = []
        for place, sample in enumerate(order):
            beside = [order[p] for p in (place - 1, place + 1) if 0 <= p < length]
            change.append(sum((1 - flow[sample] @ flow[j]) / 2 for j in beside) / max(1, len(beside)))
        for place, sample in enumerate(order):
            around = change[max(0, place - SMOOTHING) : place + SMOOTHING + 1]
            total[sample] += sum(around) / len(around) / len(CURVE_SHIFTS)
    return (total + module.log_floor.exp()) ** module.log_exponent.exp()


@pytest.mark.parametrize("seed", SEEDS)
def test_density_equals_a_loop_over_curves(seed):
    torch.manual_seed(seed)
    module = draw_module()
    states = torch.randn(2, 23, 8, dtype=torch.float64)
    coordinates = torch.rand(2, 23, 2, dtype=torch.float64)
    real = torch.ones(2, 23, dtype=torch.bool)
    real[1, 2 + 3 * seed :] = False
    box = Box.around(coordinates, real)
    order = box.keys(coordinates).masked_fill(~real, 2**62).argsort(dim=1)
    coordinates = coordinates.gather(1, order[..., None].expand_as(coordinates))
    ours = module(states, coordinates, real, box)
    for row, n in enumerate(real.sum(dim=1).tolist()):
        alone = Box(box.low[row : row + 1], box.edge[row : row + 1])
        expected = density_reference(module, states[row, :n], coordinates[row, :n], alone)
        assert torch.allclose(ours[row, :n], expected, **STRICT)
        gradients = [
            torch.autograd.grad((density.log() * torch.arange(n)).sum(), module.parameters(), retain_graph=True)
            for density in (ours[row, :n], expected)
        ]
        assert all(torch.allclose(a, b, atol=1e-7, rtol=1e-7) for a, b in zip(*gradients, strict=True))


def test_density_is_high_where_values_change():
    torch.manual_seed(0)
    module = draw_module()
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)[None, :, None]
    states = torch.cat([torch.tanh(20 * x), torch.ones(1, 200, 7)], dim=-1)
    real = torch.ones(1, 200, dtype=torch.bool)
    density = module(states, x, real, Box.around(x, real))[0]
    assert density[97:103].min() > 2 * density[:50].max()
