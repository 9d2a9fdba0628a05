"""The stated growth of the cache per token is the measured growth."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dfn_hf import DFNConfig, FlowNetworkConfig, LiquidConfig
from dfn_hf.hub.cache_size import cache_bytes_per_token
from dfn_hf.modeling.modules.cache import CACHE_NAME

SIZES = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
CONFIGS = {
    "dfn": DFNConfig(**SIZES),
    "dfn exact": DFNConfig(**SIZES, search_implementation="exact", position_dim=3),
    "dfn in bfloat16": DFNConfig(**SIZES, dtype="bfloat16"),
    "dfn with running norms and a memory": DFNConfig(**SIZES, flow_norm="running", memory_slots=3, memory_chunk=16),
    "dfn without neighbours": DFNConfig(**SIZES, num_neighbors=0),
    "flownetwork": FlowNetworkConfig(**SIZES, num_memory_heads=2),
    "flow transformer": FlowNetworkConfig(
        **SIZES, num_memory_heads=2, block_type="flow_transformer", num_key_value_heads=1, memory_chunk=32
    ),
    "flownetwork without a memory": FlowNetworkConfig(**SIZES, num_memory_heads=2, memory_size=0),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=1),
}


def cache_bytes(cache) -> int:
    """Bytes of the states of this package's layers, or of keys and values."""
    tensors = []
    for layer in cache.layers:
        states = getattr(layer, "states", None)
        tensors += [layer.keys, layer.values] if states is None else [state.data for state in states.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_growth_is_the_measured_one(name):
    config = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32).eval()
    # Whole chunks, no room that storage keeps ahead, and for DFN enough entities for a search tree.
    short, long = (2560, 5120) if config.model_type == "dfn" else (256, 512)
    with torch.no_grad():
        sizes = [
            cache_bytes(model(torch.zeros(1, length, dtype=torch.long), use_cache=True)[CACHE_NAME])
            for length in (short, long)
        ]
    assert cache_bytes_per_token(config) == (sizes[1] - sizes[0]) // (long - short)


@pytest.mark.parametrize("config", [LiquidConfig(), DFNConfig(entity_sampling="adaptive")])
def test_families_without_uniform_growth_have_none(config):
    assert cache_bytes_per_token(config) is None
