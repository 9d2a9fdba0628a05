"""The growth of a model's cache per token, from its configuration alone. docs/models lists the states that it sums."""

import math
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..modeling.flownetwork.routing import CONTEXT_SIZE
from ..modeling.ops.box_tree import index_layout, index_shapes

MANY_ENTITIES = 5 * 2**17  # parts of a constant size do not count


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
    """Positions, the search tree, keys and values of all heads, and the sums of running norms."""
    heads, wide = config.num_attention_heads, torch.promote_types(dtype, torch.float32).itemsize
    growth = 2 * torch.float64.itemsize if config.flow_norm == "running" else 0
    growth += config.memory_slots * config.hidden_size * dtype.itemsize / config.memory_chunk
    if not config.num_neighbors:
        return growth
    positions_and_keys = config.position_dim * torch.int16.itemsize + (config.position_dim + 1) * wide
    tree = tree_bytes_per_entity(config.position_dim) if config.search_implementation == "tree" else 0
    return growth + heads * (positions_and_keys + tree) + config.hidden_size * dtype.itemsize


def tree_bytes_per_entity(position_dim: int) -> float:
    """Growth of the search tree of one row and head on a CPU, where its layout depends on the C kernels."""
    layout = index_layout(torch.device("cpu"), position_dim)
    small, large = (
        sum(
            math.prod(shape) * (torch.int16 if name == "leaf_boxes" else torch.int32).itemsize
            for name, shape in index_shapes(layout, size, position_dim).items()
        )
        for size in (MANY_ENTITIES, 2 * MANY_ENTITIES)
    )
    return (large - small) / MANY_ENTITIES


def flownetwork_layer(config: Any, dtype: torch.dtype) -> float:
    """Memory slots and the router's context, once per chunk; keys and values of all tokens with full attention."""
    slots = config.memory_size * config.hidden_size + CONTEXT_SIZE
    full_attention = config.block_type == "flow_transformer"
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim if full_attention else 0
    return (slots / config.memory_chunk + keys_and_values) * dtype.itemsize


def llama_layer(config: Any, dtype: torch.dtype) -> float:
    """Keys and values."""
    return 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
