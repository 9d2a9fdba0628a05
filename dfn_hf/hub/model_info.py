"""Model summary: parameters, cache size, configuration and provenance."""

import math
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
    PreTrainedConfig,
)

from ..loading.errors import explain_damage
from ..loading.model_path import resolve_source
from ..loading.models import is_native, load_config
from ..loading.weight_files import read_headers, weight_files
from .cache_size import cache_bytes_per_token
from .model_card import read_provenance

OTHER_HEADS = {"DFNForFieldReconstruction": AutoModelForPreTraining, "DFNForContrastive": AutoModelForTextEncoding}
BUFFERS = ("global_memory", "grid_rotation", "grid_shift", "memory", "memory_bank")  # saved, but not parameters
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
    "num_leaves",
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
        ValueError: `source` is none of these, or one of its files is damaged.
    """
    path = resolve_source(source)
    config = load_config(source)
    parameters = num_parameters(Path(path))
    is_other_head = bool(OTHER_HEADS.keys() & set(config.architectures or ()))
    with explain_damage(f"{path}/config.json"):
        if parameters is None:
            parameters = num_parameters_of_a_new_model(config)
        state_bytes_per_token = None if is_other_head else cache_bytes_per_token(config)
    return ModelInfo(
        path=path,
        model_type=config.model_type,
        parameters=parameters,
        state_bytes_per_token=state_bytes_per_token,
        fields={field: getattr(config, field) for field in SUMMARY_FIELDS if hasattr(config, field)},
        provenance=read_provenance(model_card_path(path)),
    )


def num_parameters(folder: Path) -> int | None:
    """Return the number of parameters in the safetensors files of a folder; None if it holds no such file.

    Raises:
        ValueError: a file is damaged, or the index names a file that is missing.
    """
    files = weight_files(str(folder)) if folder.is_dir() else []
    if not files or files[0].suffix != ".safetensors":
        return None
    headers = read_headers(files)
    return sum(math.prod(part.shape) for name, part in headers.items() if name.rpartition(".")[2] not in BUFFERS)


def num_parameters_of_a_new_model(config: PreTrainedConfig) -> int:
    """Return the number of parameters of a model without storage, for Hub ids: only their configuration is read."""
    auto_class: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if is_native(config):
        auto_class = AutoModel
    for architecture in config.architectures or ():
        auto_class = OTHER_HEADS.get(architecture, auto_class)
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=False).num_parameters()


def model_card_path(path: str) -> Path | None:
    """Return the README.md of a folder or of a Hub repository, or None."""
    if Path(path).is_dir():
        card = Path(path) / "README.md"
        return card if card.is_file() else None
    try:
        return Path(hf_hub_download(path, "README.md"))
    except EntryNotFoundError:
        return None
