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
from .modeling.configuration_dfn import DFNConfig  # noqa: E402
from .modeling.flow_search import nearest_predecessors  # noqa: E402
from .modeling.modeling_dfn import DFNForCausalLM, DFNForSequenceClassification, DFNModel  # noqa: E402

__version__ = "0.1.0"

AutoConfig.register("dfn", DFNConfig, exist_ok=True)
AutoModel.register(DFNConfig, DFNModel, exist_ok=True)
AutoModelForCausalLM.register(DFNConfig, DFNForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(DFNConfig, DFNForSequenceClassification, exist_ok=True)
for head, auto_class in (
    (DFNModel, "AutoModel"),
    (DFNForCausalLM, "AutoModelForCausalLM"),
    (DFNForSequenceClassification, "AutoModelForSequenceClassification"),
):
    # So that save_pretrained and push_to_hub take the code along.
    head.register_for_auto_class(auto_class)
DFNConfig.register_for_auto_class()

__all__ = [
    "DFNConfig",
    "DFNForCausalLM",
    "DFNForSequenceClassification",
    "DFNModel",
    "checkpoint_path",
    "nearest_predecessors",
]
