"""FlowNetworkConfig: defaults, validation and serialisation; adjustment of heads."""

import json
import logging
import math
from ast import literal_eval

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from dfn_hf import (
    FlowNetworkConfig,
    FlowNetworkForCausalLM,
    FlowNetworkForSequenceClassification,
    FlowNetworkModel,
    adjust_num_heads,
)
from dfn_hf.modeling.flownetwork.configuration_flownetwork import AUTO_MAP

CHANGED = {
    "vocab_size": 50,
    "hidden_size": 26,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 7,
    "block_type": "flow_transformer",
    "num_patterns": 3,
    "base_sparsity": 1,
    "flow_window": 12,
    "min_flow_window": 12,
    "memory_size": 5,
    "num_memory_heads": 13,
    "memory_decay": 0.5,
    "memory_chunk": 2,
    "memory_bank_decay": 0.75,
    "max_position_embeddings": 100,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "hidden_dropout": 0.25,
    "attention_dropout": 0.5,
    "norm_eps": 1e-5,
    "initializer_range": 1,
    "tie_word_embeddings": False,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}


@pytest.mark.parametrize(
    "model_class", [FlowNetworkModel, FlowNetworkForCausalLM, FlowNetworkForSequenceClassification]
)
def test_models_with_default_configuration_run(model_class):
    model = model_class(FlowNetworkConfig()).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 6e6
    with torch.no_grad():
        outputs = model(torch.randint(4096, (1, 40)))
    assert outputs[0].isfinite().all()


@pytest.mark.parametrize("fields", [{}, CHANGED])
def test_round_trip_through_json(fields, tmp_path):
    config = FlowNetworkConfig(**fields)
    for name, value in fields.items():
        assert getattr(config, name) == value
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "flownetwork" and written["auto_map"] == AUTO_MAP
    for loaded in (AutoConfig.from_pretrained(tmp_path), FlowNetworkConfig.from_dict(config.to_dict())):
        assert type(loaded) is FlowNetworkConfig
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_every_field_is_settable_and_documented():
    own = {name for name in FlowNetworkConfig.__annotations__ if name != "auto_map"}
    assert own == set(CHANGED)
    documented = FlowNetworkConfig.__doc__
    assert all(f"{name} (`" in documented or f"{name}, " in documented for name in own)
    assert all(getattr(FlowNetworkConfig(), name) != value for name, value in CHANGED.items())


def test_defaults_match_the_docstring():
    for line in FlowNetworkConfig.__doc__.splitlines():
        if ", defaults to `" in line:
            names, default = line.split(" (`")[0].strip(), line.split("defaults to ")[1].split(")")[0]
            stated = literal_eval(default.strip("`"))
            assert all(getattr(FlowNetworkConfig(), name) == stated for name in names.split(", ")), names


def test_optional_fields_are_derived():
    config = FlowNetworkConfig(hidden_size=64, num_attention_heads=8)
    assert config.num_key_value_heads == 8 and config.head_dim == 8 and config.initializer_range == 1 / 8
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("memory_size", [0, 5])
def test_parameter_shapes_follow_the_fields(memory_size):
    model = FlowNetworkForCausalLM(FlowNetworkConfig(**CHANGED | {"memory_size": memory_size})).eval()
    assert (model.model.memory is None) == (memory_size == 0)
    with torch.no_grad():
        assert model(torch.randint(50, (2, 30))).logits.shape == (2, 30, 50)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_other_rotary_embeddings_run(rope_type):
    rope = {"rope_type": rope_type, "factor": 2.0}
    config = FlowNetworkConfig(**CHANGED | {"hidden_size": 24, "num_memory_heads": 2, "rope_parameters": rope})
    with torch.no_grad():
        assert FlowNetworkModel(config).eval()(torch.randint(50, (1, 200))).last_hidden_state.isfinite().all()


def test_auto_map_keeps_additional_entries():
    config = FlowNetworkConfig(auto_map={"AutoTokenizer": "tokenization.Tokenizer"})
    assert config.auto_map == {**AUTO_MAP, "AutoTokenizer": "tokenization.Tokenizer"}


def test_unknown_fields_are_kept():
    config = FlowNetworkConfig(note="mine", id2label={0: "a", 1: "b", 2: "c"})
    assert config.note == "mine" and config.num_labels == 3
    assert FlowNetworkConfig.from_dict(config.to_dict()).note == "mine"


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        *(
            ({name: value}, [f"`{name}`", "at least 1", str(value)])
            for name in (
                "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size", "num_patterns", "flow_window", "min_flow_window", "num_memory_heads",
                "max_position_embeddings",
            )
            for value in (0, -2)
        ),
        ({"memory_size": -1}, ["`memory_size`", "not negative", "-1"]),
        *(
            ({"initializer_range": value}, ["`initializer_range`", "finite and not negative", str(value)])
            for value in (-0.5, math.nan, math.inf)
        ),
        *(({"norm_eps": value}, ["`norm_eps`", "positive", str(value)]) for value in (0, -1e-6, math.nan, math.inf)),
        *(
            ({name: value}, [f"`{name}`", "[0, 1)", str(value)])
            for name in ("hidden_dropout", "attention_dropout")
            for value in (1, -0.1, math.nan)
        ),
        *(
            ({name: value}, [f"`{name}`", "(0, 1)", str(value)])
            for name in ("memory_decay", "memory_bank_decay")
            for value in (0, 1, -2.0, math.nan)
        ),
        *(({"base_sparsity": value}, ["`base_sparsity`", "(0, 1]", str(value)]) for value in (0, 1.5, -0.1, math.nan)),
        ({"block_type": "plain"}, ["`block_type`", "'plain'", "'enhanced_flow'", "'flow_transformer'"]),
        ({"memory_chunk": 1}, ["`memory_chunk`", "at least 2", "1"]),
        ({"flow_window": 5, "min_flow_window": 6}, ["`min_flow_window` (6)", "`flow_window` (5)"]),
        ({"vocab_size": 9, "pad_token_id": 9}, ["`pad_token_id`", "9", "`vocab_size` (9)"]),
        ({"pad_token_id": -1}, ["`pad_token_id`", "-1"]),
        *(
            (
                {"hidden_size": width, "num_attention_heads": 1, "num_memory_heads": 1, name: heads},
                [f"`{name}` ({heads})", f"`hidden_size` ({width})", f"; set it to {fits}."],
            )
            for name in ("num_attention_heads", "num_memory_heads")
            for width, heads, fits in ((65, 8, 5), (128, 12, 8), (7, 4, 1), (6, 9, 6))
        ),
        *(
            (
                {"hidden_size": 24, "num_attention_heads": heads, "num_key_value_heads": key_value_heads},
                [f"`num_key_value_heads` ({key_value_heads})", f"`num_attention_heads` ({heads})", f"to {fits}."],
            )
            for heads, key_value_heads, fits in ((12, 5, 4), (3, 2, 1), (4, 8, 4))
        ),
        (
            {
                "hidden_size": 10,
                "num_attention_heads": 2,
                "num_memory_heads": 1,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
            },
            ["`rope_parameters`", "'linear'", "even", "5", "`hidden_size` / `num_attention_heads`"],
        ),
    ],
)  # fmt: skip
def test_invalid_values_raise(fields, parts):
    with pytest.raises(ValueError) as error:
        FlowNetworkConfig(**fields)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"hidden_size": "wide"}, ["hidden_size", "int", "wide"]),
        ({"hidden_size": 16.0}, ["hidden_size", "int", "16.0"]),
        ({"flow_window": None}, ["flow_window", "int", "None"]),
        ({"block_type": 3}, ["block_type", "str", "3"]),
    ],
)
def test_wrong_types_raise(fields, parts):
    with pytest.raises(StrictDataclassError) as error:
        FlowNetworkConfig(**fields)
    for part in parts:
        assert part in str(error.value)


def test_invalid_changes_raise_at_saving(tmp_path):
    config = FlowNetworkConfig()
    config.num_attention_heads = 7
    with pytest.raises(StrictDataclassError, match="num_attention_heads"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


# Heads


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.mark.parametrize(
    ("d_model", "requested", "taken"),
    [(64, 8, 8), (65, 8, 5), (128, 12, 8), (7, 6, 1), (6, 40, 6), (1, 1, 1), (1, 8, 1), (97, 97, 97)],
)
def test_adjusted_heads_are_the_largest_divisor(d_model, requested, taken, log):
    assert adjust_num_heads(d_model, requested) == taken
    parts = [record.getMessage() for record in log.records]
    if taken == requested:
        assert not parts
    else:
        assert len(parts) == 1 and "\n" not in parts[0]
        assert all(str(number) in parts[0] for number in (d_model, requested, taken))


@pytest.mark.parametrize(("d_model", "requested"), [(64, 8), (65, 8), (128, 12), (39, 6)])
def test_configuration_accepts_adjusted_heads(d_model, requested):
    heads = adjust_num_heads(d_model, requested)
    config = FlowNetworkConfig(hidden_size=d_model, num_attention_heads=heads, num_memory_heads=heads, vocab_size=9)
    with torch.no_grad():
        assert FlowNetworkModel(config).eval()(torch.zeros(1, 5).long()).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(("d_model", "requested"), [(0, 4), (-8, 4), (8, 0), (8, -1)])
def test_heads_below_1_raise(d_model, requested):
    with pytest.raises(ValueError) as error:
        adjust_num_heads(d_model, requested)
    assert f"({d_model})" in str(error.value) and f"({requested})" in str(error.value)
