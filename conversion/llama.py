"""Conversion of Llama-family checkpoints to DFN.

With `flow_norm="rms"`, `gated_mlp=True` and `output_gate=False` a DFN layer equals a Llama layer except for the
attention. The convolution starts as the identity, and the MLP weights of the attention context start at zero. The
converted model therefore equals the Llama except for the attention weights: positions and flow are new and are fitted
by distillation.
"""

from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..modeling.dfn.configuration_dfn import DFNConfig
from ..modeling.dfn.modeling_dfn import DFNForCausalLM
from .key_table import Dropped, Table, compare_keys, expand, target_names
from .report import ConversionReport

DOT_PRODUCT = Dropped("DFN attention uses learnt positions and flow instead of products of rotated queries and keys")

# V vocab_size, D hidden_size, I intermediate_size, Q query heads · head_dim, K key heads · head_dim, N head_dim
LLAMA: Table = {
    "model.embed_tokens.weight": ("V D", "model.embed_tokens.weight"),
    "model.layers.{layer}.input_layernorm.weight": ("D", "model.layers.{layer}.flow_norm.norm.weight"),
    "model.layers.{layer}.self_attn.q_proj.weight": ("Q D", DOT_PRODUCT),
    "model.layers.{layer}.self_attn.k_proj.weight": ("K D", DOT_PRODUCT),
    "model.layers.{layer}.self_attn.v_proj.weight": ("K D", "model.layers.{layer}.attention.value_proj.weight"),
    "model.layers.{layer}.self_attn.o_proj.weight": ("D Q", "model.layers.{layer}.out_proj.weight"),
    "model.layers.{layer}.post_attention_layernorm.weight": ("D", "model.layers.{layer}.mlp_norm.norm.weight"),
    "model.layers.{layer}.mlp.gate_proj.weight": ("I D", "model.layers.{layer}.mlp.gate_proj.weight"),
    "model.layers.{layer}.mlp.up_proj.weight": ("I D", "model.layers.{layer}.mlp.up_proj.weight"),
    "model.layers.{layer}.mlp.down_proj.weight": ("D I", "model.layers.{layer}.mlp.down_proj.weight"),
    "model.norm.weight": ("D", "model.norm.weight"),
    "lm_head.weight": ("V D", "lm_head.weight"),
}
QWEN3: Table = {
    **LLAMA,
    "model.layers.{layer}.self_attn.q_norm.weight": ("N", DOT_PRODUCT),
    "model.layers.{layer}.self_attn.k_norm.weight": ("N", DOT_PRODUCT),
}
TABLES = {"llama": LLAMA, "mistral": LLAMA, "qwen3": QWEN3}
NOTE = "The attention is new: fit it to the attention of the original with `dfn-hf distill`."


def llama_to_dfn(
    source: str | Path,
    *,
    position_dim: int = 8,
    num_neighbors: int = 16,
    local_window: int = 32,
    seed: int = 0,
) -> tuple[DFNForCausalLM, ConversionReport]:
    """Convert a checkpoint of the Llama family to a DFN.

    Args:
        source: transformers folder of a causal Llama, Mistral or Qwen3 model, or its Hub id.
        position_dim, num_neighbors, local_window: fields of `DFNConfig`.
        seed: seed of the new weights.

    Returns:
        (the model in the checkpoint's dtype, the report).

    Raises:
        ValueError: the model belongs to another family, or has parts without a counterpart in DFN; the message names
            them.
        OSError: `source` contains no model.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_family(config)
    llama = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    weights = llama.state_dict()
    table = TABLES[config.model_type]
    counts, difference = compare_keys(table, set(weights))
    if difference.unexpected:
        raise ValueError(
            f"{source} cannot be converted: {difference.unexpected[0]} has no counterpart in DFN; use a model "
            "without it"
        )
    targets = {key: target for key, (_, target) in expand(table, counts).items()}

    dfn_config = DFNConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        position_dim=position_dim,
        num_neighbors=num_neighbors,
        local_window=local_window,
        flow_norm="rms",
        output_gate=False,
        gated_mlp=True,
        norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    converted = {
        name: adapt_weight(name, weights[key], config)
        for key, target in targets.items()
        for name in target_names(target)
    }
    torch.manual_seed(seed)
    dfn = DFNForCausalLM.from_pretrained(None, config=dfn_config, state_dict=converted, dtype=llama.dtype)
    with torch.no_grad():
        for layer in dfn.model.layers:
            layer.conv.conv.weight.zero_()[..., -1] = 1
    dfn.generation_config = llama.generation_config

    report = ConversionReport(
        layout=config.model_type,
        model=type(dfn).__name__,
        mapped={key: target_names(target) for key, target in targets.items() if not isinstance(target, Dropped)},
        dropped={key: target.reason for key, target in targets.items() if isinstance(target, Dropped)},
        new=sorted(dfn.state_dict().keys() - converted.keys()),
        notes=[NOTE, *window_notes(config)],
    )
    return dfn, report


def window_notes(config: PreTrainedConfig) -> list[str]:
    """Return the notes of the report for a model with a sliding window."""
    window = getattr(config, "sliding_window", None)
    return [f"The original attends to the last {window} tokens; DFN has no such limit."] if window else []


def check_family(config: PreTrainedConfig) -> None:
    """Raise `ValueError` if the model differs from a DFN in more than its attention."""
    if config.model_type not in TABLES:
        raise ValueError(
            f"model_type {config.model_type!r} cannot be converted to DFN: use one of {', '.join(TABLES)}"
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"hidden_act is {config.hidden_act!r}, but the gated MLP of DFN requires 'silu': use a model with it"
        )
    width = config.num_attention_heads * config.head_dim
    if width != config.hidden_size:
        raise ValueError(
            f"num_attention_heads ({config.num_attention_heads}) times head_dim ({config.head_dim}) is {width}, but "
            f"DFN requires hidden_size ({config.hidden_size}): use a model where they are equal"
        )


def adapt_weight(name: str, weight: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Reshape a Llama weight to the shape of the DFN weight `name`."""
    if name.endswith("value_proj.weight"):
        groups = config.num_attention_heads // config.num_key_value_heads
        return weight.unflatten(0, (-1, config.head_dim)).repeat_interleave(groups, dim=0).flatten(0, 1)
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return F.pad(weight, (0, config.hidden_size))
    return weight
