"""Loads models and tokenizers from a folder, a bundled checkpoint or the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..registration import register_families
from .model_path import resolve_source

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

NO_LANGUAGE_MODELS = {
    "DFNForFieldReconstruction": "a model of fields: use `dfn-hf plot MODEL picture.png --field FILE`, or load it "
    "with its class",
    "DFNForContrastive": "an embedding model: load it with its class",
}


def load_config(source: str) -> PreTrainedConfig:
    """Load the configuration of the model at `source`; see `resolve_source`."""
    path = resolve_source(source)
    register_families()
    with explain_hub_errors(path):
        return AutoConfig.from_pretrained(path)


def load_causal_lm(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the causal language model and the tokenizer at `source`; see `resolve_source`.

    The model is in evaluation mode, and on the GPU if there is one.
    """
    return load_model(source, AutoModelForCausalLM)


def load_seq2seq_lm(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the encoder-decoder and the tokenizer at `source`, as `load_causal_lm` does."""
    return load_model(source, AutoModelForSeq2SeqLM)


def load_model(source: str, auto_class: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model through one of transformers' Auto classes, and its tokenizer; see `resolve_source`."""
    path = resolve_source(source)
    check_kind(source, encoder_decoder=auto_class is AutoModelForSeq2SeqLM)
    check_tokenizer_files(path, source)
    with explain_hub_errors(path):
        model, tokenizer = auto_class.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    if auto_class is AutoModelForSeq2SeqLM and tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {source} has no padding token, which text pairs need: set tokenizer.pad_token and save "
            "it with tokenizer.save_pretrained"
        )
    if torch.cuda.is_available():
        model.cuda()
    return model, tokenizer


def check_kind(source: str, *, encoder_decoder: bool) -> None:
    """Raise ValueError unless the model at `source` is a causal language model or, if wanted, an encoder-decoder."""
    config = load_config(source)
    if is_native(config):
        raise ValueError(
            f"{source} computes the function of an original checkpoint and is not a language model: load it with "
            "transformers.AutoModel, or convert the original without --native"
        )
    for architecture, remedy in NO_LANGUAGE_MODELS.items():
        if architecture in (config.architectures or ()):
            raise ValueError(f"{source} is a {architecture}, {remedy}")
    if bool(config.is_encoder_decoder) == encoder_decoder:
        return
    if encoder_decoder:
        raise ValueError(
            f"{source} is a {config.model_type}, a causal language model, and this needs an encoder-decoder: use "
            "dfn-hf generate, evaluate or train lm"
        )
    raise ValueError(
        f"{source} is a {config.model_type}, an encoder-decoder, and this needs a causal language model: use "
        "dfn-hf translate or train seq2seq"
    )


def is_native(config: PreTrainedConfig) -> bool:
    """Whether the model was written by `dfn-hf convert --native`."""
    return config.model_type.endswith("_native")


def check_tokenizer_files(path: str, source: str) -> None:
    """Raise ValueError if `path` is a folder without a tokenizer; a Hub id is not checked."""
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{source} holds no tokenizer: save one beside the model (tokenizer.save_pretrained)")


@contextmanager
def explain_hub_errors(path: str) -> Iterator[None]:
    """Raise an OSError for a path that is no local folder as a ValueError that names both places that were tried."""
    try:
        yield
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise ValueError(f"there is no folder {path}, and the Hub does not provide it: {error}") from error
