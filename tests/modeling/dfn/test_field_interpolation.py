"""Gaussian interpolation compared with dense distances to all entities: values and all gradients."""

import pytest
import torch

from dfn_hf import DFNConfig
from dfn_hf.modeling.dfn import field_interpolation
from dfn_hf.modeling.dfn.field_interpolation import GaussianInterpolation, NearestEntities

SEEDS = range(6)
STRICT = {"atol": 1e-9, "rtol": 0}


def draw_entities(seed, batch=2, entities=7, coordinate_dim=2, hidden_size=6, value_dim=2):
    torch.manual_seed(seed)
    real = torch.ones(batch, entities, dtype=torch.bool)
    real[1, entities - 2 :] = False
    wide = {"dtype": torch.float64}
    return {
        "states": torch.randn(batch, entities, hidden_size, **wide),
        "coordinates": torch.rand(batch, entities, coordinate_dim, **wide),
        "scale": torch.rand(batch, entities, 1, **wide) + 0.2,
        "mean": torch.randn(batch, entities, value_dim, **wide),
    }, real


def draw_decoder(seed, coordinate_dim=2, value_dim=2):
    config = DFNConfig(hidden_size=6, num_attention_heads=2, coordinate_dim=coordinate_dim, value_dim=value_dim)
    torch.manual_seed(seed)
    decoder = GaussianInterpolation(config).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return decoder


def dense(decoder, queries, entities, real, samples, values, mask):
    """Interpolate each row with the distances from every query to every entity, in units of the entity's scale."""
    results = []
    for row in range(len(real)):
        states, centre, scale, mean = (x[row, real[row]] for x in entities.values())
        log_gamma, influence = decoder.shape_proj(states).unbind(-1)

        def parts(places, centre=centre, scale=scale, log_gamma=log_gamma, influence=influence):
            offsets = (places[:, None] - centre) / scale
            distance = offsets.square().sum(dim=-1)
            kept = distance.argsort(dim=-1).argsort(dim=-1) < field_interpolation.NUM_NEAREST
            logits = influence - log_gamma.exp() * distance
            weights = logits.masked_fill(~kept, -torch.inf).softmax(dim=-1)
            return weights, torch.cat([torch.ones_like(distance)[..., None], decoder.waves(offsets)], dim=-1)

        waves = decoder.amplitude_proj(states).unflatten(-1, (-1, decoder.value_dim))
        amplitudes = torch.cat([mean[:, None], waves], dim=1)
        weights, functions = parts(samples[row, mask[row]])
        for step in decoder.log_steps.exp():
            left = values[row, mask[row]] - torch.einsum("ne,nem,emv->nv", weights, functions, amplitudes)
            back = torch.einsum("ne,nem,nv->emv", weights, functions, left)
            amplitudes = amplitudes + step * back / weights.sum(dim=0)[:, None, None].clamp(min=1e-300)
        weights, functions = parts(queries[row])
        results.append(torch.einsum("ne,nem,emv->nv", weights, functions, amplitudes))
    return torch.stack(results)


@pytest.mark.parametrize("own_queries", [True, False])
@pytest.mark.parametrize("coordinate_dim", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_values_and_gradients_equal_dense_search(seed, coordinate_dim, own_queries, monkeypatch):
    monkeypatch.setattr(field_interpolation, "CANDIDATES_PER_SIDE", 7)  # all are candidates: the search is exact
    entities, real = draw_entities(seed, coordinate_dim=coordinate_dim)
    decoder = draw_decoder(seed, coordinate_dim)
    samples = torch.rand(2, 19, coordinate_dim, dtype=torch.float64)
    values = torch.randn(2, 19, 2, dtype=torch.float64)
    mask = torch.rand(2, 19) < 0.7
    queries = torch.rand(2, 11, coordinate_dim, dtype=torch.float64) * 1.5 if own_queries else samples
    inputs = [x.requires_grad_() for x in (*entities.values(), samples, values)]
    inputs += [queries.requires_grad_()] * own_queries + list(decoder.parameters())
    ours = decoder(queries if own_queries else None, *entities.values(), real, samples, values, mask)
    expected = dense(decoder, queries, entities, real, samples, values, mask)
    assert torch.allclose(ours, expected, **STRICT)
    probe = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * probe).sum(), inputs) for y in (ours, expected)]
    assert all(torch.allclose(a, b, **STRICT) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("coordinate_dim", [1, 2, 3])
def test_recall_of_nearest_entities(coordinate_dim):
    torch.manual_seed(0)
    places = torch.rand(1, 2000, coordinate_dim)
    scale = torch.full((1, 2000, 1), 0.1)
    queries = torch.rand(1, 500, coordinate_dim)
    found = NearestEntities(places, scale, torch.ones(1, 2000, dtype=torch.bool)).find(queries)
    nearest = torch.cdist(queries, places).topk(field_interpolation.NUM_NEAREST, largest=False).indices
    recall = (found[..., None] == nearest[:, :, None]).any(dim=-1).double().mean()
    assert recall > (0.99, 0.9, 0.7)[coordinate_dim - 1]
    assert (found.sort(dim=-1).values.diff(dim=-1) > 0).all()


def test_missing_neighbors_are_minus_one():
    places = torch.tensor([[[0.0], [0.5], [0.9]], [[0.3], [0.0], [0.0]]])
    real = torch.tensor([[True, True, True], [True, False, False]])
    found = NearestEntities(places, torch.ones(2, 3, 1), real).find(torch.tensor([[[0.1]], [[0.1]]]))
    assert found.sort(dim=-1).values.tolist() == [[[-1, 0, 1, 2]], [[-1, -1, -1, 0]]]


def test_chunk_size_does_not_change_results(monkeypatch):
    entities, real = draw_entities(0)
    decoder, samples = draw_decoder(0), torch.rand(2, 50, 2, dtype=torch.float64)
    values, mask = torch.randn(2, 50, 2, dtype=torch.float64), torch.ones(2, 50, dtype=torch.bool)
    whole = decoder(None, *entities.values(), real, samples, values, mask)
    monkeypatch.setattr("dfn_hf.modeling.ops.chunking.CHUNK_SIZE", 7)
    assert torch.allclose(decoder(None, *entities.values(), real, samples, values, mask), whole, **STRICT)
    with torch.no_grad():
        assert torch.allclose(decoder(None, *entities.values(), real, samples, values, mask), whole, **STRICT)
