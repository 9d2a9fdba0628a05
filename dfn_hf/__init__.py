"""Flow architectures for Hugging Face Transformers: DFN, FlowNetwork and Liquid."""

from pathlib import Path

# In a checkout `modeling` and `conversion` lie beside this folder, not in it: the installed layout holds there too.
if (Path(__file__).parent.parent / "modeling" / "configuration_dfn.py").exists():
    __path__.append(str(Path(__file__).parent.parent))

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
)

from .embedded import checkpoint_path  # noqa: E402
from .flow_memory_callback import FlowMemoryCallback  # noqa: E402
from .modeling.configuration_dfn import DFNConfig  # noqa: E402
from .modeling.configuration_dfn_native import DFNNativeConfig  # noqa: E402
from .modeling.configuration_flownetwork import FlowNetworkConfig, adjust_num_heads  # noqa: E402
from .modeling.configuration_flownetwork_native import FlowNetworkNativeConfig  # noqa: E402
from .modeling.configuration_liquid import LiquidConfig  # noqa: E402
from .modeling.configuration_liquid_native import LiquidNativeConfig  # noqa: E402
from .modeling.deformable_conv import DeformableConv1d, OptimizedGatedConvolution  # noqa: E402
from .modeling.flow_memory import FlowMemoryNetwork  # noqa: E402
from .modeling.flow_routing import ContextAwareFlowRouter, FlowLayer  # noqa: E402
from .modeling.flow_search import nearest_predecessors  # noqa: E402
from .modeling.flownetwork import (  # noqa: E402
    EnhancedFlowLayer,
    EnhancedFlowTransformer,
    FlowNetwork,
    safe_tensor_to_int,
)
from .modeling.frequency_attention import FrequencyHyenaAttention  # noqa: E402
from .modeling.liquid_block import ImprovedTransformerBlock  # noqa: E402
from .modeling.liquid_embedding import EnhancedLiquidEmbedding  # noqa: E402
from .modeling.local_attention import EnhancedLocalAttentionWithGQA  # noqa: E402
from .modeling.lstm_memory import EnhancedLSTM  # noqa: E402
from .modeling.mixture_of_experts import MoELayer  # noqa: E402
from .modeling.modeling_dfn import DFNForCausalLM, DFNForSequenceClassification, DFNModel  # noqa: E402
from .modeling.modeling_dfn_contrastive import DFNForContrastive  # noqa: E402
from .modeling.modeling_dfn_field import DFNFieldModel, DFNForFieldReconstruction  # noqa: E402
from .modeling.modeling_dfn_native import DFNNativeModel  # noqa: E402
from .modeling.modeling_flownetwork import (  # noqa: E402
    FlowNetworkForCausalLM,
    FlowNetworkForSequenceClassification,
    FlowNetworkModel,
)
from .modeling.modeling_flownetwork_native import FlowNetworkNativeModel  # noqa: E402
from .modeling.modeling_liquid import (  # noqa: E402
    BidirectionalEncoder,
    LiquidForSeq2SeqLM,
    LiquidForSequenceClassification,
    LiquidModel,
)
from .modeling.modeling_liquid_native import LiquidNativeModel  # noqa: E402
from .module_norms_callback import ModuleNormsCallback  # noqa: E402
from .peft_defaults import register as register_peft_defaults  # noqa: E402
from .text2text_pipeline import register as register_text2text_pipeline  # noqa: E402

__version__ = "0.1.0"


def _register_families() -> None:
    for config, heads in (
        (
            DFNConfig,
            {
                AutoModel: DFNModel,
                AutoModelForCausalLM: DFNForCausalLM,
                AutoModelForSequenceClassification: DFNForSequenceClassification,
                AutoModelForPreTraining: DFNForFieldReconstruction,
                AutoModelForTextEncoding: DFNForContrastive,
            },
        ),
        (
            FlowNetworkConfig,
            {
                AutoModel: FlowNetworkModel,
                AutoModelForCausalLM: FlowNetworkForCausalLM,
                AutoModelForSequenceClassification: FlowNetworkForSequenceClassification,
            },
        ),
        (
            LiquidConfig,
            {
                AutoModel: LiquidModel,
                AutoModelForSeq2SeqLM: LiquidForSeq2SeqLM,
                AutoModelForSequenceClassification: LiquidForSequenceClassification,
            },
        ),
        (DFNNativeConfig, {AutoModel: DFNNativeModel}),
        (FlowNetworkNativeConfig, {AutoModel: FlowNetworkNativeModel}),
        (LiquidNativeConfig, {AutoModel: LiquidNativeModel}),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        # So that save_pretrained and push_to_hub take the code along.
        config.register_for_auto_class()
        for auto_class, head in heads.items():
            auto_class.register(config, head, exist_ok=True)
            head.register_for_auto_class(auto_class.__name__)


_register_families()
register_text2text_pipeline()
register_peft_defaults()

__all__ = [
    "BidirectionalEncoder",
    "ContextAwareFlowRouter",
    "DFNConfig",
    "DFNFieldModel",
    "DFNForCausalLM",
    "DFNForContrastive",
    "DFNForFieldReconstruction",
    "DFNForSequenceClassification",
    "DFNModel",
    "DFNNativeConfig",
    "DFNNativeModel",
    "DeformableConv1d",
    "EnhancedFlowLayer",
    "EnhancedFlowTransformer",
    "EnhancedLSTM",
    "EnhancedLiquidEmbedding",
    "EnhancedLocalAttentionWithGQA",
    "FlowLayer",
    "FlowMemoryCallback",
    "FlowMemoryNetwork",
    "FlowNetwork",
    "FlowNetworkConfig",
    "FlowNetworkForCausalLM",
    "FlowNetworkForSequenceClassification",
    "FlowNetworkModel",
    "FlowNetworkNativeConfig",
    "FlowNetworkNativeModel",
    "FrequencyHyenaAttention",
    "ImprovedTransformerBlock",
    "LiquidConfig",
    "LiquidForSeq2SeqLM",
    "LiquidForSequenceClassification",
    "LiquidModel",
    "LiquidNativeConfig",
    "LiquidNativeModel",
    "MoELayer",
    "ModuleNormsCallback",
    "OptimizedGatedConvolution",
    "adjust_num_heads",
    "checkpoint_path",
    "nearest_predecessors",
    "safe_tensor_to_int",
]
