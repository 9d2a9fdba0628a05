"""Saved folders of DFN and FlowNetwork contain their code and load with `trust_remote_code` without dfn_hf."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dfn_hf import (
    DFNConfig,
    DFNForCausalLM,
    DFNForContrastive,
    DFNForFieldReconstruction,
    DFNForSequenceClassification,
    DFNModel,
    FlowNetworkConfig,
    FlowNetworkForCausalLM,
    FlowNetworkForSequenceClassification,
    FlowNetworkModel,
)
from dfn_hf.modeling.dfn import configuration_dfn
from dfn_hf.modeling.flownetwork import configuration_flownetwork


@dataclass(frozen=True)
class Case:
    """A family and the expected content of its saved folders.

    Attributes:
        config_class: configuration class.
        heads: the base model, `ForCausalLM` and `ForSequenceClassification`.
        fields: fields of a small configuration.
        auto_map: expected `auto_map`.
        code: expected code files.
    """

    config_class: type[PreTrainedConfig]
    heads: tuple[type[PreTrainedModel], ...]
    fields: dict
    auto_map: dict[str, str]
    code: set[str]

    def make(self, head: int) -> PreTrainedModel:
        torch.manual_seed(0)
        return self.heads[head](self.config_class(**COMMON_FIELDS, **self.fields)).double().eval()


COMMON_FIELDS = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "memory_chunk": 4,
    "num_labels": 3,
    "initializer_range": 0.5,
}
MODEL, CAUSAL, CLASSIFIER = range(3)

CASES = {
    "dfn": Case(
        DFNConfig,
        (DFNModel, DFNForCausalLM, DFNForSequenceClassification),
        {"local_window": 3, "num_neighbors": 4, "memory_slots": 2},
        configuration_dfn.AUTO_MAP,
        {"configuration_dfn.py", "dfn_kernels.py", "modeling_dfn.py"},
    ),
    "flownetwork": Case(
        FlowNetworkConfig,
        (FlowNetworkModel, FlowNetworkForCausalLM, FlowNetworkForSequenceClassification),
        {"flow_window": 6, "min_flow_window": 2, "base_sparsity": 0.4, "memory_size": 2, "num_memory_heads": 2},
        configuration_flownetwork.AUTO_MAP,
        {"configuration_flownetwork.py", "modeling_flownetwork.py"},
    ),
}

# Runs in an empty folder without access to dfn_hf; loads the folders that the test saved.
CONSUMER = """
import sys
sys.modules["dfn_hf"] = None
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
assert type(config).__module__.startswith("transformers_modules."), type(config)
assert expected["config"].items() <= config.to_dict().items()
assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type].endswith("ForCausalLM")

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
        for name, options in expected["generation_options"].items():
            assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected[name]), name
model.train().gradient_checkpointing_enable()
model(ids, labels=ids).loss.backward()
if config.model_type == "flownetwork":
    before = model.model.memory.memory_bank.clone()
    model.commit_memory()
    assert not torch.equal(model.model.memory.memory_bank, before)
"""

GENERATION_OPTIONS = {
    "greedy": {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0},
    "beams": {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "num_beams": 3},
}


@pytest.fixture(scope="module", params=CASES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    folder, case = tmp_path_factory.mktemp(family), CASES[family]
    causal, classes = case.make(CAUSAL), case.make(CLASSIFIER)
    causal.save_pretrained(folder / "causal")
    classes.save_pretrained(folder / "classes")
    ids = torch.randint(1, 40, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        expected = {
            "config": {"model_type": family} | case.fields,
            "ids": ids,
            "mask": mask,
            "states": causal.model(ids).last_hidden_state,
            "logits": causal(ids, attention_mask=mask).logits,
            "unpadded": causal(ids).logits,
            "classes": classes(ids, attention_mask=mask).logits,
            "generation_options": GENERATION_OPTIONS,
        } | {
            name: causal.generate(ids, attention_mask=mask, **options) for name, options in GENERATION_OPTIONS.items()
        }
    torch.save(expected, folder / "expected.pt")
    return folder


def assert_carries_its_code(folder, case):
    assert {path.name for path in folder.glob("*.py")} == case.code
    assert json.loads((folder / "config.json").read_text())["auto_map"] == case.auto_map


@pytest.mark.parametrize("head", [MODEL, CAUSAL, CLASSIFIER])
def test_every_head_saves_code_and_auto_map(family, head, tmp_path):
    case = CASES[family]
    case.make(head).save_pretrained(tmp_path)
    assert_carries_its_code(tmp_path, case)
    for entry in case.auto_map.values():
        module, name = entry.split(".")
        assert f"class {name}" in (tmp_path / f"{module}.py").read_text()


def test_folder_loads_without_this_package(family, saved, tmp_path):
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
    # The folder that the remote code saved is complete and loads with the installed package.
    assert_carries_its_code(again, CASES[family])
    for path in again.glob("*.py"):
        assert path.read_bytes() == (saved / "causal" / path.name).read_bytes(), path.name
    model = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float64)
    assert type(model) is CASES[family].heads[CAUSAL]
    expected = torch.load(saved / "expected.pt", weights_only=True)
    with torch.no_grad():
        assert torch.allclose(model(expected["ids"]).logits, expected["unpadded"], atol=1e-9, rtol=0)


def adaptive_model():
    return DFNForCausalLM(DFNConfig(**COMMON_FIELDS, local_window=4, entity_sampling="adaptive"))


def field_model():
    return DFNForFieldReconstruction(DFNConfig(**COMMON_FIELDS, num_entities=6, entity_sampling="adaptive"))


def pair_model():
    return DFNForContrastive(DFNConfig(**COMMON_FIELDS, projection_dim=8, contrastive_fields=True))


# Model, Auto class, input names, compared output.
HEADS = {
    "entities": (adaptive_model, "AutoModelForCausalLM", ["input_ids"], "logits"),
    "field": (field_model, "AutoModelForPreTraining", ["coordinates", "values"], "reconstruction"),
    "pairs": (pair_model, "AutoModelForTextEncoding", ["input_ids", "pair_coordinates", "pair_values"], "pair_embeds"),
}
LOAD_HEAD = """
import sys
sys.modules["dfn_hf"] = None
import torch, transformers
folder, auto_class, name = sys.argv[1:]
expected = torch.load(f"{folder}/expected.pt", weights_only=True)
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
with torch.no_grad():
    found = getattr(model(**expected["inputs"]), name)
    assert torch.allclose(found, expected["output"], atol=1e-9, rtol=0), (found - expected["output"]).abs().max()
"""


@pytest.mark.parametrize("name", HEADS)
def test_folders_of_other_heads_load_without_this_package(name, tmp_path):
    make, auto_class, arguments, output = HEADS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    model.save_pretrained(tmp_path)
    everything = {
        "input_ids": torch.randint(1, 40, (2, 30)),
        "coordinates": torch.rand(2, 40, 2).double(),
        "values": torch.randn(2, 40, 1).double(),
    }
    everything |= {f"pair_{argument}": everything[argument] for argument in ("coordinates", "values")}
    inputs = {argument: everything[argument] for argument in arguments}
    with torch.no_grad():
        torch.save({"inputs": inputs, "output": getattr(model(**inputs), output)}, tmp_path / "expected.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_HEAD, tmp_path, auto_class, output]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    loaded = getattr(transformers, auto_class).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
