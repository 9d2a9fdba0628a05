"""The compared models: DFN, and Llamas of the same width, depth, head count and number of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dfn_hf import DFNConfig, DFNForCausalLM

from .llama_conv import ConvGatedLlamaForCausalLM

LLAMAS: dict[str, type[LlamaForCausalLM]] = {"llama": LlamaForCausalLM, "llama-conv": ConvGatedLlamaForCausalLM}
MODELS = ("dfn", *LLAMAS)


@dataclass(frozen=True)
class ModelSize:
    """What the compared models have in common; their parameters are those of the DFN of this size.

    `initializer_range` None is 1/sqrt(hidden_size), DFN's default.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    initializer_range: float | None = None


def build_model(name: str, size: ModelSize, *, device: str = "cpu", **dfn_options: Any) -> PreTrainedModel:
    """A freshly initialised model on `device`; seed torch before.

    Args:
        name: one of `MODELS`.
        size: the DFN's size. A Llama takes all of it but `intermediate_size`, chosen to have as many parameters.
        dfn_options: further `DFNConfig` fields; they do not change the Llamas.

    Raises:
        ValueError: an unknown name, or a DFN too small for a Llama of as many parameters.
    """
    _check_name(name)
    if name == "dfn":
        model = _build_dfn(size, **dfn_options)
    else:
        model = _build_llama(name, size, _matching_intermediate_size(name, size))
    return torch.nn.Module.to(model, device)


def count_parameters(model: torch.nn.Module) -> int:
    """Trainable parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _check_name(name: str) -> None:
    if name not in MODELS:
        raise ValueError(f"model is {name!r}: choose one of {', '.join(MODELS)}")


def _build_dfn(size: ModelSize, **options: Any) -> PreTrainedModel:
    return DFNForCausalLM(DFNConfig(**vars(size), **options))


def _build_llama(name: str, size: ModelSize, intermediate_size: int) -> PreTrainedModel:
    initializer_range = size.hidden_size**-0.5 if size.initializer_range is None else size.initializer_range
    config = LlamaConfig(
        **{**vars(size), "intermediate_size": intermediate_size, "initializer_range": initializer_range},
        num_key_value_heads=size.num_attention_heads,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LLAMAS[name](config)


def _matching_intermediate_size(name: str, size: ModelSize) -> int:
    wanted = _parameters_of(lambda: _build_dfn(size))
    least = _parameters_of(lambda: _build_llama(name, size, 1))
    next_least = _parameters_of(lambda: _build_llama(name, size, 2))
    width = 1 + round((wanted - least) / (next_least - least))
    if width < 1:
        raise ValueError(
            f"a {name} of hidden_size {size.hidden_size} has at least {least:,} parameters, the DFN only {wanted:,}: "
            f"raise intermediate_size (now {size.intermediate_size})"
        )
    return width


def _parameters_of(build: Callable[[], PreTrainedModel]) -> int:
    with torch.device("meta"):
        return count_parameters(build())
