"""The compared language models, with equal width, depth, number of heads and number of parameters."""

from functools import partial
from typing import Any

from transformers import PreTrainedModel

from dfn_hf.presets import (
    ModelBuilder,
    ModelSize,
    build_dfn,
    build_flownetwork,
    build_llama,
    count_parameters,
    matching_intermediate_size,
)
from dfn_hf.presets import build_model as build_preset

from .ablated_flownetwork import FlowNetworkWithoutFlow
from .llama_conv import ConvGatedLlamaForCausalLM

__all__ = ["MODELS", "ModelSize", "build_llama", "build_model", "count_parameters", "matching_intermediate_size"]

_BUILDERS: dict[str, ModelBuilder] = {
    "dfn": build_dfn,
    "flownetwork": build_flownetwork,
    "flow-transformer": partial(build_flownetwork, block_type="flow_transformer"),
    "flownetwork-1-pattern": partial(build_flownetwork, num_patterns=1),
    "flownetwork-no-flow": partial(build_flownetwork, model_class=FlowNetworkWithoutFlow),
    "flownetwork-no-memory": partial(build_flownetwork, memory_size=0),
    "llama": build_llama,
    "llama-conv": partial(build_llama, model_class=ConvGatedLlamaForCausalLM),
}
MODELS = tuple(_BUILDERS)


def build_model(name: str, size: ModelSize, *, device: str = "cpu", **options: Any) -> PreTrainedModel:
    """Build one of `MODELS` on `device`, as `dfn_hf.presets.build_model` does."""
    return build_preset(name, size, device=device, builders=_BUILDERS, **options)
