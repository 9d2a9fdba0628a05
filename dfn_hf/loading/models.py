"""Loads models and tokenizers from a folder, a bundled checkpoint or the Hub."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .config_check import check_generation_config, load_checked_config
from .errors import explain_damage, explain_hub_errors
from .model_files import REMEDY, find_file, read_json_object
from .model_path import resolve_source
from .tokenizer_files import check_tokenizer_files, load_checked_tokenizer
from .weights_check import check_loading_info, check_weights

# The Auto class of a model, by the end of the name of its class.
HEADS = {
    "ForCausalLM": AutoModelForCausalLM,
    "LMHeadModel": AutoModelForCausalLM,
    "ForSeq2SeqLM": AutoModelForSeq2SeqLM,
    "ForConditionalGeneration": AutoModelForSeq2SeqLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForFieldReconstruction": AutoModelForPreTraining,
    "ForContrastive": AutoModelForTextEncoding,
    "Model": AutoModel,
}
NOT_LANGUAGE_MODELS = {
    "DFNForFieldReconstruction": "a model of fields: use `dfn-hf plot MODEL picture.png --field FILE`, or load it "
    "with its class",
    "DFNForContrastive": "an embedding model: load it with its class",
}


def load_config(source: str) -> PreTrainedConfig:
    """Load the configuration of the model at `source`; see `resolve_source`.

    Raises:
        ValueError: `source` is not a model, or its config.json is damaged.
    """
    return load_checked_config(resolve_source(source))


def load_causal_lm(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the causal language model and the tokenizer at `source`; see `resolve_source`.

    The model is in evaluation mode, and on the GPU if there is one.

    Raises:
        ValueError: see `load_model`.
    """
    return load_model(source, AutoModelForCausalLM)


def load_seq2seq_lm(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the encoder-decoder and the tokenizer at `source`, as `load_causal_lm` does."""
    return load_model(source, AutoModelForSeq2SeqLM)


def load_model(source: str, auto_class: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model through one of transformers' Auto classes, and its tokenizer; see `resolve_source`.

    Raises:
        ValueError: a file is damaged, the weights do not fit the configuration, or the model is of another kind.
    """
    path = resolve_source(source)
    check_kind(source, encoder_decoder=auto_class is AutoModelForSeq2SeqLM)
    check_tokenizer_files(path, source)
    tokenizer = load_checked_tokenizer(path)
    model = load_weights(path, auto_class)
    if auto_class is AutoModelForSeq2SeqLM and tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {source} has no padding token, which text pairs need: set tokenizer.pad_token and save "
            "it with tokenizer.save_pretrained"
        )
    if torch.cuda.is_available():
        torch.nn.Module.cuda(model)
    return model, tokenizer


def load_weights(path: str, model_class: Any) -> PreTrainedModel:
    """Load the model of a folder or a Hub id, with all its weights.

    Args:
        path: a folder or a Hub id. If it holds an adapter, the adapter is added to the model that it names.
        model_class: one of transformers' Auto classes, or a model class.

    Raises:
        ValueError: a file is damaged, the folder holds no weights, or the weights do not fit the configuration.
    """
    adapter = find_file(path, "adapter_config.json", optional=True)
    if adapter is not None:
        return load_adapter(path, adapter, model_class)
    config = load_checked_config(path)
    check_generation_config(path)
    with explain_hub_errors(path):
        check_weights(path, config, model_class)
        with explain_damage(f"the model in {path}"):
            model, found = model_class.from_pretrained(
                path, config=config, trust_remote_code=False, output_loading_info=True
            )
    check_loading_info(found, path)
    return model  # type: ignore[no-any-return]


def load_adapter(path: str, file: Path, model_class: Any) -> PreTrainedModel:
    """Load the model that adapter_config.json names, and add the adapter.

    Raises:
        ValueError: a file of the adapter or of its model is damaged.
    """
    base = read_json_object(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or base == path:
        raise ValueError(f"{file} names no model to adapt (base_model_name_or_path): {REMEDY}")
    model = load_weights(resolve_source(base), model_class)
    with explain_damage(f"the adapter in {path} (adapter_config.json or its weights)"):
        model.load_adapter(path)
    return model


def check_causal_lm(source: str) -> None:
    """Check the files of the causal language model at `source` without allocating its weights.

    Raises:
        ValueError: as `load_causal_lm`.
    """
    path = resolve_source(source)
    check_kind(source, encoder_decoder=False)
    check_tokenizer_files(path, source)
    load_checked_tokenizer(path)
    check_generation_config(path)
    with explain_hub_errors(path):
        check_weights(path, load_checked_config(path), AutoModelForCausalLM)


def check_saved_model(source: str) -> None:
    """Check config.json and the weights of a model of any kind without allocating the weights.

    Raises:
        ValueError: a file is damaged, or the weights do not fit the configuration.
    """
    path = resolve_source(source)
    config = load_checked_config(path)
    check_generation_config(path)
    name = (config.architectures or [""])[0]
    auto_class: Any = next((head for suffix, head in HEADS.items() if name.endswith(suffix)), None)
    if auto_class is not None and type(config) in auto_class._model_mapping:
        check_weights(path, config, auto_class)


def check_kind(source: str, *, encoder_decoder: bool) -> None:
    """Raise ValueError unless the model at `source` is a causal language model or, if wanted, an encoder-decoder."""
    config = load_config(source)
    if is_native(config):
        raise ValueError(
            f"{source} computes the function of an original checkpoint and is not a language model: load it with "
            "transformers.AutoModel, or convert the original without --native"
        )
    for architecture, remedy in NOT_LANGUAGE_MODELS.items():
        if architecture in (config.architectures or ()):
            raise ValueError(f"{source} is a {architecture}, {remedy}")
    if bool(config.is_encoder_decoder) == encoder_decoder:
        return
    if encoder_decoder:
        raise ValueError(
            f"{source} is a {config.model_type}, a causal language model, but an encoder-decoder is needed: use "
            "dfn-hf generate, evaluate or train lm"
        )
    raise ValueError(
        f"{source} is a {config.model_type}, an encoder-decoder, but a causal language model is needed: use "
        "dfn-hf translate or train seq2seq"
    )


def is_native(config: PreTrainedConfig) -> bool:
    """Whether the model was written by `dfn-hf convert --native`."""
    return config.model_type.endswith("_native")
