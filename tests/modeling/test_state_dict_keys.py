"""Freezes the state-dict keys of every model class: checkpoints, conversion tables and PEFT defaults rely on them.

After a deliberate change, write the new keys with `python -m tests.modeling.test_state_dict_keys`.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import dfn_hf
from dfn_hf import (
    BidirectionalEncoder,
    DFNConfig,
    DFNFieldModel,
    DFNForCausalLM,
    DFNForContrastive,
    DFNForFieldReconstruction,
    DFNForSequenceClassification,
    DFNModel,
    DFNNativeConfig,
    DFNNativeModel,
    FlowNetworkConfig,
    FlowNetworkForCausalLM,
    FlowNetworkForSequenceClassification,
    FlowNetworkModel,
    FlowNetworkNativeConfig,
    FlowNetworkNativeModel,
    LiquidConfig,
    LiquidForSeq2SeqLM,
    LiquidForSequenceClassification,
    LiquidModel,
    LiquidNativeConfig,
    LiquidNativeModel,
)

FROZEN = Path(__file__).with_suffix(".json")
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
DFN = DFNConfig(**SIZES, memory_slots=2, gated_mlp=True)
SAMPLED_DFN = DFNConfig(**SIZES, entity_sampling="adaptive", carry_positions=True)
CONTRASTIVE_DFN = DFNConfig(**SIZES, entity_sampling="adaptive", contrastive_fields=True)
RMS_DFN = DFNConfig(**SIZES, flow_norm="rms", output_gate=False)
FLOWNETWORK = FlowNetworkConfig(**SIZES, memory_size=2, num_memory_heads=2)
LIQUID = LiquidConfig(**SIZES, num_decoder_layers=1, max_position_embeddings=64)
ORIGINAL_LIQUID = {"vocab_size": 32, "embed_dim": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
MODELS = {
    "DFNModel": (DFNModel, DFN),
    "DFNModel, adaptive": (DFNModel, SAMPLED_DFN),
    "DFNModel, rms": (DFNModel, RMS_DFN),
    "DFNForCausalLM": (DFNForCausalLM, DFN),
    "DFNForSequenceClassification": (DFNForSequenceClassification, DFN),
    "DFNFieldModel": (DFNFieldModel, SAMPLED_DFN),
    "DFNForFieldReconstruction": (DFNForFieldReconstruction, SAMPLED_DFN),
    "DFNForContrastive": (DFNForContrastive, CONTRASTIVE_DFN),
    "DFNNativeModel": (DFNNativeModel, DFNNativeConfig(num_layers=1)),
    "FlowNetworkModel": (FlowNetworkModel, FLOWNETWORK),
    "FlowNetworkForCausalLM": (FlowNetworkForCausalLM, FLOWNETWORK),
    "FlowNetworkForSequenceClassification": (FlowNetworkForSequenceClassification, FLOWNETWORK),
    "FlowNetworkNativeModel": (FlowNetworkNativeModel, FlowNetworkNativeConfig(d_model=16, num_layers=1)),
    "BidirectionalEncoder": (BidirectionalEncoder, LIQUID),
    "LiquidModel": (LiquidModel, LIQUID),
    "LiquidForSeq2SeqLM": (LiquidForSeq2SeqLM, LIQUID),
    "LiquidForSequenceClassification": (LiquidForSequenceClassification, LIQUID),
    "LiquidNativeModel": (LiquidNativeModel, LiquidNativeConfig(**ORIGINAL_LIQUID)),
}


def state_dict_keys(name: str) -> list[str]:
    """Return the sorted keys of a model in `MODELS`."""
    model_class, config = MODELS[name]
    with torch.device("meta"):
        return sorted(model_class(config).state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_keys_are_frozen(name):
    assert state_dict_keys(name) == json.loads(FROZEN.read_text(encoding="utf-8"))[name]


def test_every_exported_model_class_is_frozen():
    exported = {getattr(dfn_hf, name) for name in dfn_hf.__all__}
    models = {cls for cls in exported if isinstance(cls, type) and issubclass(cls, PreTrainedModel)}
    assert models == {model_class for model_class, _ in MODELS.values()}


if __name__ == "__main__":
    keys = {name: state_dict_keys(name) for name in MODELS}
    FROZEN.write_text(json.dumps(keys, indent=1) + "\n", encoding="utf-8")
