"""Randomly initialised encoder-decoders by size: Liquid and the baseline T5."""

from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from .modeling.liquid.configuration_liquid import LiquidConfig
from .modeling.liquid.modeling_liquid import LiquidForSeq2SeqLM
from .presets import check_choice, check_fields, check_memory

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "moe_intermediate_size": 48, "frame_length": 32, "attention_window": 16,
    },
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
    "medium": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1024},
}  # fmt: skip
ARCHITECTURES = ("liquid", "t5")
DROPOUT = 0.1
GENERATION = {"num_beams": 4, "max_new_tokens": 128}  # saved as the defaults of generate()


def new_seq2seq_lm(
    tokenizer: PreTrainedTokenizerBase,
    *,
    architecture: str = "liquid",
    size: str = "tiny",
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """Build a randomly initialised encoder-decoder for the vocabulary of `tokenizer`.

    Args:
        tokenizer: gives `vocab_size` and the special tokens; the decoder starts with its padding token, as in T5.
        architecture: "liquid", or "t5" with the same width, depth, heads and number of parameters, to within one unit
            of `d_ff`.
        size: one of `SIZES`; the dropout rate is `DROPOUT`.
        seed: random seed of the weights.
        options: fields of `LiquidConfig` that override those of the size; a T5 matches the resulting Liquid.

    Raises:
        ValueError: `architecture` or `size` is unknown, or a field is unknown or has an invalid value.
    """
    check_choice("architecture", architecture, ARCHITECTURES)
    check_choice("size", size, SIZES)
    check_fields("liquid", options)
    special_tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    tokens = {"vocab_size": len(tokenizer), **special_tokens}
    liquid = LiquidConfig(**{"hidden_dropout": DROPOUT} | SIZES[size] | options | tokens)
    with torch.device("meta"):
        check_memory(LiquidForSeq2SeqLM(liquid))
    torch.manual_seed(seed)
    model: PreTrainedModel
    if architecture == "liquid":
        model = LiquidForSeq2SeqLM(liquid)
    else:
        model = T5ForConditionalGeneration(matching_t5(liquid, tokens))
    model.generation_config = GenerationConfig(**GENERATION, **special_tokens)
    return model


def matching_t5(liquid: LiquidConfig, tokens: dict[str, Any]) -> T5Config:
    """Return the configuration of a gated T5 with the number of parameters of a Liquid."""

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
        target = LiquidForSeq2SeqLM(liquid).num_parameters()
        minimum, second = (T5ForConditionalGeneration(config(width)).num_parameters() for width in (1, 2))
    return config(max(1, 1 + round((target - minimum) / (second - minimum))))
