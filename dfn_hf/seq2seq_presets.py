"""Freshly initialised encoder-decoders by the name of a size: Liquid, and T5 of as many parameters as the baseline."""

from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from dfn_hf.modeling.liquid.configuration_liquid import LiquidConfig
from dfn_hf.modeling.liquid.modeling_liquid import LiquidForSeq2SeqLM

from .presets import check_fields

DROPOUT = 0.1
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "moe_intermediate_size": 48, "frame_length": 32, "attention_window": 16,
    },
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
    "medium": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1024},
}  # fmt: skip
ARCHITECTURES = ("liquid", "t5")
GENERATION = {"num_beams": 4, "max_new_tokens": 128}  # what a trained folder's generate() goes by


def new_seq2seq_lm(
    tokenizer: PreTrainedTokenizerBase,
    *,
    architecture: str = "liquid",
    size: str = "tiny",
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """An encoder-decoder with fresh weights for the vocabulary of `tokenizer`.

    Args:
        tokenizer: gives `vocab_size` and the special tokens; targets start with its padding token, as T5's do.
        architecture: "liquid", or "t5" of the same width, depth, heads and, to within one unit of `d_ff`, number of
            parameters.
        size: one of `SIZES`; with dropout `DROPOUT`.
        seed: of the weights.
        options: fields of `LiquidConfig` that differ from the size's; a T5 is made to match the Liquid they give.

    Raises:
        ValueError: an unknown architecture or size, or a field that the configuration does not have or refuses.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: choose one of {', '.join(SIZES)}")
    check_fields("liquid", options)
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    liquid = LiquidConfig(**{"hidden_dropout": DROPOUT} | SIZES[size] | options | tokens)
    torch.manual_seed(seed)
    model: PreTrainedModel
    if architecture == "liquid":
        model = LiquidForSeq2SeqLM(liquid)
    else:
        model = T5ForConditionalGeneration(matching_t5(liquid, tokens))
    model.generation_config = GenerationConfig(**GENERATION, **tokens_of_generation(tokens))
    return model


def tokens_of_generation(tokens: dict[str, Any]) -> dict[str, Any]:
    """The special tokens among the fields of a configuration."""
    return {name: token for name, token in tokens.items() if name.endswith("_token_id")}


def matching_t5(liquid: LiquidConfig, tokens: dict[str, Any]) -> T5Config:
    """The configuration of a gated T5 with as many parameters as a Liquid."""

    def config(width: int) -> T5Config:
        return T5Config(
            d_model=liquid.hidden_size,
            d_kv=liquid.head_dim,
            d_ff=width,
            num_layers=liquid.num_hidden_layers,
            num_decoder_layers=liquid.num_decoder_layers,
            num_heads=liquid.num_attention_heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=liquid.hidden_dropout,
            **tokens,
        )

    with torch.device("meta"):
        wanted = LiquidForSeq2SeqLM(liquid).num_parameters()
        least, next_least = (T5ForConditionalGeneration(config(width)).num_parameters() for width in (1, 2))
    return config(max(1, 1 + round((wanted - least) / (next_least - least))))
