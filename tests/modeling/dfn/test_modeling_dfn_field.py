"""Models of fields: invariances, loss, error messages, saving, checkpointing and training."""

import random

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from dfn_hf import DFNConfig
from dfn_hf.data.fields import FieldCollator, array_field
from dfn_hf.modeling.dfn.modeling_dfn_field import DFNFieldModel, DFNForFieldReconstruction
from tests.support.families import draw_dfn_config

SEEDS = range(6)
STRICT = {"atol": 1e-9, "rtol": 0}
SAMPLINGS = ("adaptive", "uniform", "token")
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}


def draw(seed, **overrides):
    rng = random.Random(seed)
    options = {
        "entity_sampling": SAMPLINGS[seed % 3],
        "num_entities": rng.choice([1, 7, 20]),
        "coordinate_dim": rng.choice([1, 2, 3]),
        "value_dim": rng.choice([1, 2]),
        "num_sample_layers": rng.choice([1, 2]),
        "local_window": rng.choice([2, 5]),
        "memory_slots": 0,
        "readout_window": 1,
        "initializer_range": None,
    }
    torch.manual_seed(seed)
    config = draw_dfn_config(rng, **options | overrides)
    return DFNForFieldReconstruction(config).double().eval()


def draw_field(model, batch=2, samples=45, seed=0):
    torch.manual_seed(seed)
    config = model.config
    coordinates = torch.rand(batch, samples, config.coordinate_dim, dtype=torch.float64) * 2 - 1
    return coordinates, torch.randn(batch, samples, config.value_dim, dtype=torch.float64)


def image_batch(side=12):
    y, x = np.mgrid[:side, :side]
    return FieldCollator()([array_field(np.where(x > y, 0.8, -0.6), 2)])


@pytest.mark.parametrize("seed", range(9))
def test_order_of_samples_does_not_matter(seed):
    model = draw(seed)
    coordinates, values = draw_field(model, seed=seed)
    coordinates[:, 1:5] = coordinates[:, :1]  # equal coordinates
    order = torch.randperm(45)
    whole, shuffled = model(coordinates, values), model(coordinates[:, order], values[:, order])
    assert torch.allclose(whole.reconstruction[:, order], shuffled.reconstruction, **STRICT)
    assert torch.allclose(whole.entity_coordinates, shuffled.entity_coordinates, **STRICT)
    if model.config.entity_sampling != "token":
        assert torch.allclose(whole.density[:, order], shuffled.density, **STRICT)


@pytest.mark.parametrize("seed", range(9))
def test_hidden_samples_and_other_rows_have_no_effect(seed):
    model = draw(seed)
    coordinates, values = draw_field(model, batch=3, seed=seed)
    mask = torch.rand(3, 45) < 0.6
    mask[1] = False
    mask[1, 7] = True
    queries = torch.rand(3, 8, model.config.coordinate_dim, dtype=torch.float64) * 3 - 1.5
    holes = ~mask[..., None]
    both = model(
        coordinates.masked_fill(holes, torch.nan),
        values.masked_fill(holes, torch.nan),
        mask,
        query_coordinates=queries,
    )
    for row in range(3):
        given = mask[row]
        alone = model(
            coordinates[row : row + 1, given],
            values[row : row + 1, given],
            query_coordinates=queries[row : row + 1],
        )
        entities = alone.entity_weights.shape[1]
        assert alone.entity_mask is None
        assert torch.allclose(both.reconstruction[row], alone.reconstruction[0], **STRICT)
        for name in ("last_hidden_state", "entity_coordinates", "entity_weights"):
            assert torch.allclose(both[name][row, :entities], alone[name][0], **STRICT)
        assert both.entity_mask is None or both.entity_mask[row].sum() == entities
        assert alone.entity_weights.exp().sum().item() == pytest.approx(given.sum().item())
        assert alone.density.sum().item() == pytest.approx(entities)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_parameter_has_a_gradient(sampling):
    model = draw(3, entity_sampling=sampling, num_entities=12, num_hidden_layers=2, carry_positions=False)
    coordinates, values = draw_field(model)
    model(coordinates, values, labels=values).loss.backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert without == []


def test_few_samples_become_one_entity_each():
    for sampling, num_entities in (("token", 1), ("adaptive", 60), ("uniform", 45)):
        model = draw(1, entity_sampling=sampling, num_entities=num_entities)
        coordinates, values = draw_field(model)
        outputs = model.model(coordinates, values)
        assert torch.allclose(outputs.entity_weights, torch.zeros(2, 45, dtype=torch.float64), **STRICT)
        assert torch.allclose(outputs.entity_coordinates.sort(dim=1).values, coordinates.sort(dim=1).values, **STRICT)
        assert torch.allclose(outputs.entity_values.sum(dim=1), values.sum(dim=1), **STRICT)


def test_entities_gather_where_values_change():
    model = DFNForFieldReconstruction(DFNConfig(num_entities=24, entity_sampling="adaptive", **SMALL))
    density = model(**image_batch()).density.view(12, 12)
    edge = torch.eye(12, dtype=torch.bool)
    assert density[edge].mean() > 3 * density[:4, 8:].mean()


def test_loss_covers_hidden_or_labelled_values():
    model = draw(0)
    coordinates, values = draw_field(model)
    mask = torch.ones(2, 45, dtype=torch.bool)
    mask[:, 5:9] = False
    masked = model(coordinates, values, mask)
    errors = (masked.reconstruction - values).square()
    assert torch.allclose(masked.loss, errors[:, 5:9].mean(), **STRICT)
    assert model(coordinates, values).loss is None
    assert model(coordinates, values, mask, query_coordinates=coordinates).loss is None
    labels = values.clone()
    labels[0, 3:] = torch.nan
    scored = ~labels.isnan()
    assert torch.allclose(model(coordinates, values, mask, labels=labels).loss, errors[scored].mean(), **STRICT)


def test_messages_name_invalid_inputs():
    model = draw(0, coordinate_dim=2, value_dim=1)
    coordinates, values = draw_field(model)
    mask = torch.ones(2, 45, dtype=torch.bool)
    for named, inputs in {
        "coordinate_dim": (coordinates[..., :1], values),
        "value_dim": (coordinates, values[..., 0]),
        "same batch and number of samples": (coordinates[:, 1:], values),
        "mask must be": (coordinates, values, mask[:, 1:]),
        "False for every sample": (coordinates, values, mask & torch.tensor([[True], [False]])),
        "coordinates must be finite": (coordinates * torch.inf, values),
        "values must be finite": (coordinates, values * torch.nan),
        "query_coordinates must be": (coordinates, values, None, coordinates[:1]),
        "query_coordinates must be finite": (coordinates, values, None, coordinates * torch.nan),
        "labels must be": (coordinates, values, None, coordinates[:, :3], values),
    }.items():
        with pytest.raises(ValueError, match=named):
            model(*inputs)
    with pytest.raises(ValueError, match="coordinate_dim"):
        DFNFieldModel(DFNConfig(coordinate_dim=49, **SMALL))
    with pytest.raises(ValueError, match="at least one"):
        model(coordinates[:, :0], values[:, :0])


def test_saving_and_loading(tmp_path):
    model = DFNForFieldReconstruction(DFNConfig(num_entities=24, entity_sampling="adaptive", **SMALL)).eval()
    model.save_pretrained(tmp_path)
    loaded = DFNForFieldReconstruction.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**image_batch()).reconstruction, model(**image_batch()).reconstruction)
    alone = DFNFieldModel.from_pretrained(tmp_path).eval()
    batch = image_batch()
    expected = model.model(batch["coordinates"], batch["values"]).last_hidden_state
    assert torch.equal(alone(batch["coordinates"], batch["values"]).last_hidden_state, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant):
    model = draw(0, hidden_dropout=0.0).train()
    coordinates, values = draw_field(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(coordinates, values, labels=values).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, **STRICT) for a, b in zip(*gradients, strict=True))


def test_half_precision_is_close():
    torch.manual_seed(0)
    model = DFNForFieldReconstruction(DFNConfig(num_entities=24, entity_sampling="adaptive", **SMALL))
    expected = model(**image_batch())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**image_batch())
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    half = model.to(torch.bfloat16)(**image_batch())
    for close in (outputs, half):
        assert (close.reconstruction - expected.reconstruction).abs().mean() < 0.03
        assert torch.allclose(close.entity_coordinates, expected.entity_coordinates, atol=0.05)


def test_trainer_reduces_the_loss(tmp_path):
    torch.manual_seed(0)
    model = DFNForFieldReconstruction(DFNConfig(num_entities=16, entity_sampling="adaptive", **SMALL))
    rng = np.random.default_rng(0)
    fields = []
    for side in (10, 12) * 8:
        y, x = np.mgrid[:side, :side] / side
        fields.append(array_field(np.sin(rng.uniform(1, 4) * x + rng.uniform(1, 4) * y), 2))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=40,
        learning_rate=1e-2,
        logging_steps=5,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=fields, data_collator=FieldCollator(0.5))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.75 * losses[0]
