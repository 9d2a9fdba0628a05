"""Tests loading of field files, random crops, and training of a field model."""

import math
import wave

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForPreTraining

from dfn_hf import DFNForFieldReconstruction
from dfn_hf.data.fields import array_field
from dfn_hf.training.field import FieldCrops, crop_sizes, load_arrays, new_field_model, train_fields
from dfn_hf.training.trainer import TrainingSettings

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def draw_images(folder, count, shape=(12, 10)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(256, size=shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def write_sound(path, samples=50, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.arange(samples * channels, dtype="<i2").tobytes())


def test_images_of_a_folder_load_in_path_order(tmp_path):
    draw_images(tmp_path / "deeper", 2)
    (tmp_path / "notes.txt").write_text("not a field")
    arrays = load_arrays(tmp_path)
    assert [array.shape for array in arrays] == 2 * [(12, 10, 1)]
    assert np.array_equal(arrays[1], load_arrays(tmp_path / "deeper" / "1.png")[0])
    (colour,) = load_arrays(draw_images(tmp_path / "colour", 1, (4, 5, 3)))
    assert colour.shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("given", "read"), [((9,), (9, 1)), ((3, 4), (3, 4, 1)), ((3, 4, 2), (3, 4, 2)), ((5, 3, 4, 2), (5, 3, 4, 2))]
)
def test_last_axis_of_three_or_more_axes_holds_values(tmp_path, given, read):
    np.save(tmp_path / "array.npy", np.ones(given))
    assert load_arrays(tmp_path)[0].shape == read


def test_sound_loads_as_array(tmp_path):
    write_sound(tmp_path / "sound.WAV", channels=2)
    (sound,) = load_arrays(tmp_path)
    assert sound.shape == (50, 2) and sound.dtype == np.int16 and sound[3].tolist() == [6, 7]


def test_files_without_a_field_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"holds no field.*\.png"):
        load_arrays(tmp_path)
    with pytest.raises(ValueError, match="there is no file or folder"):
        load_arrays(tmp_path / "missing.png")
    draw_images(tmp_path, 1)
    write_sound(tmp_path / "a.wav")
    with pytest.raises(ValueError, match=r"a\.wav has 1 axes and 1 values .*0\.png has 2 and 1: give files"):
        load_arrays(tmp_path)
    (tmp_path / "a.wav").unlink()
    draw_images(tmp_path / "colour", 1, (4, 5, 3))
    with pytest.raises(ValueError, match="2 axes and 3 values"):
        load_arrays(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "num_samples", "expected"),
    [
        ((100, 100), 4096, [64, 64]),
        ((10, 1000), 4096, [10, 409]),
        ((1000, 10), 4096, [409, 10]),
        ((3, 3), 4096, [3, 3]),
        ((30, 30, 2), 128, [8, 8, 2]),
        ((1000,), 256, [256]),
        ((5, 5), 1, [1, 1]),
    ],
)
def test_crop_sides_are_as_equal_as_possible(sizes, num_samples, expected):
    assert crop_sizes(sizes, num_samples) == expected
    assert math.prod(expected) <= num_samples


def test_crops_are_parts_of_arrays_and_depend_on_the_seed():
    arrays = [np.arange(120, dtype=np.uint8).reshape(12, 10, 1), np.arange(99, dtype=np.uint8).reshape(3, 33, 1)]
    crops, again, other = (FieldCrops(arrays, 25, 20, seed) for seed in (1, 1, 2))
    assert len(crops) == len(list(crops)) == 20
    assert all(torch.equal(crops[number]["values"], again[number]["values"]) for number in range(20))
    assert any(not torch.equal(crops[number]["values"], other[number]["values"]) for number in range(20))
    assert {len(piece["values"]) for piece in crops} == {24, 25}
    sizes = {25: (5, 5), 24: (3, 8)}
    for piece in crops:
        length = len(piece["values"])
        assert torch.equal(piece["coordinates"], array_field(np.zeros(sizes[length]), 2)["coordinates"])
        first, second = ((piece["values"][place, 0] + 1) * 127.5 for place in (0, 1))
        assert second - first == pytest.approx(1, abs=1e-4)  # neighbours along the last axis
    with pytest.raises(IndexError):
        crops[20]


def test_new_model_has_the_dimensions_of_the_fields():
    model = new_field_model([np.zeros((5, 6, 7, 3))], num_samples=160, **SMALL, seed=3)
    config = model.config
    assert (config.coordinate_dim, config.value_dim, config.num_entities) == (3, 3, 10)
    assert config.entity_sampling == "adaptive" and config.hidden_size == 16
    same = new_field_model([np.zeros((5, 6, 7, 3))], num_samples=160, **SMALL, seed=3).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())
    assert new_field_model([np.zeros((5, 1))], num_samples=8, **SMALL, num_entities=5).config.num_entities == 5
    with pytest.raises(ValueError, match="choose one of tiny"):
        new_field_model([np.zeros((5, 1))], num_samples=8, size="giant")
    with pytest.raises(ValueError, match="no field 'entities'"):
        new_field_model([np.zeros((5, 1))], num_samples=8, entities=3)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_training_saves_a_folder_that_loads(tmp_path, mask_ratio):
    arrays = load_arrays(draw_images(tmp_path / "images", 3))
    model = new_field_model(arrays, num_samples=64, **SMALL)
    settings = TrainingSettings(max_steps=2, batch_size=2, save_steps=1)
    result = train_fields(
        model,
        FieldCrops(arrays[1:], 64, 4),
        FieldCrops(arrays[:1], 64, 4),
        tmp_path / "field",
        settings,
        mask_ratio=mask_ratio,
        provenance="Trained on noise.",
        progress=False,
    )
    assert 0 < result.validation_loss < math.inf and 0 < result.initial_loss < math.inf
    loaded = AutoModelForPreTraining.from_pretrained(result.folder)
    assert isinstance(loaded, DFNForFieldReconstruction) and loaded.config.num_entities == 4
    card = (result.folder / "README.md").read_text()
    assert "feature-extraction" in card and "Trained on noise." in card and "mean squared error" in card
    code = card.split("```python\n")[1].split("```")[0].replace('"field"', f'"{result.folder}"')
    exec(compile(code, "card", "exec"), scope := {"array": arrays[0]})
    assert scope["reconstruction"].shape == (1, 120, 1)
