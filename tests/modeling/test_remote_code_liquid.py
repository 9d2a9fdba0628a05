"""Saved folders of Liquid contain their code and load with `trust_remote_code` without dfn_hf."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dfn_hf import LiquidConfig, LiquidForSeq2SeqLM, LiquidForSequenceClassification
from dfn_hf.modeling.liquid.configuration_liquid import AUTO_MAP

CODE = {"configuration_liquid.py", "modeling_liquid.py"}

# Runs in an empty folder without access to dfn_hf; loads the folder that the test saved.
CONSUMER = """
import sys
sys.modules["dfn_hf"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

folder, again = sys.argv[1:]
expected = torch.load(f"{folder}/expected.pt", weights_only=True)
source, mask, target = expected["source"], expected["mask"], expected["target"]
trusted = {"trust_remote_code": True, "dtype": torch.float64}


def load(auto_class, folder):
    model = auto_class.from_pretrained(folder, **trusted).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model


def check(actual, name):
    assert torch.allclose(actual, expected[name], atol=1e-9, rtol=0), name


with torch.no_grad():
    inputs = {"attention_mask": mask, "decoder_input_ids": target}
    check(load(AutoModel, f"{folder}/seq2seq")(source, **inputs).last_hidden_state, "states")
    check(load(AutoModelForSequenceClassification, f"{folder}/classes")(source, attention_mask=mask).logits, "classes")
    model = load(AutoModelForSeq2SeqLM, f"{folder}/seq2seq")
    model.save_pretrained(again)
    for model in (model, load(AutoModelForSeq2SeqLM, again)):
        check(model(source, **inputs).logits, "logits")
        beams = model.generate(source, attention_mask=mask, num_beams=3, do_sample=False, max_new_tokens=8)
        assert torch.equal(beams, expected["beams"])
model.train()(source, labels=target).loss.backward()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("liquid")
    config = LiquidConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        attention_window=4, frame_length=8, decoder_frame_length=4, num_experts=3, num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LiquidForSeq2SeqLM(config).double().eval()
    classes = LiquidForSequenceClassification(config).double().eval()
    model.save_pretrained(folder / "seq2seq")
    classes.save_pretrained(folder / "classes")
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(1, 40, (2, length), generator=generator) for length in (30, 11))
    mask = torch.ones_like(source)
    mask[0, :6] = 0
    inputs = {"attention_mask": mask, "decoder_input_ids": target}
    with torch.no_grad():
        expected = {
            "source": source,
            "mask": mask,
            "target": target,
            "states": model.model(source, **inputs).last_hidden_state,
            "logits": model(source, **inputs).logits,
            "classes": classes(source, attention_mask=mask).logits,
            "beams": model.generate(source, attention_mask=mask, num_beams=3, do_sample=False, max_new_tokens=8),
        }
    torch.save(expected, folder / "expected.pt")
    return folder


@pytest.mark.parametrize("head", ["seq2seq", "classes"])
def test_every_head_saves_code_and_auto_map(folder, head):
    assert {path.name for path in (folder / head).glob("*.py")} == CODE
    assert json.loads((folder / head / "config.json").read_text())["auto_map"] == AUTO_MAP
    for entry in AUTO_MAP.values():
        module, name = entry.split(".")
        assert f"class {name}" in (folder / head / f"{module}.py").read_text()


def test_folder_loads_without_this_package(folder, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", CONSUMER, folder, tmp_path / "again"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not initialized" not in result.stderr and "not used" not in result.stderr
