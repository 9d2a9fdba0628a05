"""Tests `dfn-hf train field` and `dfn-hf train contrastive`."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dfn_hf import DFNConfig, DFNForContrastive, DFNForFieldReconstruction
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.cli.app import app
from dfn_hf.data.contrastive import ContrastiveCollator
from dfn_hf.data.fields import image_field
from dfn_hf.data.pairs import load_pairs
from dfn_hf.evaluation.retrieval_metrics import embed
from dfn_hf.training.recipes import field_options, pair_rows, side_views

SMALL = [f"--config-override={field}" for field in ("hidden_size=16", "num_hidden_layers=1", "intermediate_size=16")]
WORDS = ("dark", "dim", "grey", "light", "bright", "white", "black", "odd")


def train(*arguments):
    steps = ["--max-steps", "2", "--batch-size", "2", "--save-steps", "1"]
    return CliRunner().invoke(app, ["train", *map(str, arguments), *steps, *SMALL])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder with images and a JSON Lines file of pairs with their paths."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(48):
        word = number % len(WORDS)
        pixels = (rng.random((5 + number % 3, 6)) * 20 + 30 * word).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "caption": f"it is {WORDS[word]}"})
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def losses(output):
    found = re.search(r"validation loss (\S+) → (\S+) (.*)", output)
    return float(found[1]), float(found[2]), found[3]


def test_train_field(pictures, tmp_path):
    folder = tmp_path / "my-field"
    arguments = ("field", folder, "--data", pictures, "--num-samples", "32")
    result = train(*arguments)
    assert result.exit_code == 0, result.output
    before, after, unit = losses(result.output)
    assert before > 0 and after > 0 and unit == "mean squared error"
    config = DFNForFieldReconstruction.from_pretrained(folder).config
    assert (config.coordinate_dim, config.value_dim, config.num_entities) == (2, 1, 2)
    assert "in crops of 32 samples, from scratch." in (folder / "README.md").read_text()
    again = train(*arguments)
    assert again.exit_code == 1 and "--overwrite" in again.output
    masked = train(*arguments, "--mask-ratio", "0.75", "--overwrite", "--config-override", "num_entities=3")
    assert masked.exit_code == 0, masked.output
    assert DFNForFieldReconstruction.from_pretrained(folder).config.num_entities == 3
    one_file = train("field", tmp_path / "one", "--data", pictures / "1.png")
    assert one_file.exit_code == 0, one_file.output


@pytest.mark.parametrize("turned", [False, True])
def test_train_contrastive_on_images_and_captions(pictures, tmp_path, turned):
    sides = ("caption", "image") if turned else ("image", "caption")
    result = train(
        "contrastive", tmp_path / "embedder", "--data", pictures / "pairs.jsonl", "--tokenizer", "byte",
        "--source-field", sides[0], "--target-field", sides[1], "--config-override", "projection_dim=8",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    before, after, unit = losses(result.output)
    assert before > 0 and after > 0 and unit == "nats per pair"
    model = DFNForContrastive.from_pretrained(tmp_path / "embedder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "embedder")
    assert model.config.contrastive_fields and (model.config.coordinate_dim, model.config.value_dim) == (2, 1)
    collator = ContrastiveCollator(tokenizer.pad_token_id)
    assert embed(model, [image_field(pictures / "3.png")], collator).shape == (1, 8)
    assert embed(model, [{"input_ids": tokenizer("it is odd")["input_ids"]}], collator).shape == (1, 8)


def test_train_contrastive_on_texts(tmp_path):
    pairs = [{"source": f"verse {number}", "target": f"verso {number}"} for number in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    result = train("contrastive", tmp_path / "embedder", "--data", tmp_path)
    assert result.exit_code == 0, result.output
    assert not DFNForContrastive.from_pretrained(tmp_path / "embedder").config.contrastive_fields


def test_sides_with_file_paths_become_fields(pictures):
    tokenizer = load_tokenizer("byte")
    pairs = load_pairs(pictures / "pairs.jsonl", source_field="image", target_field="caption")
    rows = pair_rows(pairs, pictures, tokenizer, 5)
    assert torch.equal(rows[7]["values"], image_field(pictures / "7.png")["values"])
    assert [len(row["pair_input_ids"]) for row in rows] == 48 * [5]
    assert field_options(rows) == {"contrastive_fields": True, "coordinate_dim": 2, "value_dim": 1}
    assert field_options(side_views(["7.png", "a text"], pictures, tokenizer, 5)) == {}
    np.save(pictures / "sound.npy", np.zeros(9, dtype=np.float32))
    with pytest.raises(ValueError, match=r"fields with .axes, values. .*\(1, 1\), \(2, 1\)"):
        field_options(side_views(["7.png", "sound.npy"], pictures, tokenizer, 5))
    with pytest.raises(ValueError, match=r"missing\.wav does not exist"):
        side_views(["missing.wav"], pictures, tokenizer, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["field", "OUT", "--data", "nowhere"], "there is no file or folder"),
        (["contrastive", "OUT", "--data", "nowhere"], "there is no file or folder"),
        (["contrastive", "OUT", "--source-field", "en"], "add --data"),
        (["contrastive", "OUT", "--config-override", "width=3"], "no field 'width'"),
        (["contrastive", "OUT", "--config-override", "vocab_size=9"], "vocab_size"),
    ],
)
def test_mistakes_are_rejected(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = train(*arguments)
    assert result.exit_code == 1 and message in result.output, (result.output, result.exception)
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["field", "OUT"],  # without --data
        ["field", "OUT", "--data", "a.png", "--mask-ratio", "2"],
        ["field", "OUT", "--data", "a.png", "--init-from", "dfn-tiny"],
        ["contrastive", "OUT", "--model", "llama"],
        ["contrastive", "OUT", "--size", "giant"],
        ["pictures", "OUT"],
    ],
)
def test_unknown_options_and_values_are_usage_errors(arguments):
    assert train(*arguments).exit_code == 2


def test_error_for_too_few_pairs_names_the_option(tmp_path):
    pairs = [{"source": f"verse {number}", "target": f"verso {number}"} for number in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    result = train("contrastive", tmp_path / "x", "--data", tmp_path)
    assert result.exit_code == 1 and "1 pairs to validate on but batch_size is 2" in result.output


def test_info_describes_models_without_language_head_and_generate_rejects_them(tmp_path):
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    DFNForFieldReconstruction(DFNConfig(**options)).save_pretrained(tmp_path / "field")
    DFNForContrastive(DFNConfig(**options)).save_pretrained(tmp_path / "pairs")
    for name, architecture in (("field", "DFNForFieldReconstruction"), ("pairs", "DFNForContrastive")):
        folder = str(tmp_path / name)
        described = CliRunner().invoke(app, ["info", folder])
        assert described.exit_code == 0 and "parameters" in described.output, described.output
        for command in (["generate", folder], ["evaluate", folder]):
            refused = CliRunner().invoke(app, command)
            assert refused.exit_code == 1 and f"is a {architecture}, a" in refused.output
