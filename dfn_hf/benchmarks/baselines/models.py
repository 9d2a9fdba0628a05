"""The compared models, all of the same width, depth, head count and number of parameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dfn_hf import DFNConfig, DFNForCausalLM, FlowNetworkConfig, FlowNetworkForCausalLM

from .ablated_flownetwork import FlowNetworkWithoutFlow
from .llama_conv import ConvGatedLlamaForCausalLM


@dataclass(frozen=True)
class ModelSize:
    """What the compared models have in common; their parameters are those of the DFN of this size.

    `initializer_range` None is 1/sqrt(hidden_size), the default of DFN and FlowNetwork.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    initializer_range: float | None = None


def build_model(name: str, size: ModelSize, *, device: str = "cpu", **options: Any) -> PreTrainedModel:
    """A freshly initialised model on `device`; seed torch before.

    Args:
        name: one of `MODELS`.
        size: the DFN's size. The others take all of it but `intermediate_size`, chosen to have as many parameters.
        options: further fields of the model's configuration; they do not change the number of parameters that it is
            to have. None for a Llama.

    Raises:
        ValueError: an unknown name, or a DFN too small for a model of as many parameters.
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}: choose one of {', '.join(MODELS)}")
    builder = partial(_BUILDERS[name], **options)
    if name != "dfn":
        size = replace(size, intermediate_size=matching_intermediate_size(name, builder, size))
    return torch.nn.Module.to(builder(size), device)


def count_parameters(model: torch.nn.Module) -> int:
    """Trainable parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _build_dfn(size: ModelSize, **options: Any) -> PreTrainedModel:
    return DFNForCausalLM(DFNConfig(**vars(size), **options))


def _build_flownetwork(
    size: ModelSize, model_class: type[FlowNetworkForCausalLM] = FlowNetworkForCausalLM, **options: Any
) -> PreTrainedModel:
    return model_class(FlowNetworkConfig(**{**vars(size), "num_memory_heads": size.num_attention_heads, **options}))


def build_llama(size: ModelSize, model_class: type[LlamaForCausalLM] = LlamaForCausalLM) -> PreTrainedModel:
    """A Llama of exactly these sizes."""
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


_BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "dfn": _build_dfn,
    "flownetwork": _build_flownetwork,
    "flow-transformer": partial(_build_flownetwork, block_type="flow_transformer"),
    "flownetwork-1-pattern": partial(_build_flownetwork, num_patterns=1),
    "flownetwork-no-flow": partial(_build_flownetwork, model_class=FlowNetworkWithoutFlow),
    "flownetwork-no-memory": partial(_build_flownetwork, memory_size=0),
    "llama": build_llama,
    "llama-conv": partial(build_llama, model_class=ConvGatedLlamaForCausalLM),
}
MODELS = tuple(_BUILDERS)


def matching_intermediate_size(
    name: str, builder: Callable[[ModelSize], PreTrainedModel], size: ModelSize, multiple_of: int = 1
) -> int:
    """The `intermediate_size` that gives a model of this name and builder as many parameters as the DFN of this size.

    Args:
        multiple_of: what it is rounded to.

    Raises:
        ValueError: the DFN is too small.
    """

    def parameters(builder: Callable[[ModelSize], PreTrainedModel], intermediate_size: int) -> int:
        with torch.device("meta"):
            return count_parameters(builder(replace(size, intermediate_size=intermediate_size)))

    wanted = parameters(_build_dfn, size.intermediate_size)
    least, next_least = (parameters(builder, width) for width in (1, 2))
    width = multiple_of * round((1 + (wanted - least) / (next_least - least)) / multiple_of)
    if width < 1:
        raise ValueError(
            f"a {name} of hidden_size {size.hidden_size} has at least {least:,} parameters, the DFN only {wanted:,}: "
            f"raise intermediate_size (now {size.intermediate_size})"
        )
    return width
