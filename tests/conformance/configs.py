"""Small configurations that use every mechanism of their family."""

from typing import Any

from dfn_hf import DFNConfig, FlowNetworkConfig, LiquidConfig

VOCABULARY = 99
SPECIAL_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def dfn_config(**overrides) -> DFNConfig:
    options: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_neighbors": 4,
        "local_window": 3,
        "memory_slots": 2,
        "memory_chunk": 4,
    }
    return DFNConfig(**SPECIAL_TOKENS | options | overrides)


def adaptive_dfn_config(**overrides) -> DFNConfig:
    sampling = {"entity_sampling": "adaptive", "entity_rate": 0.4, "max_entity_length": 4, "num_neighbors": 2}
    return dfn_config(**sampling | overrides)


def flownetwork_config(**overrides) -> FlowNetworkConfig:
    options: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "num_patterns": 3,
        "base_sparsity": 0.5,
        "flow_window": 8,
        "min_flow_window": 2,
        "memory_size": 2,
        "num_memory_heads": 2,
        "memory_chunk": 4,
    }
    return FlowNetworkConfig(**SPECIAL_TOKENS | options | overrides)


def liquid_config(**overrides) -> LiquidConfig:
    """One block in encoder and decoder: with two, half-precision differences exceed the tests' tolerance."""
    options: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "attention_window": 8,
        "frame_length": 8,
        "decoder_frame_length": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "lstm_hidden_size": 16,
    }
    return LiquidConfig(**SPECIAL_TOKENS | options | overrides)
