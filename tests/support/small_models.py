"""One small language model of every family with all its parts, for programs that take models as they are."""

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

# Four bits on a CPU need multiples of 64 in and 32 out.
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
    """The same weights each time, in evaluation mode; `sizes` in the place of those of `SIZES`."""
    torch.manual_seed(0)
    return MODELS[family](**sizes).eval()
