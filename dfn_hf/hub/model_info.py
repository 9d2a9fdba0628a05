"""Model summary: parameters, cache size, configuration and provenance."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    Cache,
    PreTrainedConfig,
)

from ..modeling.modules.cache import CACHE_NAME
from .loading import is_native, load_config
from .model_card import read_provenance
from .model_path import resolve_source

OTHER_HEADS = {"DFNForFieldReconstruction": AutoModelForPreTraining, "DFNForContrastive": AutoModelForTextEncoding}
# Families in which every layer caches the same state, so one layer gives the size of all.
UNIFORM_FAMILIES = ("dfn", "flownetwork", "llama")
SUMMARY_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_decoder_layers",
    "num_attention_heads",
    "intermediate_size",
    "position_dim",
    "num_neighbors",
    "local_window",
    "num_tables",
    "candidates_per_table",
    "search_implementation",
    "entity_sampling",
    "entity_rate",
    "is_causal",
    "num_entities",
    "coordinate_dim",
    "value_dim",
    "projection_dim",
    "num_sample_layers",
    "memory_slots",
    "block_type",
    "num_patterns",
    "base_sparsity",
    "flow_window",
    "memory_size",
    "attention_window",
    "frame_length",
    "decoder_frame_length",
    "min_compression_ratio",
    "num_experts",
    "num_experts_per_tok",
    "lstm_hidden_size",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class ModelInfo:
    """Summary of a model.

    Attributes:
        path: folder or Hub id that it is loaded from.
        model_type: model family.
        parameters: number of parameters; tied ones count once.
        state_bytes_per_token: growth of the cache per token of a row, in bytes, in the dtype of the saved weights;
            None if the family has no uniform layers.
        fields: the main fields of the configuration.
        provenance: the provenance section of the model card; None if there is none.
    """

    path: str
    model_type: str
    parameters: int
    state_bytes_per_token: int | None
    fields: dict[str, object]
    provenance: str | None


def describe_model(source: str) -> ModelInfo:
    """Summarise a model without loading its weights.

    Args:
        source: a folder, the name of a bundled checkpoint or a Hub id.

    Raises:
        ValueError: `source` is none of these.
    """
    path = resolve_source(source)
    config = load_config(source)
    auto_class: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if is_native(config):
        auto_class = AutoModel
    for architecture in config.architectures or ():
        auto_class = OTHER_HEADS.get(architecture, auto_class)
    with torch.device("meta"):  # saved files hold buffers too, so their headers do not give the number of parameters
        parameters = auto_class.from_config(config).num_parameters()
    return ModelInfo(
        path=path,
        model_type=config.model_type,
        parameters=parameters,
        state_bytes_per_token=state_bytes_per_token(config) if is_uniform(config) else None,
        fields={field: getattr(config, field) for field in SUMMARY_FIELDS if hasattr(config, field)},
        provenance=read_provenance(model_card_path(path)),
    )


def is_uniform(config: PreTrainedConfig) -> bool:
    """Whether every layer caches the same number of bytes per token."""
    if OTHER_HEADS.keys() & set(config.architectures or ()):
        return False
    return config.model_type in UNIFORM_FAMILIES and getattr(config, "entity_sampling", "token") == "token"


def model_card_path(path: str) -> Path | None:
    """Return the README.md of a folder or of a Hub repository, or None."""
    if Path(path).is_dir():
        card = Path(path) / "README.md"
        return card if card.is_file() else None
    try:
        return Path(hf_hub_download(path, "README.md"))
    except EntryNotFoundError:
        return None


@torch.no_grad()
def state_bytes_per_token(config: PreTrainedConfig) -> int:
    """Measure the growth of the cache per token of a row, in bytes, on a single layer with random weights."""
    config = copy.deepcopy(config)
    num_layers, config.num_hidden_layers, config.vocab_size = config.num_hidden_layers, 1, 8
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config).eval()
    chunk = getattr(config, "memory_chunk", 1)
    short = chunk * max(1, 256 // chunk)
    long = 2 * short
    sizes = [
        cache_bytes(model(torch.zeros(1, length, dtype=torch.long), use_cache=True)[CACHE_NAME])
        for length in (short, long)
    ]
    return num_layers * (sizes[1] - sizes[0]) // (long - short)


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all tensors of a cache: the states of this package's layers, or keys and values."""
    total = 0
    for layer in cache.layers:
        states = getattr(layer, "states", None)
        names = ("keys", "values")
        tensors = [getattr(layer, name) for name in names] if states is None else [s.data for s in states.values()]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total
