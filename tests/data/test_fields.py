"""Tests the conversion of images, arrays and sound to fields, and the field collator."""

import math
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from dfn_hf.data.fields import FieldCollator, array_field, grid_coordinates, image_field, psnr, snr, sound_field


def test_coordinates_have_equal_steps_and_the_longest_axis_spans_the_range():
    coordinates = grid_coordinates(3, 5).view(3, 5, 2)
    assert torch.equal(coordinates[..., 1], torch.linspace(-1, 1, 5).expand(3, 5))
    assert torch.equal(coordinates[:, 0, 0], torch.tensor([-0.5, 0.0, 0.5]))
    assert grid_coordinates(1).tolist() == [[0.0]]
    with pytest.raises(ValueError, match="sizes"):
        grid_coordinates()
    with pytest.raises(ValueError, match="sizes"):
        grid_coordinates(3, 0)


def test_integers_are_scaled_from_their_range_and_floats_are_kept():
    field = array_field(np.array([[0, 255], [51, 204]], dtype=np.uint8), 2)
    assert torch.allclose(field["values"], torch.tensor([[-1.0], [1.0], [-0.6], [0.6]]))
    assert array_field(torch.full((2, 3, 4, 5), 7.5), 3)["values"].shape == (24, 5)
    assert array_field(np.full(4, 7.5), 1)["values"].eq(7.5).all()
    with pytest.raises(ValueError, match="coordinate_dim"):
        array_field(np.zeros(4), 2)


def test_images_are_read(tmp_path):
    from PIL import Image

    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    colour, grey = image_field(tmp_path / "colour.png"), image_field(tmp_path / "grey.png")
    assert torch.allclose(colour["values"], torch.from_numpy(pixels.reshape(8, 3) / 127.5 - 1).float(), atol=1e-6)
    assert torch.equal(grey["values"], colour["values"][:, :1]) and grey["coordinates"].shape == (8, 2)
    with pytest.raises(ValueError, match="missing.png cannot be read .No such file"):
        image_field(tmp_path / "missing.png")


@pytest.mark.parametrize(("width", "dtype", "high"), [(1, "u1", 255), (2, "<i2", 2**15 - 1), (3, None, None)])
def test_sound_is_read(tmp_path, width, dtype, high):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(8000)
        samples = np.array([0, high] * 5, dtype=dtype).tobytes() if dtype else bytes(30)
        file.writeframes(samples)
    if dtype is None:
        with pytest.raises(ValueError, match="24 bits"):
            sound_field(path)
        return
    field = sound_field(path)
    assert field["coordinates"].shape == (5, 1) and field["values"].shape == (5, 2)
    assert field["values"][0, 0] == pytest.approx(-1 if width == 1 else 0, abs=1e-4) and field["values"][0, 1] == 1


def test_files_without_sound_are_rejected(tmp_path):
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(ValueError, match="not a PCM WAV file"):
        sound_field(tmp_path / "text.wav")


def test_psnr_and_snr():
    values = torch.tensor([[1.0], [-1.0]])
    assert psnr(values + 0.02, values) == pytest.approx(40)
    assert psnr(values + 0.01, values, value_range=1.0) == pytest.approx(40)
    assert snr(values * 1.1, values) == pytest.approx(20, abs=1e-4)


def test_fields_of_different_sizes_are_padded():
    fields = [array_field(np.full((2, 3), 0.5), 2), array_field(np.full((2, 2), 0.25), 2)]
    batch = FieldCollator()(fields)
    assert {name: tuple(x.shape) for name, x in batch.items()} == {
        "coordinates": (2, 6, 2),
        "values": (2, 6, 1),
        "mask": (2, 6),
        "labels": (2, 6, 1),
    }
    assert batch["mask"].sum(dim=1).tolist() == [6, 4]
    assert torch.equal(batch["labels"].isnan()[..., 0], ~batch["mask"])


@pytest.mark.parametrize("share", [0.25, 0.75, 0.999])
def test_loss_scores_the_masked_samples(share):
    torch.manual_seed(0)
    fields = [array_field(np.full((4, 5), 0.5), 2), array_field(np.full((2, 2), 0.25), 2)]
    first, second = FieldCollator(share)(fields), FieldCollator(share)(fields)
    for row, length in enumerate((20, 4)):
        given = first["mask"][row]
        assert given.sum() == max(1, length - round(share * length))
        assert torch.equal(first["labels"][row, :length, 0].isnan(), given[:length])
        assert first["labels"][row, length:].isnan().all()
    assert share > 0.9 or not torch.equal(first["mask"], second["mask"])


def test_mask_of_a_field_is_used():
    mask = torch.tensor([True, False, True, False])
    batch = FieldCollator(0.5)([array_field(np.zeros((2, 2)), 2) | {"mask": mask}])
    assert torch.equal(batch["mask"][0], mask) and torch.equal(batch["labels"][0, :, 0].isnan(), mask)
    with pytest.raises(ValueError, match="mask_ratio"):
        FieldCollator(1.0)
    assert math.isnan(batch["labels"][0, 0, 0])


def test_dtypes_without_a_value_range_are_rejected():
    for array in (np.zeros((2, 2), np.int64), np.zeros((2, 2), complex), np.zeros((0, 3))):
        with pytest.raises(ValueError, match="range|no samples"):
            array_field(array, 2)
    for array in (np.array([[False, True]]), np.array([[0, 65535]], np.uint16), np.array([[-32768, 32767]], np.int16)):
        assert array_field(array, 2)["values"].flatten().tolist() == [-1, 1]


def test_grey_images_of_all_bit_depths_have_one_value_per_sample(tmp_path):
    grey = (np.arange(12).reshape(3, 4) * 20).astype(np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey).convert("LA").save(tmp_path / "alpha.png")
    for name in ("deep.png", "alpha.png"):
        values = image_field(tmp_path / name)["values"]
        assert torch.allclose(values, torch.from_numpy(grey).float().reshape(-1, 1) / 127.5 - 1, atol=1e-6)
