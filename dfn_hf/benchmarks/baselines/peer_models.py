"""Models of other families for the speed comparison, with the same number of parameters as a DFN.

They are not trained: their speed depends on their size, not on their weights.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    ReformerConfig,
    ReformerModelWithLMHead,
)

from .models import MODELS, ModelSize, build_model, matching_intermediate_size

MAMBA_HEAD_DIM = 64
REFORMER_CHUNK = 64
PEERS = (*MODELS, "lfm2", "mamba2", "reformer", "gla")


def build_peer(name: str, size: ModelSize, *, length: int, device: str = "cpu") -> PreTrainedModel:
    """Build a randomly initialised model of any family in `PEERS`.

    Args:
        name: one of `PEERS`.
        size: size of the DFN.
        length: tokens per forward pass; a Reformer has this number of position embeddings.
        device: device of the model.

    Raises:
        ValueError: `name` is unknown, its package is missing, or the DFN has fewer parameters than the smallest model
            with this name.
    """
    if name not in PEERS:
        raise ValueError(f"model is {name!r}: choose one of {', '.join(PEERS)}")
    if name in MODELS:
        return build_model(name, size, device=device)
    builders: dict[str, Callable[[ModelSize], PreTrainedModel]] = {
        "lfm2": build_lfm2,
        "mamba2": build_mamba2,
        "reformer": partial(build_reformer, length=length),
        "gla": build_gla,
    }
    builder = builders[name]
    width = matching_intermediate_size(name, builder, size, multiple_of=8)
    return torch.nn.Module.to(builder(replace(size, intermediate_size=width)), device)


def build_lfm2(size: ModelSize) -> PreTrainedModel:
    """Build an LFM2: one attention layer after two layers of gated short convolutions, four query heads per key."""
    config = Lfm2Config(
        **_common(size),
        num_hidden_layers=size.num_hidden_layers,
        intermediate_size=size.intermediate_size,
        block_auto_adjust_ff_dim=False,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=max(1, size.num_attention_heads // 4),
        full_attn_idxs=list(range(min(2, size.num_hidden_layers - 1), size.num_hidden_layers, 3)),
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
    )
    return Lfm2ForCausalLM(config)


def build_mamba2(size: ModelSize) -> PreTrainedModel:
    """Build a Mamba-2 with two blocks per layer of `size`; `intermediate_size` is the size of its state."""
    config = Mamba2Config(
        **_common(size),
        num_hidden_layers=2 * size.num_hidden_layers,
        state_size=size.intermediate_size,
        head_dim=MAMBA_HEAD_DIM,
        num_heads=2 * size.hidden_size // MAMBA_HEAD_DIM,
        expand=2,
        n_groups=1,
        tie_word_embeddings=True,
    )
    return Mamba2ForCausalLM(config)


def build_reformer(size: ModelSize, length: int) -> PreTrainedModel:
    """Build a Reformer: alternating layers of local and LSH attention, axial embeddings of `length` positions.

    Attention is masked causally, but the chunk of a token depends on the hashes of all tokens of the row, later ones
    included: changing the last token changes almost all predictions.
    """
    padded = REFORMER_CHUNK * math.ceil(length / REFORMER_CHUNK)
    columns = max(factor for factor in range(1, math.isqrt(padded) + 1) if padded % factor == 0)
    half = size.hidden_size // 2
    config = ReformerConfig(
        **{**_common(size), "pad_token_id": 0},  # rows are padded to whole chunks
        attn_layers=[("local", "lsh")[layer % 2] for layer in range(size.num_hidden_layers)],
        feed_forward_size=size.intermediate_size,
        num_attention_heads=size.num_attention_heads,
        attention_head_size=size.hidden_size // size.num_attention_heads,
        local_attn_chunk_length=REFORMER_CHUNK,
        lsh_attn_chunk_length=REFORMER_CHUNK,
        axial_pos_shape=[padded // columns, columns],
        axial_pos_embds_dim=[size.hidden_size - half, half],
        max_position_embeddings=padded,
        is_decoder=True,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
    )
    return ReformerModelWithLMHead(config)


def build_gla(size: ModelSize) -> PreTrainedModel:
    """Build a gated linear attention model of flash-linear-attention, whose kernels need a GPU.

    Raises:
        ValueError: flash-linear-attention is not installed.
    """
    try:
        from fla.models import GLAConfig, GLAForCausalLM
    except ImportError as error:
        raise ValueError(
            "model is 'gla', but flash-linear-attention is not installed: pip install flash-linear-attention"
        ) from error
    config = GLAConfig(
        **_common(size),
        num_hidden_layers=size.num_hidden_layers,
        intermediate_size=size.intermediate_size,
        num_heads=size.num_attention_heads,
        tie_word_embeddings=True,
    )
    return GLAForCausalLM(config)


def build_qwen3_next(size: ModelSize) -> PreTrainedModel:
    """Build a Qwen3-Next: one attention layer after three layers of the gated delta rule, without experts."""
    head_dim = size.hidden_size // size.num_attention_heads
    config = Qwen3NextConfig(
        **_common(size),
        num_hidden_layers=size.num_hidden_layers,
        intermediate_size=size.intermediate_size,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=max(1, size.num_attention_heads // 4),
        head_dim=head_dim,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim,
        linear_num_key_heads=size.num_attention_heads,
        linear_num_value_heads=size.num_attention_heads,
        mlp_only_layers=list(range(size.num_hidden_layers)),
        tie_word_embeddings=True,
    )
    return Qwen3NextForCausalLM(config)


def _common(size: ModelSize) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "initializer_range": size.initializer_range or size.hidden_size**-0.5,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
