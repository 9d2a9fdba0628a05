"""Freshly initialised models by the name of a size."""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from .benchmarks.baselines.models import ModelSize, build_model

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 768},
    "medium": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1536},
    "large": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2304},
}
ARCHITECTURES = ("dfn", "flownetwork", "llama")


def new_causal_lm(
    tokenizer: PreTrainedTokenizerBase,
    *,
    architecture: str = "dfn",
    size: str = "tiny",
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """A causal language model with fresh weights for the vocabulary of `tokenizer`.

    Args:
        tokenizer: gives `vocab_size` and the special tokens.
        architecture: one of `ARCHITECTURES`, "llama" being the baseline. Those of a size have as many parameters, to
            within one unit of their `intermediate_size`.
        size: one of `SIZES`.
        seed: of the weights.
        options: fields of the configuration that differ from the size's: any of `DFNConfig` or `FlowNetworkConfig`;
            for a Llama those that `SIZES` holds.

    Raises:
        ValueError: an unknown architecture or size, or a field that the configuration does not have or refuses.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: choose one of {', '.join(SIZES)}")
    if "vocab_size" in options:
        raise ValueError("vocab_size is that of the tokenizer: leave out --set vocab_size")
    shape = SIZES[size] | {field: options.pop(field) for field in SIZES[size] if field in options}
    if architecture != "llama":
        check_fields(architecture, options)
    elif options:
        raise ValueError(f"a Llama of this package has no option {next(iter(options))!r}, only {', '.join(shape)}")

    torch.manual_seed(seed)
    model = build_model(architecture, ModelSize(vocab_size=len(tokenizer), **shape), **options)
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
    return model


def check_fields(architecture: str, options: dict[str, Any]) -> None:
    """Raise ValueError for a name that is no field of the configuration: transformers would take it without a word."""
    config_class = AutoConfig.for_model(architecture).__class__
    for field in options:
        if field not in config_class.__dataclass_fields__:
            known = ", ".join(config_class.__annotations__)
            raise ValueError(f"{config_class.__name__} has no field {field!r}; it has {known}")
