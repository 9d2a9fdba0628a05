"""Checkpoints of the Llama family: all but the attention's choice of what to read becomes a DFN's.

With `flow_norm="rms"`, `gated_mlp` and no `output_gate` a DFN layer is a Llama layer around another attention. Its
convolution starts as the identity and its MLP's weights for what was read as zero, so that it computes what the
Llama does but for the weights with which values are mixed: positions and flow are new, and fitted by distillation.
"""

from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..modeling.dfn.configuration_dfn import DFNConfig
from ..modeling.dfn.modeling_dfn import DFNForCausalLM
from .key_table import Dropped, Table, compare_keys, expand, target_names
from .report import ConversionReport

DOT_PRODUCT = Dropped("a DFN finds what it reads by positions and flow, not by products of rotated queries and keys")

# V vocab_size, D hidden_size, I intermediate_size, Q heads of queries · head_dim, K those of keys, N head_dim
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
NOTE = "The attention is new: `dfn-hf distill` fits it to the original's."


def llama_to_dfn(
    source: str | Path,
    *,
    position_dim: int = 8,
    num_neighbors: int = 16,
    local_window: int = 32,
    seed: int = 0,
) -> tuple[DFNForCausalLM, ConversionReport]:
    """The DFN that starts from a checkpoint of the Llama family.

    Args:
        source: a transformers folder of a causal Llama, Mistral or Qwen3, or its Hub id.
        position_dim, num_neighbors, local_window: fields of the DFN's configuration; see `DFNConfig`.
        seed: of the weights that are new.

    Returns:
        (the model in the dtype of the checkpoint, what became of every weight).

    Raises:
        ValueError: a model of another family, or one with parts that a DFN has no place for; the message names them.
        OSError: `source` holds no model.
    """
    config = AutoConfig.from_pretrained(source)
    check_family(config)
    llama = AutoModelForCausalLM.from_pretrained(source)
    weights = llama.state_dict()
    table = TABLES[config.model_type]
    counts, difference = compare_keys(table, set(weights))
    if difference.unexpected:
        raise ValueError(f"{source} has {difference.unexpected[0]}, and a DFN no place for it: it cannot be converted")
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
    carried = {
        name: fitted(name, weights[key], config) for key, target in targets.items() for name in target_names(target)
    }
    torch.manual_seed(seed)
    dfn = DFNForCausalLM.from_pretrained(None, config=dfn_config, state_dict=carried, dtype=llama.dtype)
    with torch.no_grad():
        for layer in dfn.model.layers:
            layer.conv.conv.weight.zero_()[..., -1] = 1
    dfn.generation_config = llama.generation_config

    report = ConversionReport(
        layout=config.model_type,
        model=type(dfn).__name__,
        mapped={key: target_names(target) for key, target in targets.items() if not isinstance(target, Dropped)},
        dropped={key: target.why for key, target in targets.items() if isinstance(target, Dropped)},
        new=sorted(dfn.state_dict().keys() - carried.keys()),
        notes=[NOTE, *window_notes(config)],
    )
    return dfn, report


def window_notes(config: PreTrainedConfig) -> list[str]:
    """What there is to say of a model that reads a window."""
    window = getattr(config, "sliding_window", None)
    return [f"The original read the last {window} tokens; a DFN has no such limit."] if window else []


def check_family(config: PreTrainedConfig) -> None:
    """Raise ValueError where a DFN cannot compute what a model of this configuration does beside its attention."""
    if config.model_type not in TABLES:
        raise ValueError(
            f"model_type is {config.model_type!r}: a DFN has a place for the parts of {', '.join(TABLES)} only"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act is {config.hidden_act!r}: a DFN's gated MLP takes 'silu' only")
    width = config.num_attention_heads * config.head_dim
    if width != config.hidden_size:
        raise ValueError(
            f"num_attention_heads ({config.num_attention_heads}) times head_dim ({config.head_dim}) is {width}, not "
            f"hidden_size ({config.hidden_size}): a DFN's values are as wide as its states"
        )


def fitted(name: str, weight: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """A weight of the Llama in the shape of the DFN's weight `name`."""
    if name.endswith("value_proj.weight"):
        groups = config.num_attention_heads // config.num_key_value_heads
        return weight.unflatten(0, (-1, config.head_dim)).repeat_interleave(groups, dim=0).flatten(0, 1)
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return F.pad(weight, (0, config.hidden_size))
    return weight
