"""Flow architectures for Hugging Face Transformers: DFN, FlowNetwork and Liquid.

Importing the package registers the three families with `AutoConfig` and the `AutoModel` classes.
"""

import sys
from pathlib import Path

# In a checkout `modeling` and `conversion` are folders beside this one; here they become subpackages, as installed.
if (Path(__file__).parent.parent / "modeling" / "dfn" / "configuration_dfn.py").exists():
    __path__.append(str(Path(__file__).parent.parent))

from .lazy import lazy_exports  # noqa: E402

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "loading.bundled": ["checkpoint_path"],
        "modeling.dfn.configuration_dfn": ["DFNConfig"],
        "modeling.dfn.modeling_dfn": ["DFNForCausalLM", "DFNForSequenceClassification", "DFNModel"],
        "modeling.dfn.modeling_dfn_contrastive": ["DFNForContrastive"],
        "modeling.dfn.modeling_dfn_field": ["DFNFieldModel", "DFNForFieldReconstruction"],
        "modeling.flownetwork.configuration_flownetwork": ["FlowNetworkConfig", "adjust_num_heads"],
        "modeling.flownetwork.memory": ["FlowMemoryNetwork"],
        "modeling.flownetwork.modeling_flownetwork": [
            "FlowNetworkForCausalLM",
            "FlowNetworkForSequenceClassification",
            "FlowNetworkModel",
        ],
        "modeling.flownetwork.paper_api": [
            "EnhancedFlowLayer",
            "EnhancedFlowTransformer",
            "FlowNetwork",
            "safe_tensor_to_int",
        ],
        "modeling.flownetwork.routing": ["ContextAwareFlowRouter", "FlowLayer"],
        "modeling.liquid.attention": ["EnhancedLocalAttentionWithGQA"],
        "modeling.liquid.block": ["ImprovedTransformerBlock"],
        "modeling.liquid.configuration_liquid": ["LiquidConfig"],
        "modeling.liquid.deformable_conv": ["DeformableConv1d", "OptimizedGatedConvolution"],
        "modeling.liquid.embedding": ["EnhancedLiquidEmbedding"],
        "modeling.liquid.frequency_attention": ["FrequencyHyenaAttention"],
        "modeling.liquid.lstm_memory": ["EnhancedLSTM"],
        "modeling.liquid.mixture_of_experts": ["MoELayer"],
        "modeling.liquid.modeling_liquid": [
            "BidirectionalEncoder",
            "LiquidForSeq2SeqLM",
            "LiquidForSequenceClassification",
            "LiquidModel",
        ],
        "modeling.native.configuration_dfn_native": ["DFNNativeConfig"],
        "modeling.native.configuration_flownetwork_native": ["FlowNetworkNativeConfig"],
        "modeling.native.configuration_liquid_native": ["LiquidNativeConfig"],
        "modeling.native.modeling_dfn_native": ["DFNNativeModel"],
        "modeling.native.modeling_flownetwork_native": ["FlowNetworkNativeModel"],
        "modeling.native.modeling_liquid_native": ["LiquidNativeModel"],
        "modeling.ops.neighbor_search": ["nearest_predecessors"],
        "training.callbacks.flow_memory": ["FlowMemoryCallback"],
        "training.callbacks.module_norms": ["ModuleNormsCallback"],
    },
)

# The command line registers the families when it loads a model: `--help` and argument errors do not import torch.
if "dfn_hf_cli" not in sys.modules:
    from .registration import register_families

    register_families()
