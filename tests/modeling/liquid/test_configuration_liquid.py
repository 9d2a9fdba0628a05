"""LiquidConfig: defaults, validation and serialisation."""

import json
import math
from ast import literal_eval

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, DynamicCache

from dfn_hf import LiquidConfig
from dfn_hf.modeling.liquid.configuration_liquid import AUTO_MAP

CHANGED = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_decoder_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 7,
    "attention_window": 9,
    "max_position_embeddings": 100,
    "learned_positions": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "frame_length": 16,
    "decoder_frame_length": 2,
    "base_compression_ratio": 0.75,
    "min_compression_ratio": 0.25,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 5,
    "dynamic_experts": False,
    "normalize_expert_weights": False,
    "max_expert_load": 1,
    "router_entropy_coef": 0.5,
    "router_aux_loss_coef": 0,
    "reconstruction_loss_coef": 1,
    "conv_kernel": 5,
    "conv_dilation": 2,
    "max_offset": 0.5,
    "lstm_hidden_size": 11,
    "num_lstm_layers": 2,
    "finite_check": "zero",
    "hidden_dropout": 0.25,
    "attention_dropout": 0.5,
    "norm_eps": 1e-5,
    "initializer_range": 1,
    "tie_word_embeddings": False,
    "output_router_logits": True,
    "use_cache": False,
    "decoder_start_token_id": 4,
    "pad_token_id": 5,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
OWN = {name for name in LiquidConfig.__annotations__ if name not in ("auto_map", "is_encoder_decoder")}


def test_defaults_are_valid():
    config = LiquidConfig()
    assert config.model_type == "liquid" and config.is_encoder_decoder and config.auto_map == AUTO_MAP


@pytest.mark.parametrize("fields", [{}, CHANGED, {"num_hidden_layers": 2, "num_decoder_layers": 5}])
def test_round_trip_through_json(fields, tmp_path):
    config = LiquidConfig(**fields)
    for name, value in fields.items():
        assert getattr(config, name) == value
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "liquid" and written["auto_map"] == AUTO_MAP
    for loaded in (AutoConfig.from_pretrained(tmp_path), LiquidConfig.from_dict(config.to_dict())):
        assert type(loaded) is LiquidConfig
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_every_field_is_settable_and_documented():
    assert set(CHANGED) == OWN
    documented = LiquidConfig.__doc__
    assert all(f"{name} (`" in documented or f"{name}, " in documented for name in OWN)
    assert all(getattr(LiquidConfig(), name) != value for name, value in CHANGED.items())


def test_defaults_match_the_docstring():
    stated = {}
    for line in LiquidConfig.__doc__.splitlines():
        if ", defaults to " in line or ", *optional*" in line:
            names, rest = line.strip().split(" (`", 1)
            given = rest.split(")")[0]  # `type`, defaults to value
            default = given.split("defaults to ")[1].strip("`") if "defaults to " in given else "None"
            stated |= dict.fromkeys(names.split(", "), literal_eval(default))
    assert stated == {name: getattr(LiquidConfig, name) for name in OWN}


def test_optional_fields_are_derived():
    config = LiquidConfig(
        hidden_size=64, num_attention_heads=8, num_hidden_layers=3, num_experts=6, num_experts_per_tok=2
    )
    assert config.num_decoder_layers == 3
    assert config.num_key_value_heads == 8 and config.head_dim == 8
    assert config.moe_intermediate_size == config.lstm_hidden_size == 64
    assert config.max_expert_load == 0.5 and config.initializer_range == 1 / 8
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert LiquidConfig(lstm_hidden_size=0).lstm_hidden_size == 0


@pytest.mark.parametrize(("encoder", "decoder"), [(2, 5), (5, 2), (3, 3)])
def test_caches_have_the_number_of_decoder_layers(encoder, decoder):
    config = LiquidConfig(num_hidden_layers=encoder, num_decoder_layers=decoder)
    assert config.get_text_config(decoder=True).num_hidden_layers == decoder
    assert len(config.layer_types) == len(DynamicCache(config=config).layers) == decoder
    for same in (config.get_text_config(), config.get_text_config(encoder=True)):
        assert same is config and same.num_hidden_layers == encoder


def test_auto_map_keeps_additional_entries():
    config = LiquidConfig(auto_map={"AutoTokenizer": "tokenization.Tokenizer"})
    assert config.auto_map == {**AUTO_MAP, "AutoTokenizer": "tokenization.Tokenizer"}


def test_unknown_fields_are_kept():
    config = LiquidConfig(note="mine", id2label={0: "a", 1: "b", 2: "c"})
    assert config.note == "mine" and config.num_labels == 3
    assert LiquidConfig.from_dict(config.to_dict()).note == "mine"


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        *(
            ({name: value}, [f"`{name}`", "at least 1", f"got {value}"])
            for name in (
                "vocab_size", "hidden_size", "num_hidden_layers", "num_decoder_layers", "num_attention_heads",
                "num_key_value_heads", "intermediate_size", "attention_window", "num_experts", "num_experts_per_tok",
                "moe_intermediate_size", "conv_kernel", "conv_dilation", "num_lstm_layers", "max_position_embeddings",
            )
            for value in (0, -2)
        ),
        *(
            ({name: value}, [f"`{name}`", "finite and not negative", f"got {value}"])
            for name in (
                "router_entropy_coef", "router_aux_loss_coef", "reconstruction_loss_coef", "max_offset",
                "initializer_range",
            )
            for value in (-0.5, math.nan, math.inf)
        ),
        ({"lstm_hidden_size": -1}, ["`lstm_hidden_size`", "not negative", "got -1"]),
        *(
            ({"frame_length": value}, ["`frame_length`", "power of two from 4 to 16384", f"got {value}"])
            for value in (-8, 0, 2, 48, 65)
        ),
        *(
            ({"decoder_frame_length": value}, ["`decoder_frame_length`", "power of two from 2 to 16", f"got {value}"])
            for value in (-2, 0, 1, 12, 32)
        ),
        *(
            (
                {"min_compression_ratio": least, "base_compression_ratio": base},
                [f"`min_compression_ratio` ({least})", f"`base_compression_ratio` ({base})", "(0, 1]"],
            )
            for least, base in ((0, 0.5), (0.6, 0.5), (0.5, 1.5), (-0.1, 1), (math.nan, 1), (0.1, math.nan))
        ),
        ({"num_experts": 3, "num_experts_per_tok": 4}, ["`num_experts_per_tok` (4)", "`num_experts` (3)"]),
        *(
            ({"max_expert_load": load}, [f"`max_expert_load` ({load})", "greater than the uniform load 0.25"])
            for load in (0.25, 0, -1, math.nan)
        ),
        *(({"conv_kernel": taps}, ["`conv_kernel`", "odd", f"got {taps}"]) for taps in (2, 4)),
        ({"finite_check": "on"}, ["`finite_check`", "'off'", "'raise'", "'zero'", "got 'on'"]),
        *(({"norm_eps": eps}, ["`norm_eps`", "positive", f"got {eps}"]) for eps in (0, -1e-6, math.nan, math.inf)),
        *(
            ({name: value}, [f"`{name}`", "[0, 1)", f"got {value}"])
            for name in ("hidden_dropout", "attention_dropout")
            for value in (1, -0.1, math.nan)
        ),
        *(
            ({"vocab_size": 9, name: value}, [f"`{name}`", "`vocab_size` (9)", f"got {value}"])
            for name in ("pad_token_id", "decoder_start_token_id")
            for value in (9, -1)
        ),
        *(
            (
                {"hidden_size": width, "num_attention_heads": heads},
                [f"`hidden_size` ({width})", f"`num_attention_heads` ({heads})", "twice"],
            )
            for width, heads in ((65, 5), (20, 4), (64, 3))
        ),
        *(
            (
                {"hidden_size": 24, "num_attention_heads": heads, "num_key_value_heads": key_value_heads},
                [f"`num_key_value_heads` ({key_value_heads})", f"`num_attention_heads` ({heads})"],
            )
            for heads, key_value_heads in ((12, 5), (3, 2), (4, 8))
        ),
    ],
)  # fmt: skip
def test_invalid_values_raise(fields, parts):
    with pytest.raises(ValueError) as error:
        LiquidConfig(**fields)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"hidden_size": "wide"}, ["hidden_size", "int", "wide"]),
        ({"frame_length": 16.0}, ["frame_length", "int", "16.0"]),
        ({"attention_window": None}, ["attention_window", "int", "None"]),
        ({"finite_check": True}, ["finite_check", "str", "True"]),
    ],
)
def test_wrong_types_raise(fields, parts):
    with pytest.raises(StrictDataclassError) as error:
        LiquidConfig(**fields)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"min_compression_ratio": 1, "base_compression_ratio": 1},
        {"max_offset": 0, "conv_kernel": 1},
        {"frame_length": 4, "decoder_frame_length": 16},
        {"num_experts": 1},
        {"num_experts_per_tok": 4},
        {"max_expert_load": math.inf},
        {"pad_token_id": None, "decoder_start_token_id": None},
        {"vocab_size": 1},
        {"router_entropy_coef": 0, "router_aux_loss_coef": 0, "reconstruction_loss_coef": 0, "initializer_range": 0},
    ],
)
def test_boundary_values_are_accepted(fields):
    config = LiquidConfig(**fields)
    assert all(getattr(config, name) == value for name, value in fields.items())


def test_invalid_changes_raise_at_saving(tmp_path):
    config = LiquidConfig()
    config.num_attention_heads = 7
    with pytest.raises(StrictDataclassError, match="num_attention_heads"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
