"""DFNConfig: defaults, validation and serialisation."""

import json
import logging
from ast import literal_eval

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from dfn_hf import DFNConfig, DFNForCausalLM, DFNForContrastive, DFNForSequenceClassification, DFNModel
from dfn_hf.modeling.dfn.configuration_dfn import AUTO_MAP

CHANGED = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 7,
    "position_dim": 2,
    "num_neighbors": 0,
    "local_window": 1,
    "num_leaves": 3,
    "flow_step": 0,
    "moved_query": False,
    "flow_norm": "running",
    "conv_kernel": 1,
    "output_gate": False,
    "gated_mlp": True,
    "search_implementation": "exact",
    "carry_positions": True,
    "memory_slots": 2,
    "memory_chunk": 2,
    "memory_decay": 0.5,
    "readout_window": 4,
    "hidden_dropout": 0,
    "attention_dropout": 0.5,
    "norm_eps": 1e-5,
    "initializer_range": 1,
    "tie_word_embeddings": False,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
SAMPLED = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "is_causal": False,
    "entity_sampling": "adaptive",
    "entity_rate": 0.4,
    "max_entity_length": 9,
    "ratio_loss_coef": 0.1,
    "num_sample_layers": 2,
    "sample_intermediate_size": 20,
    "coordinate_dim": 1,
    "value_dim": 3,
    "num_entities": 10,
    "projection_dim": 12,
    "contrastive_fields": True,
}


@pytest.mark.parametrize("model_class", [DFNModel, DFNForCausalLM, DFNForSequenceClassification])
def test_default_model_runs(model_class):
    model = model_class(DFNConfig()).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6
    with torch.no_grad():
        outputs = model(torch.randint(4096, (1, 40)))
    assert outputs[0].isfinite().all()


@pytest.mark.parametrize("fields", [{}, CHANGED, SAMPLED])
def test_round_trip_through_json(fields, tmp_path):
    config = DFNConfig(**fields)
    for name, value in fields.items():
        assert getattr(config, name) == value
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "dfn" and written["auto_map"] == AUTO_MAP
    for loaded in (AutoConfig.from_pretrained(tmp_path), DFNConfig.from_dict(config.to_dict())):
        assert type(loaded) is DFNConfig
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_every_field_changes_and_is_documented():
    own = {name for name in DFNConfig.__annotations__ if name != "auto_map"}
    assert own == set(CHANGED) | set(SAMPLED)
    assert all(f"{name} (`" in DFNConfig.__doc__ or f"{name}, " in DFNConfig.__doc__ for name in own)


def test_docstring_states_the_defaults():
    for line in DFNConfig.__doc__.splitlines():
        if ", defaults to `" in line:
            names, default = line.split(" (`")[0].strip(), line.split("defaults to ")[1].split(")")[0]
            stated = literal_eval(default.strip("`"))
            assert all(getattr(DFNConfig(), name) == stated for name in names.split(", ")), names


def test_contrastive_model_uses_the_sampling_options():
    model = DFNForContrastive(DFNConfig(**SAMPLED))
    views = model(torch.randint(50, (2, 30)), pair_coordinates=torch.rand(2, 40, 1), pair_values=torch.randn(2, 40, 3))
    assert views.embeds.shape == views.pair_embeds.shape == (2, 12)


def test_model_runs_with_every_option_changed():
    model = DFNForCausalLM(DFNConfig(**CHANGED)).eval()
    with torch.no_grad():
        assert model(torch.randint(50, (2, 30))).logits.shape == (2, 30, 50)


def test_auto_map_keeps_other_entries():
    config = DFNConfig(auto_map={"AutoTokenizer": "tokenization.Tokenizer"})
    assert config.auto_map == {**AUTO_MAP, "AutoTokenizer": "tokenization.Tokenizer"}


def test_unknown_fields_are_kept():
    config = DFNConfig(note="mine", id2label={0: "a", 1: "b", 2: "c"})
    assert config.note == "mine" and config.num_labels == 3
    assert DFNConfig.from_dict(config.to_dict()).note == "mine"


@pytest.mark.parametrize(
    ("fields", "expected_parts"),
    [
        *(
            ({name: 0}, [name, "at least 1", "0"])
            for name in (
                "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "position_dim", "local_window", "num_leaves", "conv_kernel", "readout_window",
            )
        ),
        *(({name: -1}, [name, "not negative", "-1"]) for name in ("num_neighbors", "memory_slots")),
        *(
            ({name: value}, [name, "finite and not negative", str(value)])
            for name in ("flow_step", "initializer_range")
            for value in (-0.5, float("nan"), float("inf"))
        ),
        *(({"norm_eps": value}, ["norm_eps", "positive", str(value)]) for value in (0, -1e-6, float("nan"))),
        *(
            ({name: value}, [name, "[0, 1)", str(value)])
            for name in ("hidden_dropout", "attention_dropout")
            for value in (1, -0.1, float("nan"))
        ),
        *(({"memory_decay": value}, ["memory_decay", "(0, 1)", str(value)]) for value in (0, 1, -2.0)),
        ({"memory_chunk": 1}, ["memory_chunk", "at least 2", "1"]),
        ({"hidden_size": 10, "num_attention_heads": 4}, ["hidden_size", "10", "num_attention_heads", "4"]),
        ({"flow_norm": "layer"}, ["flow_norm", "'layer'", "'entity'"]),
        ({"search_implementation": "fast"}, ["search_implementation", "'fast'", "'tree'", "'exact'"]),
        ({"num_leaves": 1025}, ["num_leaves", "at most 1024", "1025"]),
        ({"position_dim": 1025}, ["position_dim", "at most 1024", "1025"]),
        ({"vocab_size": 9, "pad_token_id": 9}, ["pad_token_id", "9", "vocab_size"]),
        ({"pad_token_id": -1}, ["pad_token_id", "-1"]),
    ],
)  # fmt: skip
def test_messages_name_field_and_value(fields, expected_parts):
    with pytest.raises(ValueError) as error:
        DFNConfig(**fields)
    for part in expected_parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("fields", "expected_parts"),
    [
        ({"hidden_size": "wide"}, ["hidden_size", "int", "wide"]),
        ({"hidden_size": 16.0}, ["hidden_size", "int", "16.0"]),
        ({"num_neighbors": None}, ["num_neighbors", "int", "None"]),
        ({"num_leaves": 1.0}, ["num_leaves", "int", "1.0"]),
    ],
)
def test_messages_name_wrong_types(fields, expected_parts):
    with pytest.raises(StrictDataclassError) as error:
        DFNConfig(**fields)
    for part in expected_parts:
        assert part in str(error.value)


CELL_OPTIONS = {"num_tables": 16, "candidates_per_table": 8, "cell_sizes": [2.0, 1], "search_seed": 3}


@pytest.mark.parametrize("search", ["cells", "exact"])
def test_configuration_of_an_earlier_version_loads(search, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers_logging.warning_once.cache_clear()
    DFNConfig(num_neighbors=5).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | CELL_OPTIONS | {"search_implementation": search}))
    for _ in range(2):
        config = AutoConfig.from_pretrained(tmp_path)
    assert config.search_implementation == ("tree" if search == "cells" else "exact") and config.num_neighbors == 5
    (message,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert all(name in message for name in ("search_implementation", "'cells'", "'tree'", *CELL_OPTIONS))
    config.save_pretrained(tmp_path)
    assert not CELL_OPTIONS.keys() & json.loads(path.read_text()).keys()


def test_saving_validates_changed_fields(tmp_path):
    config = DFNConfig()
    config.num_attention_heads = 7
    with pytest.raises(StrictDataclassError, match="num_attention_heads"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
