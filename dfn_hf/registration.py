"""Registers the model families with transformers, so that `AutoModel` and pipelines find them by `model_type`.

Configurations are registered when the package is imported. Model classes import most of transformers, so they are
registered when the first configuration is created: no `AutoModel` looks for a class before it has a configuration.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig

from .hub.peft_defaults import register_peft_defaults
from .hub.pipelines import register_text2text_pipeline
from .modeling.dfn.configuration_dfn import DFNConfig
from .modeling.flownetwork.configuration_flownetwork import FlowNetworkConfig
from .modeling.hub_code import HubCodeMixin
from .modeling.liquid.configuration_liquid import LiquidConfig
from .modeling.native.configuration_dfn_native import DFNNativeConfig
from .modeling.native.configuration_flownetwork_native import FlowNetworkNativeConfig
from .modeling.native.configuration_liquid_native import LiquidNativeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIGURATIONS: tuple[type[PreTrainedConfig], ...] = (
    DFNConfig,
    FlowNetworkConfig,
    LiquidConfig,
    DFNNativeConfig,
    FlowNetworkNativeConfig,
    LiquidNativeConfig,
)


@cache
def register_families() -> None:
    """Register every family; further calls do nothing."""
    for config in CONFIGURATIONS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
    HubCodeMixin.when_created = staticmethod(register_models)
    register_text2text_pipeline()
    register_peft_defaults()


@cache
def register_models() -> None:
    """Register the model classes of every family; further calls do nothing."""
    for config, heads in model_classes().items():
        for auto_class, head in heads.items():
            auto_class.register(config, head, exist_ok=True)


def model_classes() -> dict[type[PreTrainedConfig], dict[Any, type["PreTrainedModel"]]]:
    """The model class of each `AutoModel` class, for every configuration."""
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForPreTraining,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTextEncoding,
    )

    from .modeling.dfn.modeling_dfn import DFNForCausalLM, DFNForSequenceClassification, DFNModel
    from .modeling.dfn.modeling_dfn_contrastive import DFNForContrastive
    from .modeling.dfn.modeling_dfn_field import DFNForFieldReconstruction
    from .modeling.flownetwork.modeling_flownetwork import (
        FlowNetworkForCausalLM,
        FlowNetworkForSequenceClassification,
        FlowNetworkModel,
    )
    from .modeling.liquid.modeling_liquid import LiquidForSeq2SeqLM, LiquidForSequenceClassification, LiquidModel
    from .modeling.native.modeling_dfn_native import DFNNativeModel
    from .modeling.native.modeling_flownetwork_native import FlowNetworkNativeModel
    from .modeling.native.modeling_liquid_native import LiquidNativeModel

    return {
        DFNConfig: {
            AutoModel: DFNModel,
            AutoModelForCausalLM: DFNForCausalLM,
            AutoModelForSequenceClassification: DFNForSequenceClassification,
            AutoModelForPreTraining: DFNForFieldReconstruction,
            AutoModelForTextEncoding: DFNForContrastive,
        },
        FlowNetworkConfig: {
            AutoModel: FlowNetworkModel,
            AutoModelForCausalLM: FlowNetworkForCausalLM,
            AutoModelForSequenceClassification: FlowNetworkForSequenceClassification,
        },
        LiquidConfig: {
            AutoModel: LiquidModel,
            AutoModelForSeq2SeqLM: LiquidForSeq2SeqLM,
            AutoModelForSequenceClassification: LiquidForSequenceClassification,
        },
        DFNNativeConfig: {AutoModel: DFNNativeModel},
        FlowNetworkNativeConfig: {AutoModel: FlowNetworkNativeModel},
        LiquidNativeConfig: {AutoModel: LiquidNativeModel},
    }
