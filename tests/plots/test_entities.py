"""Tests the plot of entities over bytes."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.cli.app import app
from dfn_hf.plots.entities import byte_symbols, plot_entities, read_entities
from dfn_hf.presets import new_causal_lm

TEXT = "Round about the cauldron go;\nIn the poison’d entrails throw."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("byte")


@pytest.fixture(scope="module")
def model(tokenizer):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return new_causal_lm(tokenizer, entity_sampling="adaptive", max_entity_length=6, entity_rate=0.3, **shape).eval()


def test_reading_equals_the_model_outputs(model, tokenizer):
    reading = read_entities(model, tokenizer, TEXT, layer=1, head=1)
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        outputs = model(ids, output_entities=True)
    data = TEXT.encode()
    assert len(reading.symbols) == len(reading.boundary_probs) == len(reading.boundary_mask) == len(data)
    assert np.array_equal(reading.boundary_mask, outputs.boundary_mask[0].bool().numpy())
    assert np.allclose(reading.boundary_probs, outputs.boundary_probs[0].numpy(), atol=1e-5)
    assert reading.rest_positions.shape == (len(reading.spans), model.config.position_dim)
    assert np.allclose(reading.moved_positions, outputs.entities[1].moved_positions[0, 1].numpy(), atol=1e-5)
    last = int(np.flatnonzero(reading.boundary_mask)[-1])
    assert sum(len(span.encode()) for span in reading.spans if "\ufffd" not in span) <= last + 1
    assert reading.spans[0] == TEXT[0]
    assert reading.rate == pytest.approx(len(reading.spans) / len(data))


def test_every_byte_has_a_visible_symbol():
    assert byte_symbols("a\n’b") == ["a", "↵", "’", "", "", "b"]


def test_plot_command(model, tokenizer, tmp_path):
    folder, picture = tmp_path / "model", tmp_path / "picture.png"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = CliRunner().invoke(app, ["plot", str(folder), str(picture), "--text", TEXT])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    again = CliRunner().invoke(app, ["plot", str(folder), str(picture)])
    assert again.exit_code == 1 and "exists" in again.output
    of_tokens = tmp_path / "tokens.png"
    assert CliRunner().invoke(app, ["plot", "dfn-tiny", str(of_tokens)]).exit_code == 0
    assert of_tokens.stat().st_size > 20_000


def test_errors_name_the_argument(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="text"):
        read_entities(model, tokenizer, "")
    with pytest.raises(ValueError, match="layer"):
        read_entities(model, tokenizer, TEXT, layer=2)
    with pytest.raises(ValueError, match="bytes"):
        read_entities(model, load_tokenizer("bpe"), TEXT)
    with pytest.raises(ValueError, match="entity_sampling"):
        read_entities(new_causal_lm(tokenizer, hidden_size=16, num_hidden_layers=1), tokenizer, TEXT)
    for arguments, said in (
        (["flownetwork-tiny", "a.png"], "only a DFN"),
        (["dfn-tiny", "a.txt"], "end the name in"),
    ):
        result = CliRunner().invoke(app, ["plot", *arguments])
        assert result.exit_code == 1 and said in result.output
    assert plot_entities(read_entities(model, tokenizer, TEXT)).axes
