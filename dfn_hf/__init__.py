"""Dynamic Flow Networks for Hugging Face Transformers."""

from pathlib import Path

# In a checkout `modeling` and `conversion` lie beside this folder, not in it: the installed layout holds there too.
if (Path(__file__).parent.parent / "modeling" / "configuration_dfn.py").exists():
    __path__.append(str(Path(__file__).parent.parent))

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from .embedded import checkpoint_path  # noqa: E402
from .flow_memory_callback import FlowMemoryCallback  # noqa: E402
from .modeling.configuration_dfn import DFNConfig  # noqa: E402
from .modeling.configuration_flownetwork import FlowNetworkConfig, adjust_num_heads  # noqa: E402
from .modeling.flow_memory import FlowMemoryNetwork  # noqa: E402
from .modeling.flow_routing import ContextAwareFlowRouter, FlowLayer  # noqa: E402
from .modeling.flow_search import nearest_predecessors  # noqa: E402
from .modeling.flownetwork import (  # noqa: E402
    EnhancedFlowLayer,
    EnhancedFlowTransformer,
    FlowNetwork,
    safe_tensor_to_int,
)
from .modeling.modeling_dfn import DFNForCausalLM, DFNForSequenceClassification, DFNModel  # noqa: E402
from .modeling.modeling_flownetwork import (  # noqa: E402
    FlowNetworkForCausalLM,
    FlowNetworkForSequenceClassification,
    FlowNetworkModel,
)

__version__ = "0.1.0"

for config, model, causal_lm, classifier in (
    (DFNConfig, DFNModel, DFNForCausalLM, DFNForSequenceClassification),
    (FlowNetworkConfig, FlowNetworkModel, FlowNetworkForCausalLM, FlowNetworkForSequenceClassification),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    # So that save_pretrained and push_to_hub take the code along.
    config.register_for_auto_class()
    for head, auto_class in (
        (model, AutoModel),
        (causal_lm, AutoModelForCausalLM),
        (classifier, AutoModelForSequenceClassification),
    ):
        auto_class.register(config, head, exist_ok=True)
        head.register_for_auto_class(auto_class.__name__)

__all__ = [
    "ContextAwareFlowRouter",
    "DFNConfig",
    "DFNForCausalLM",
    "DFNForSequenceClassification",
    "DFNModel",
    "EnhancedFlowLayer",
    "EnhancedFlowTransformer",
    "FlowLayer",
    "FlowMemoryCallback",
    "FlowMemoryNetwork",
    "FlowNetwork",
    "FlowNetworkConfig",
    "FlowNetworkForCausalLM",
    "FlowNetworkForSequenceClassification",
    "FlowNetworkModel",
    "adjust_num_heads",
    "checkpoint_path",
    "nearest_predecessors",
    "safe_tensor_to_int",
]
