"""Checkpoints of the originals of Liquid: in effect decoders that see later tokens; their encoders reach no logits."""

from functools import partial
from typing import Any

from ...modeling.liquid.configuration_liquid import LiquidConfig
from ...modeling.liquid.modeling_liquid import LiquidForSeq2SeqLM
from ...modeling.native.configuration_liquid_native import LiquidNativeConfig
from ...modeling.native.modeling_liquid_native import LiquidNativeModel
from ..format import Destination, Layout, Settings, Sizes
from . import liquid_tables as tables

MIN_RATIO = 0.1  # of compression, in all originals that adapt it

FIRST_SETTINGS = {"num_heads": 8, "window_size": 256, "compression_ratio": 0.5}
CREATE_SETTINGS = {**FIRST_SETTINGS, "top_k": 2, "dynamic_k": False, "dropout": 0.12}
SIMPLE_SETTINGS = {"window_size": 512, "compression_ratio": 0.5, "top_k": 4, "dynamic_k": True, "dropout": 0.1}

NOT_CAUSAL = (
    "The original sees later tokens and nothing of its source; this model is causal, reads its source through new "
    "cross-attention and computes another function: it needs training."
)
NO_TOKENS = (
    "The file tells no special tokens: set `decoder_start_token_id`, `eos_token_id` and `pad_token_id` in the "
    "configuration and the generation configuration to those of your tokenizer."
)
ENCODER_NEW = "The original has no encoder: this one's is new."
ENCODER_UNTRAINED = "The original never trained its encoder: what comes from there is at its initial values."
ENCODER_BY_LOSSES = "The original's encoder was trained by side losses alone, never by the loss on tokens."
TAPS = (
    "The original mixes tokens and features before it weighs the taps of a convolution: the weights of the taps keep "
    "their places, not their meaning."
)

ONE_FUNCTION = (
    "This model computes the original's logits, in single precision and without dropout; each sees later tokens, and "
    "none its source."
)
TRAINED_WINDOW = (
    "Its attention is another one for each `window_size`, and with it the longest input: give what the original was "
    "trained with (its own script: 2048)."
)
TRAINED_WINDOWS = "Behind the first window it depends on `window_size`: give what the original was trained with."

SUPERSEDED = "of each of the original's two programs only the last version is reproduced, as liquid-L3 and liquid-L6"
NO_FUNCTION_OF_A_ROW = "which experts it runs depends on a token's number in the batch, so it is no function of a row"


def config(sizes: Sizes, settings: Settings) -> LiquidConfig:
    """Sizes as they are; at least `top_k` experts for each token."""
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
    """All experts for each token, the same compression of all frames, and no dropout."""
    return LiquidConfig(
        **shared_fields(sizes, settings),
        num_experts_per_tok=sizes["X"],
        dynamic_experts=False,
        base_compression_ratio=settings["compression_ratio"],
        min_compression_ratio=settings["compression_ratio"],
    )


def shared_fields(sizes: Sizes, settings: Settings) -> dict[str, Any]:
    """Fields of a LiquidConfig that all versions give."""
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
    """Heads, by the features of one where the keys tell them."""
    if "D" in sizes:
        return sizes["E"] // sizes["D"]
    if "R" in sizes:
        return sizes["E"] // (2 * sizes["R"])
    return settings["num_heads"]


def num_kv_groups(sizes: Sizes, heads: int) -> int:
    """Heads of keys and values.

    Raises:
        ValueError: keys that are no whole number of heads.
    """
    features = sizes.get("K", sizes["E"])
    if heads > 0 and features * heads % sizes["E"]:
        raise ValueError(
            f"`num_heads` ({heads}) gives heads of {sizes['E'] / heads:g} features, and all keys together have "
            f"{features}: give the number of heads that the checkpoint was trained with"
        )
    return features * heads // sizes["E"]


def native_config(layout: str, sizes: Sizes, settings: Settings) -> LiquidNativeConfig:
    """The original's constructor arguments that its logits depend on, and sizes of what they don't."""
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
    Layout(
        name="liquid-L0",
        settings=FIRST_SETTINGS,
        table=tables.L0,
        model=Destination(LiquidForSeq2SeqLM, first_config, (NOT_CAUSAL, ENCODER_NEW, NO_TOKENS)),
        not_native=SUPERSEDED,
    ),
    Layout(
        name="liquid-L1",
        settings=FIRST_SETTINGS,
        table=tables.L1,
        model=Destination(LiquidForSeq2SeqLM, first_config, (NOT_CAUSAL, ENCODER_UNTRAINED, NO_TOKENS)),
        not_native=SUPERSEDED,
    ),
    Layout(
        name="liquid-L2",
        settings=CREATE_SETTINGS,
        table=tables.L2,
        model=Destination(LiquidForSeq2SeqLM, config, (NOT_CAUSAL, ENCODER_BY_LOSSES, NO_TOKENS)),
        not_native=NO_FUNCTION_OF_A_ROW,
    ),
    Layout(
        name="liquid-L3",
        settings=CREATE_SETTINGS,
        table=tables.L3,
        model=Destination(LiquidForSeq2SeqLM, config, (NOT_CAUSAL, ENCODER_BY_LOSSES, TAPS, NO_TOKENS)),
        native=Destination(LiquidNativeModel, partial(native_config, "L3"), (ONE_FUNCTION, TRAINED_WINDOW)),
    ),
    Layout(
        name="liquid-L4",
        settings={"num_heads": 8, **SIMPLE_SETTINGS},
        table=tables.L4,
        model=Destination(LiquidForSeq2SeqLM, config, (NOT_CAUSAL, ENCODER_BY_LOSSES, TAPS, NO_TOKENS)),
        not_native=SUPERSEDED,
    ),
    Layout(
        name="liquid-L5",
        settings=SIMPLE_SETTINGS,
        table=tables.L5,
        model=Destination(LiquidForSeq2SeqLM, config, (NOT_CAUSAL, ENCODER_BY_LOSSES, TAPS, NO_TOKENS)),
        not_native=SUPERSEDED,
    ),
    Layout(
        name="liquid-L6",
        settings=SIMPLE_SETTINGS,
        table=tables.L6,
        model=Destination(LiquidForSeq2SeqLM, config, (NOT_CAUSAL, ENCODER_BY_LOSSES, TAPS, NO_TOKENS)),
        native=Destination(LiquidNativeModel, partial(native_config, "L6"), (ONE_FUNCTION, TRAINED_WINDOWS)),
    ),
)
