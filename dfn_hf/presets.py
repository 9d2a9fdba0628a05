"""Randomly initialised causal language models by size: DFN, FlowNetwork and the baseline Llama."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .modeling.dfn.configuration_dfn import DFNConfig
from .modeling.dfn.modeling_dfn import DFNForCausalLM
from .modeling.flownetwork.configuration_flownetwork import FlowNetworkConfig
from .modeling.flownetwork.modeling_flownetwork import FlowNetworkForCausalLM
from .registration import register_families

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 768},
    "medium": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1536},
    "large": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2304},
}


@dataclass(frozen=True)
class ModelSize:
    """Shared size of the compared models, whose number of parameters is that of the DFN with this size.

    Attributes:
        initializer_range: None is 1/sqrt(hidden_size), the default of DFN and FlowNetwork.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    initializer_range: float | None = None


def build_dfn(size: ModelSize, **options: Any) -> PreTrainedModel:
    """Build a DFN with exactly this size."""
    return DFNForCausalLM(DFNConfig(**vars(size), **options))


def build_flownetwork(
    size: ModelSize, model_class: type[FlowNetworkForCausalLM] = FlowNetworkForCausalLM, **options: Any
) -> PreTrainedModel:
    """Build a FlowNetwork with exactly this size."""
    return model_class(FlowNetworkConfig(**{**vars(size), "num_memory_heads": size.num_attention_heads, **options}))


def build_llama(size: ModelSize, model_class: type[LlamaForCausalLM] = LlamaForCausalLM) -> PreTrainedModel:
    """Build a Llama with exactly this size."""
    config = LlamaConfig(
        **{**vars(size), "initializer_range": size.initializer_range or size.hidden_size**-0.5},
        num_key_value_heads=size.num_attention_heads,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return model_class(config)


ModelBuilder = Callable[..., PreTrainedModel]
BUILDERS: dict[str, ModelBuilder] = {"dfn": build_dfn, "flownetwork": build_flownetwork, "llama": build_llama}
ARCHITECTURES = tuple(BUILDERS)


def build_model(
    name: str,
    size: ModelSize,
    *,
    device: str = "cpu",
    builders: Mapping[str, ModelBuilder] = BUILDERS,
    **options: Any,
) -> PreTrainedModel:
    """Build a randomly initialised model on `device`; the caller sets the random seed.

    Args:
        name: one of `builders`.
        size: size of the DFN. Other models use a different `intermediate_size`, chosen to match its parameters.
        device: device of the model.
        builders: the function that builds a model of each name.
        options: further configuration fields, which do not change the number of parameters to match. A Llama takes
            none.

    Raises:
        ValueError: `name` is unknown, or the DFN has fewer parameters than the smallest model with this name.
    """
    check_choice("model", name, builders)
    builder = partial(builders[name], **options)
    if name != "dfn":
        size = replace(size, intermediate_size=matching_intermediate_size(name, builder, size))
    if device == "meta":
        with torch.device("meta"):
            return builder(size)
    return torch.nn.Module.to(builder(size), device)


def matching_intermediate_size(name: str, builder: ModelBuilder, size: ModelSize, multiple_of: int = 1) -> int:
    """Return the `intermediate_size` with which `builder` matches the number of parameters of the DFN.

    Args:
        name: name of the model, for the error message.
        builder: builds the model for a size.
        size: size of the DFN.
        multiple_of: the result is rounded to a multiple of this number.

    Raises:
        ValueError: the DFN has fewer parameters than the smallest model of `builder`.
    """

    def parameters(builder: ModelBuilder, intermediate_size: int) -> int:
        with torch.device("meta"):
            return count_parameters(builder(replace(size, intermediate_size=intermediate_size)))

    target = parameters(build_dfn, size.intermediate_size)
    minimum, second = (parameters(builder, width) for width in (1, 2))
    width = multiple_of * round((1 + (target - minimum) / (second - minimum)) / multiple_of)
    if width < 1:
        raise ValueError(
            f"a {name} with hidden_size {size.hidden_size} has at least {minimum:,} parameters, but the DFN has "
            f"{target:,}: raise intermediate_size (now {size.intermediate_size})"
        )
    return width


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of trainable parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def new_causal_lm(
    tokenizer: PreTrainedTokenizerBase,
    *,
    architecture: str = "dfn",
    size: str = "tiny",
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """Build a randomly initialised causal language model for the vocabulary of `tokenizer`.

    Args:
        tokenizer: gives `vocab_size` and the special tokens.
        architecture: one of `ARCHITECTURES`; "llama" is the baseline. Models with the same size have the same number
            of parameters, to within one unit of `intermediate_size`.
        size: one of `SIZES`.
        seed: random seed of the weights.
        options: configuration fields that override those of the size: any field of `DFNConfig` or
            `FlowNetworkConfig`; for a Llama the fields in `SIZES`.

    Raises:
        ValueError: `architecture` or `size` is unknown, or a field is unknown or has an invalid value.
    """
    check_choice("architecture", architecture, ARCHITECTURES)
    check_choice("size", size, SIZES)
    if "vocab_size" in options:
        raise ValueError("vocab_size is that of the tokenizer: leave out --config-override vocab_size")
    shape = SIZES[size] | {field: options.pop(field) for field in SIZES[size] if field in options}
    if architecture != "llama":
        check_fields(architecture, options)
    elif options:
        raise ValueError(f"a Llama baseline has no option {next(iter(options))!r}, only {', '.join(shape)}")

    model_size = ModelSize(vocab_size=len(tokenizer), **shape)
    check_memory(build_model(architecture, model_size, device="meta", **options))
    torch.manual_seed(seed)
    model = build_model(architecture, model_size, **options)
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
    return model


def check_memory(model: PreTrainedModel) -> None:
    """Raise ValueError if the parameters of a model without storage need more memory than the machine has."""
    needed = sum(parameter.nbytes for parameter in model.parameters())
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if needed > present:
        raise ValueError(
            f"a model with {count_parameters(model):,} parameters needs {needed / 2**30:.0f} GiB, and this machine "
            f"has {present / 2**30:.0f} GiB: lower hidden_size, intermediate_size or num_hidden_layers"
        )


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


def check_fields(architecture: str, options: dict[str, Any]) -> None:
    """Raise ValueError for an unknown configuration field, which transformers would store without a warning."""
    register_families()
    config_class = AutoConfig.for_model(architecture).__class__
    for field in options:
        if field not in config_class.__dataclass_fields__:
            known = ", ".join(config_class.__annotations__)
            raise ValueError(f"{config_class.__name__} has no field {field!r}; it has {known}")
