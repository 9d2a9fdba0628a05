"""A saved folder carries the code: it loads with `trust_remote_code` where dfn_hf cannot be imported."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM

from dfn_hf import DFNConfig, DFNForCausalLM, DFNForSequenceClassification, DFNModel
from dfn_hf.modeling.configuration_dfn import AUTO_MAP

CODE = {
    "attention_kernel.py",
    "causal_conv.py",
    "chunk_memory.py",
    "configuration_dfn.py",
    "flow_attention.py",
    "flow_search.py",
    "model_inputs.py",
    "modeling_dfn.py",
    "native_library.py",
    "padding.py",
    "rms_norm.py",
    "search_kernel.py",
    "state_cache.py",
}

# Runs in an empty folder, with dfn_hf out of reach, on the folders that the test has saved.
CONSUMER = """
import sys
sys.modules["dfn_hf"] = None
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache,
)

saved, again = sys.argv[1:]
expected = torch.load(f"{saved}/expected.pt", weights_only=True)
ids, mask = expected["ids"], expected["mask"]
trusted = {"trust_remote_code": True, "dtype": torch.float64}


def load(auto_class, folder):
    model = auto_class.from_pretrained(folder, **trusted).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model


def check(actual, name):
    assert torch.allclose(actual, expected[name], atol=1e-9, rtol=0), name


config = AutoConfig.from_pretrained(f"{saved}/causal", trust_remote_code=True)
assert config.model_type == "dfn" and config.memory_slots == 2

with torch.no_grad():
    check(load(AutoModel, f"{saved}/causal")(ids).last_hidden_state, "states")
    check(load(AutoModelForSequenceClassification, f"{saved}/classes")(ids, attention_mask=mask).logits, "classes")
    model = load(AutoModelForCausalLM, f"{saved}/causal")
    model.save_pretrained(again)
    for model in (model, load(AutoModelForCausalLM, again)):
        check(model(ids, attention_mask=mask).logits, "logits")
        cache = DynamicCache(config=model.config)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([20, 1, 9], dim=1)]
        check(torch.cat(pieces, dim=1), "unpadded")
        for name, options in expected["ways"].items():
            assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected[name]), name
model.train().gradient_checkpointing_enable()
model(ids, labels=ids).loss.backward()
"""

WAYS = {
    "greedy": {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0},
    "beams": {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "num_beams": 3},
}


def make(model_class):
    torch.manual_seed(0)
    config = DFNConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        local_window=3, num_neighbors=4, memory_slots=2, memory_chunk=4, num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    return model_class(config).double().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    causal, classes = make(DFNForCausalLM), make(DFNForSequenceClassification)
    causal.save_pretrained(folder / "causal")
    classes.save_pretrained(folder / "classes")
    ids = torch.randint(1, 40, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        expected = {
            "ids": ids,
            "mask": mask,
            "states": causal.model(ids).last_hidden_state,
            "logits": causal(ids, attention_mask=mask).logits,
            "unpadded": causal(ids).logits,
            "classes": classes(ids, attention_mask=mask).logits,
            "ways": WAYS,
        } | {name: causal.generate(ids, attention_mask=mask, **options) for name, options in WAYS.items()}
    torch.save(expected, folder / "expected.pt")
    return folder


@pytest.mark.parametrize("model_class", [DFNModel, DFNForCausalLM, DFNForSequenceClassification])
def test_every_head_saves_all_code_and_every_entry(model_class, tmp_path):
    make(model_class).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for entry in AUTO_MAP.values():
        module, name = entry.split(".")
        assert f"class {name}" in (tmp_path / f"{module}.py").read_text()


def test_loads_where_the_package_is_not_installed(saved, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = tmp_path / "again"
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CONSUMER), saved, again],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not initialized" not in result.stderr and "not used" not in result.stderr
    # What was saved there is as complete, and opens with the installed package too.
    assert {path.name for path in again.glob("*.py")} == CODE
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
    model = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float64)
    assert type(model) is DFNForCausalLM
    expected = torch.load(saved / "expected.pt", weights_only=True)
    with torch.no_grad():
        assert torch.allclose(model(expected["ids"]).logits, expected["unpadded"], atol=1e-9, rtol=0)
