"""The growth of a model's cache per token, from its configuration alone. docs/models lists the states that it sums."""

import math
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..modeling.flownetwork.routing import CONTEXT_SIZE


def cache_bytes_per_token(config: PreTrainedConfig) -> int | None:
    """Bytes that the cache grows by per token of a row, over all layers, in the dtype of the configuration.

    Returns:
        The bytes, rounded down; None for a family whose layers do not all grow alike: Liquid, models of fields or
        pairs, and DFN with chunks of bytes.
    """
    growth = {"dfn": dfn_layer, "flownetwork": flownetwork_layer, "llama": llama_layer}.get(config.model_type)
    if growth is None or getattr(config, "entity_sampling", "token") != "token":
        return None
    dtype = getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
    return math.floor(config.num_hidden_layers * growth(config, dtype))


def dfn_layer(config: Any, dtype: torch.dtype) -> float:
    """Positions, cells, links, keys and values of all heads, and the sums of running norms."""
    heads, wide = config.num_attention_heads, torch.promote_types(dtype, torch.float32).itemsize
    growth = 2 * torch.float64.itemsize if config.flow_norm == "running" else 0
    growth += config.memory_slots * config.hidden_size * dtype.itemsize / config.memory_chunk
    if not config.num_neighbors:
        return growth
    with_cells = config.search_implementation == "cells"
    cells_and_links = 2 * config.num_tables * torch.int32.itemsize if with_cells else 0
    positions_and_keys = config.position_dim * wide + (config.position_dim + 1) * wide
    return growth + heads * (positions_and_keys + cells_and_links) + config.hidden_size * dtype.itemsize


def flownetwork_layer(config: Any, dtype: torch.dtype) -> float:
    """Memory slots and the router's context, once per chunk; keys and values of all tokens with full attention."""
    slots = config.memory_size * config.hidden_size + CONTEXT_SIZE
    full_attention = config.block_type == "flow_transformer"
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim if full_attention else 0
    return (slots / config.memory_chunk + keys_and_values) * dtype.itemsize


def llama_layer(config: Any, dtype: torch.dtype) -> float:
    """Keys and values."""
    return 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
