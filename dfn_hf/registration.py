"""Registers the model families with transformers, so that `AutoModel` and pipelines find them by `model_type`."""

from functools import cache

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
)

from .hub.peft_defaults import register_peft_defaults
from .hub.pipelines import register_text2text_pipeline
from .modeling.dfn.configuration_dfn import DFNConfig
from .modeling.dfn.modeling_dfn import DFNForCausalLM, DFNForSequenceClassification, DFNModel
from .modeling.dfn.modeling_dfn_contrastive import DFNForContrastive
from .modeling.dfn.modeling_dfn_field import DFNForFieldReconstruction
from .modeling.flownetwork.configuration_flownetwork import FlowNetworkConfig
from .modeling.flownetwork.modeling_flownetwork import (
    FlowNetworkForCausalLM,
    FlowNetworkForSequenceClassification,
    FlowNetworkModel,
)
from .modeling.liquid.configuration_liquid import LiquidConfig
from .modeling.liquid.modeling_liquid import LiquidForSeq2SeqLM, LiquidForSequenceClassification, LiquidModel
from .modeling.native.configuration_dfn_native import DFNNativeConfig
from .modeling.native.configuration_flownetwork_native import FlowNetworkNativeConfig
from .modeling.native.configuration_liquid_native import LiquidNativeConfig
from .modeling.native.modeling_dfn_native import DFNNativeModel
from .modeling.native.modeling_flownetwork_native import FlowNetworkNativeModel
from .modeling.native.modeling_liquid_native import LiquidNativeModel

FAMILIES = {
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


@cache
def register_families() -> None:
    """Register every family; further calls do nothing."""
    for config, heads in FAMILIES.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto_class, head in heads.items():
            auto_class.register(config, head, exist_ok=True)
    register_text2text_pipeline()
    register_peft_defaults()
