"""Tests the plots of fields."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dfn_hf.cli.app import app
from dfn_hf.data.fields import array_field, psnr, snr
from dfn_hf.plots.fields import MAX_ARROWS, plot_field, read_field
from dfn_hf.training.field import new_field_model

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def image():
    y, x = np.mgrid[:12, :20]
    return np.where(x > y + 4, 220, 30).astype(np.uint8)


@pytest.fixture(scope="module")
def model(image):
    return new_field_model([image[..., None]], num_samples=240, **SMALL).eval()


def test_reading_equals_the_model_outputs(model, image):
    reading = read_field(model, image, layer=1, head=1)
    field = array_field(image, 2)
    with torch.no_grad():
        outputs = model(field["coordinates"][None], field["values"][None], output_entities=True)
    assert reading.values.shape == reading.reconstruction.shape == (12, 20, 1)
    assert np.array_equal(reading.density, outputs.density[0].view(12, 20).numpy())
    assert np.array_equal(reading.reconstruction, outputs.reconstruction[0].view(12, 20, 1).numpy())
    assert reading.density.sum() == pytest.approx(15, abs=1e-3)
    assert reading.entities.shape == (15, 2) and (reading.entities >= 0).all()
    assert (reading.entities <= (11, 19)).all()
    assert np.allclose(reading.moved_positions, outputs.entities[1].moved_positions[0, 1].numpy())
    assert reading.decibels == pytest.approx(psnr(outputs.reconstruction[0], field["values"]))
    assert reading.title == "layer 2 of 2, head 2 of 2"


def test_entities_have_the_coordinates_of_their_samples(image):
    model = new_field_model([image[..., None]], num_samples=240, entity_sampling="token", **SMALL).eval()
    places = {tuple(place) for place in read_field(model, image).entities.round(3).tolist()}
    assert places == {(float(y), float(x)) for y in range(12) for x in range(20)}


def test_plots_of_images_and_waveforms(model, image, tmp_path):
    figure = plot_field(read_field(model, image), path=str(tmp_path / "image.png"))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:2] == ["12 × 20 samples", "15 entities"] and "PSNR" in titles[2]
    assert (tmp_path / "image.png").stat().st_size > 20_000
    wide = plot_field(read_field(model, image[:4])).axes
    assert wide[0].get_position().y0 > wide[1].get_position().y1 > wide[2].get_position().y1
    colour = new_field_model([np.zeros((4, 4, 3))], num_samples=16, num_entities=4, **SMALL).eval()
    assert plot_field(read_field(colour, np.random.default_rng(0).normal(size=(6, 6, 3)) * 5)).axes

    wave = np.sin(np.linspace(0, 40, 700))
    ear = new_field_model([wave[:, None]], num_samples=700, num_entities=MAX_ARROWS + 1, **SMALL).eval()
    reading = read_field(ear, wave)
    assert reading.values.shape == (700, 1) and reading.density.shape == (700,)
    assert reading.decibels == pytest.approx(
        snr(torch.from_numpy(reading.reconstruction), torch.from_numpy(reading.values))
    )
    titles = [axes.get_title(loc="left") for axes in plot_field(reading).axes]
    assert titles[0] == "700 samples, 301 entities" and "1 in 2 entities" in titles[2]


def test_plots_of_constant_fields(model):
    for value, side in ((0.5, 8), (7.0, 8), (0.5, 1)):
        reading = read_field(model, np.full((side, side), value))
        assert np.isfinite(reading.reconstruction).all()
        assert plot_field(reading).axes
    exact = torch.ones(3, 1)
    assert psnr(exact, exact) == snr(exact, exact) == float("inf") and snr(exact, 0 * exact) == -float("inf")


def test_plot_command(model, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("my-field")
    Image.fromarray(image).save("cat.png")
    result = CliRunner().invoke(app, ["plot", "my-field", "picture.png", "--field", "cat.png"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    more = ["plot", "my-field", "more.svg", "--field", "cat.png", "--num-entities", "60", "--layer", "1"]
    assert CliRunner().invoke(app, more).exit_code == 0
    np.save("sound.npy", np.zeros(9))
    for arguments, said in (
        (["my-field", "picture.png", "--field", "cat.png"], "exists"),
        (["my-field", "a.txt", "--field", "cat.png"], "end the name in"),
        (["my-field", "a.png", "--field", "dog.png"], "there is no file or folder"),
        (["my-field", "a.png", "--field", "sound.npy"], "sound.npy has 1 axes, and the model's fields have 2"),
        (["my-field", "a.png", "--field", "cat.png", "--layer", "2"], "layers 0 to 1"),
        (["my-field", "a.png", "--field", "cat.png", "--text", "Out"], "give one"),
        (["my-field", "a.png", "--num-entities", "3"], "--num-entities needs --field"),
        (["my-field", "a.png", "--field", "cat.png", "--num-entities", "241"], "cat.png has 240 samples"),
        (["dfn-tiny", "a.png", "--field", "cat.png"], "not a model of fields"),
    ):
        result = CliRunner().invoke(app, ["plot", *arguments])
        assert result.exit_code == 1 and said in result.output, (arguments, result.output)


def test_errors_name_the_argument(model, image):
    with pytest.raises(ValueError, match="head is 2"):
        read_field(model, image, head=2)
    with pytest.raises(ValueError, match="value_dim"):
        read_field(model, np.zeros((4, 4, 3)))
    clip = new_field_model([np.zeros((2, 3, 4, 1))], num_samples=24, **SMALL)
    with pytest.raises(ValueError, match="3 axes"):
        read_field(clip, np.zeros((2, 3, 4)))
