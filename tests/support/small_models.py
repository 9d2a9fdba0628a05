"""One small language model per family with all optional parts, for tests of other libraries."""

import torch
from transformers import PreTrainedModel

from dfn_hf import (
    DFNConfig,
    DFNForCausalLM,
    FlowNetworkConfig,
    FlowNetworkForCausalLM,
    LiquidConfig,
    LiquidForSeq2SeqLM,
)

# 4-bit quantization on a CPU requires multiples of 64 input and 32 output features.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
MODELS = {
    "dfn": lambda **sizes: DFNForCausalLM(DFNConfig(**SIZES | sizes, memory_slots=2, memory_chunk=4)),
    "dfn-adaptive": lambda **sizes: DFNForCausalLM(
        DFNConfig(**SIZES | sizes, local_window=4, entity_sampling="adaptive", max_entity_length=8)
    ),
    "flownetwork": lambda **sizes: FlowNetworkForCausalLM(
        FlowNetworkConfig(**SIZES | sizes, memory_size=2, num_memory_heads=2, memory_chunk=4)
    ),
    "liquid": lambda **sizes: LiquidForSeq2SeqLM(
        LiquidConfig(**SIZES | sizes, frame_length=8, decoder_frame_length=4)
    ),
}


def make_small_model(family: str, **sizes: int) -> PreTrainedModel:
    """Return a model in evaluation mode, with the same weights each time; `sizes` override `SIZES`."""
    torch.manual_seed(0)
    return MODELS[family](**sizes).eval()
