"""Checkpoints of the original Liquid models: decoders that see later tokens; the logits ignore their encoders."""

from functools import partial
from typing import Any

from ...modeling.liquid.configuration_liquid import LiquidConfig
from ...modeling.liquid.modeling_liquid import LiquidForSeq2SeqLM
from ...modeling.native.configuration_liquid_native import LiquidNativeConfig
from ...modeling.native.modeling_liquid_native import LiquidNativeModel
from ..format import CheckpointFormat, Destination, Settings, Sizes
from . import liquid_tables as tables

MIN_RATIO = 0.1  # minimum compression ratio in all originals with adaptive compression

FIRST_SETTINGS = {"num_heads": 8, "window_size": 256, "compression_ratio": 0.5}
CREATE_SETTINGS = {**FIRST_SETTINGS, "top_k": 2, "dynamic_k": False, "dropout": 0.12}
SIMPLE_SETTINGS = {"window_size": 512, "compression_ratio": 0.5, "top_k": 4, "dynamic_k": True, "dropout": 0.1}

NOT_CAUSAL = (
    "In the original, tokens see later tokens but not the source. This model is causal, attends to the source through "
    "new cross-attention and computes another function, so it must be trained."
)
NO_TOKENS = (
    "The file contains no special tokens: set `decoder_start_token_id`, `eos_token_id` and `pad_token_id` in the "
    "configuration and the generation configuration to those of your tokenizer."
)
ENCODER_NEW = "The original has no encoder; the encoder of this model is new."
ENCODER_UNTRAINED = "The original does not train its encoder: the encoder weights have their initial values."
ENCODER_BY_LOSSES = "The encoder of the original was trained only by auxiliary losses, not by the token loss."
TAPS = (
    "The original mixes tokens and features before it applies the taps of a convolution: the tap weights are "
    "converted, but act on other inputs."
)

ONE_FUNCTION = (
    "This model computes the logits of the original in single precision and without dropout; they depend on later "
    "tokens and not on the source."
)
TRAINED_WINDOW = (
    "Its attention and its maximum length depend on `window_size`: pass the value of the training (2048 in the "
    "original's script)."
)
TRAINED_WINDOWS = "After the first window the logits depend on `window_size`: pass the value of the training."

SUPERSEDED = "only the last version of each of the original's two programs is supported, liquid-L3 and liquid-L6"
NO_FUNCTION_OF_A_ROW = "its experts depend on the index of a token in the batch, so that it is not a function of a row"


def config(sizes: Sizes, settings: Settings) -> LiquidConfig:
    """Return a configuration with the sizes of the original and at least `top_k` experts per token."""
    base = settings["compression_ratio"]
    return LiquidConfig(
        **shared_fields(sizes, settings),
        num_experts_per_tok=min(settings["top_k"], sizes["X"]),
        dynamic_experts=settings["dynamic_k"],
        base_compression_ratio=base,
        min_compression_ratio=min(MIN_RATIO, base),
        hidden_dropout=settings["dropout"],
        attention_dropout=settings["dropout"],
    )


def first_config(sizes: Sizes, settings: Settings) -> LiquidConfig:
    """Return a configuration with all experts for each token, constant compression and no dropout."""
    return LiquidConfig(
        **shared_fields(sizes, settings),
        num_experts_per_tok=sizes["X"],
        dynamic_experts=False,
        base_compression_ratio=settings["compression_ratio"],
        min_compression_ratio=settings["compression_ratio"],
    )


def shared_fields(sizes: Sizes, settings: Settings) -> dict[str, Any]:
    """Return the fields of `LiquidConfig` that all versions determine in the same way."""
    heads = num_heads(sizes, settings)
    return {
        "vocab_size": sizes["V"],
        "hidden_size": sizes["E"],
        "num_hidden_layers": sizes.get("encoder_layer", sizes["decoder_layer"]),
        "num_decoder_layers": sizes["decoder_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": num_kv_groups(sizes, heads),
        "intermediate_size": sizes["F"],
        "attention_window": settings["window_size"],
        "max_position_embeddings": sizes["L"],
        "learned_positions": True,
        "num_experts": sizes["X"],
        "conv_kernel": 3,
        "conv_dilation": 2,
        "lstm_hidden_size": sizes.get("Q", 0),
        "num_lstm_layers": sizes.get("lstm_layer", 1),
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "decoder_start_token_id": None,
        "pad_token_id": None,
    }


def num_heads(sizes: Sizes, settings: Settings) -> int:
    """Return the number of heads, from the head size if the keys determine it."""
    if "D" in sizes:
        return sizes["E"] // sizes["D"]
    if "R" in sizes:
        return sizes["E"] // (2 * sizes["R"])
    return settings["num_heads"]


def num_kv_groups(sizes: Sizes, heads: int) -> int:
    """Return the number of key-value heads.

    Raises:
        ValueError: the key features are not a multiple of the head size.
    """
    features = sizes.get("K", sizes["E"])
    if heads > 0 and features * heads % sizes["E"]:
        raise ValueError(
            f"`num_heads` ({heads}) gives heads of {sizes['E'] / heads:g} features, which do not divide the "
            f"{features} key features: pass the number of heads of the training"
        )
    return features * heads // sizes["E"]


def native_config(layout: str, sizes: Sizes, settings: Settings) -> LiquidNativeConfig:
    """Return the constructor arguments of the original that affect its logits, and the sizes of its unused parts."""
    heads = num_heads(sizes, settings)
    return LiquidNativeConfig(
        layout=layout,
        vocab_size=sizes["V"],
        embed_dim=sizes["E"],
        num_encoder_layers=sizes["encoder_layer"],
        num_decoder_layers=sizes["decoder_layer"],
        num_heads=heads,
        num_kv_groups=num_kv_groups(sizes, heads),
        ff_hidden_dim=sizes["F"],
        num_experts=sizes["X"],
        max_position_embeddings=sizes["L"],
        window_size=settings["window_size"],
        lstm_hidden_size=sizes["Q"],
        lstm_num_layers=sizes["lstm_layer"],
    )


LIQUID = (
    CheckpointFormat(
        name="liquid-L0",
        settings=FIRST_SETTINGS,
        table=tables.L0,
        model=Destination(LiquidForSeq2SeqLM, first_config, (NOT_CAUSAL, ENCODER_NEW, NO_TOKENS)),
        not_native=SUPERSEDED,
    ),
    CheckpointFormat(
        name="liquid-L1",
        settings=FIRST_SETTINGS,
        table=tables.L1,
        model=Destination(LiquidForSeq2SeqLM, first_config, (NOT_CAUSAL, ENCODER_UNTRAINED, NO_TOKENS)),
        not_native=SUPERSEDED,
    ),
    CheckpointFormat(
        name="liquid-L2",
        settings=CREATE_SETTINGS,
        table=tables.L2,
        model=Destination(LiquidForSeq2SeqLM, config, (NOT_CAUSAL, ENCODER_BY_LOSSES, NO_TOKENS)),
        not_native=NO_FUNCTION_OF_A_ROW,
    ),
    CheckpointFormat(
        name="liquid-L3",
        settings=CREATE_SETTINGS,
        table=tables.L3,
        model=Destination(LiquidForSeq2SeqLM, config, (NOT_CAUSAL, ENCODER_BY_LOSSES, TAPS, NO_TOKENS)),
        native=Destination(LiquidNativeModel, partial(native_config, "L3"), (ONE_FUNCTION, TRAINED_WINDOW)),
    ),
    CheckpointFormat(
        name="liquid-L4",
        settings={"num_heads": 8, **SIMPLE_SETTINGS},
        table=tables.L4,
        model=Destination(LiquidForSeq2SeqLM, config, (NOT_CAUSAL, ENCODER_BY_LOSSES, TAPS, NO_TOKENS)),
        not_native=SUPERSEDED,
    ),
    CheckpointFormat(
        name="liquid-L5",
        settings=SIMPLE_SETTINGS,
        table=tables.L5,
        model=Destination(LiquidForSeq2SeqLM, config, (NOT_CAUSAL, ENCODER_BY_LOSSES, TAPS, NO_TOKENS)),
        not_native=SUPERSEDED,
    ),
    CheckpointFormat(
        name="liquid-L6",
        settings=SIMPLE_SETTINGS,
        table=tables.L6,
        model=Destination(LiquidForSeq2SeqLM, config, (NOT_CAUSAL, ENCODER_BY_LOSSES, TAPS, NO_TOKENS)),
        native=Destination(LiquidNativeModel, partial(native_config, "L6"), (ONE_FUNCTION, TRAINED_WINDOWS)),
    ),
)
