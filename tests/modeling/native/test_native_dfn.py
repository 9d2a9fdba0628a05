"""Original DFN: its format, the function of the native model, and converted weights."""

import math

import pytest
import torch
from transformers import AutoModel

from dfn_hf import DFNModel, DFNNativeConfig, DFNNativeModel
from dfn_hf.conversion.formats.dfn import DFN
from dfn_hf.conversion.plan import plan_conversion
from tests.support.native_checkpoints import random_weights, save_checkpoint

SIZES = {"D": 12, "F": 8, "I": 10, "M": 5, "R": 100}
COUNTS = {"layer": 2}
SETTINGS = {"num_entities": 7, "k": 3, "alpha": 0.2, "sigma": 0.8, "beta": 0.7}


@pytest.fixture(scope="module")
def weights():
    return random_weights(DFN.table, SIZES, COUNTS)


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("dfn") / "dfn.pt", weights, config=SETTINGS)


def write(checkpoint, folder, **options):
    folder.mkdir()
    conversion = plan_conversion(checkpoint, **options)
    conversion.write(folder)
    return conversion.report


def original(weights, values):
    """Return the field, computed point by point in float64 from the equations of the original."""
    w = {key: tensor.double() for key, tensor in weights.items()}

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def layer_norm(name, x):
        x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    rows = []
    for row in values.double():
        features = []
        for value in row:
            density = gelu(linear("density_field.density_projection.0", value))
            density = gelu(linear("density_field.density_projection.2", density))
            place = linear("density_field.coordinate_generator", density)
            feature = gelu(linear("entity_extractor.entity_mapper.0", torch.cat([place, density])))
            features.append(linear("entity_extractor.entity_mapper.2", feature))
        features.sort(key=lambda feature: -float(feature.norm()))
        kept = features[: SETTINGS["num_entities"]]
        rows.append(([one[:2] for one in kept], [one[2:-1] for one in kept]))

    for layer in range(COUNTS["layer"]):
        name = f"dfn_layers.{layer}"
        means = []
        for _, states in rows:
            mean = sum(states) / len(states)
            mean = linear(f"{name}.memory.aggregate_projection", mean)
            means.append(linear(f"{name}.memory.memory_projection", mean))
        means = sum(means) / len(means)
        slots = [
            linear(f"{name}.memory.memory_projection", SETTINGS["beta"] * slot + (1 - SETTINGS["beta"]) * means)
            for slot in w[f"{name}.memory.memory"]
        ]
        after = []
        for positions, states in rows:
            flow = [linear(f"{name}.flow_attention.flow_projection", state) for state in states]
            positions = [p + SETTINGS["alpha"] * f for p, f in zip(positions, flow, strict=True)]
            scale = math.sqrt(sum(float(f.norm()) ** 2 for f in flow) / len(flow) + 1e-6)
            new_states = []
            for i, state in enumerate(states):
                distances = {j: float((positions[i] - p).norm()) for j, p in enumerate(positions) if j != i}
                nearest = sorted(distances, key=distances.get)[: SETTINGS["k"]]
                affinity = {j: math.exp(-distances[j] / (2 * SETTINGS["sigma"] ** 2)) for j in nearest}
                total = sum(affinity.values()) + 1e-8
                context = sum(
                    weight / total * linear(f"{name}.flow_attention.value_projection", states[j])
                    for j, weight in affinity.items()
                )
                similar = torch.stack([state @ slot / (state.norm() * slot.norm()) for slot in slots]).softmax(dim=0)
                context = context + sum(weight * slot for weight, slot in zip(similar, slots, strict=True))
                hidden = gelu(linear(f"{name}.field_mlp.mlp.0", torch.cat([state, context])))
                hidden = linear(f"{name}.field_mlp.mlp.3", hidden)
                new_states.append(layer_norm(f"{name}.field_mlp.layer_norm", state + hidden) / scale)
            after.append((positions, new_states))
        rows = after

    side = math.isqrt(SIZES["R"] // 2)
    axis = [-1 + 2 * step / (side - 1) for step in range(side)]
    fields = []
    for positions, states in rows:
        out = [
            linear("output_generator.output_projection.2", gelu(linear("output_generator.output_projection.0", state)))
            for state in states
        ]
        points = []
        for x in axis:
            for y in axis:
                point = torch.tensor([x, y], dtype=torch.float64)
                near = [math.exp(-(float((point - p).norm()) ** 2) / 0.1) for p in positions]
                points.append(sum(a * o for a, o in zip(near, out, strict=True)) / (sum(near) + 1e-8))
        fields.append(torch.stack(points))
    return torch.stack(fields)


@pytest.mark.parametrize("points", [4, 7, 20])
def test_native_model_computes_the_original(weights, checkpoint, tmp_path, points):
    report = write(checkpoint, tmp_path / "out", native=True)
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert type(model) is DFNNativeModel and not report.dropped and not report.new
    values = torch.randn(2, points, SIZES["I"], generator=torch.Generator().manual_seed(points))
    for _ in range(2):  # a call does not change the model
        torch.testing.assert_close(model(values).field.double(), original(weights, values), atol=1e-5, rtol=0)


def test_native_round_trip_is_exact(weights, checkpoint, tmp_path):
    write(checkpoint, tmp_path / "out", native=True)
    loaded = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())


def test_model_receives_weights_with_a_counterpart(weights, checkpoint, tmp_path):
    report = write(checkpoint, tmp_path / "out")
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is DFNModel and not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    state = model.state_dict()
    assert set(report.mapped) | set(report.dropped) == set(weights) and not set(report.mapped) & set(report.dropped)
    for key, (target,) in report.mapped.items():
        assert torch.equal(state[target], weights[key])
    filled = {target for targets in report.mapped.values() for target in targets}
    assert filled | set(report.new) == set(state) and not filled & set(report.new)
    assert model.config.num_neighbors == 3 and model.config.flow_step == 0.2 and model.config.memory_decay == 0.7
    assert torch.isfinite(model(inputs_embeds=torch.randn(1, 40, SIZES["D"])).last_hidden_state).all()


def test_settings_come_from_arguments_file_or_defaults(weights, tmp_path):
    bare = tmp_path / "bare.pt"
    torch.save(weights, bare)
    assert plan_conversion(bare, native=True).config.k == 8
    assert plan_conversion(bare, native=True, settings={"k": 5}).config.k == 5
    stored = save_checkpoint(tmp_path / "stored.pt", weights, config=SETTINGS)
    assert plan_conversion(stored, native=True, settings={"k": 5}).config.sigma == 0.8


def test_native_configuration_and_inputs_are_checked():
    with pytest.raises(ValueError, match="`k` \\(8\\) must be below `num_entities` \\(8\\)"):
        DFNNativeConfig(num_entities=8)
    model = DFNNativeModel(DFNNativeConfig(input_dim=4, entity_dim=8, field_dim=8, num_layers=1))
    with pytest.raises(ValueError, match="must have shape \\[batch, points, 4\\]"):
        model(torch.randn(1, 20, 5))
    with pytest.raises(ValueError, match="more than `k` \\(8\\)"):
        model(torch.randn(1, 8, 4))
