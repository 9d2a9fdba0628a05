"""Models by folder, by the name of an embedded checkpoint, or by Hub id."""

import re
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

from .bundled import checkpoint_path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


NO_LANGUAGE_MODELS = {
    "DFNForFieldReconstruction": "see `dfn-hf show MODEL picture.png --field FILE`, or load it with its class",
    "DFNForContrastive": "it embeds; load it with its class",
}


def resolve_source(source: str) -> str:
    """What `from_pretrained` takes for `source`.

    Args:
        source: a folder with a `config.json`, an embedded checkpoint's name, or a Hub id of the form `owner/name`,
            tried in this order.

    Raises:
        ValueError: it is none of the three.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{source} holds no config.json: give the folder of a saved model")
        return str(folder)
    try:
        return str(checkpoint_path(source))
    except ValueError as error:
        if HUB_ID.fullmatch(source):
            return source
        raise ValueError(f"{source!r} is no folder and no Hub id (owner/name), and {error}") from None


def load_config(source: str) -> PreTrainedConfig:
    """The configuration of the model at `source`; see `resolve_source`."""
    path = resolve_source(source)
    with clear_hub_errors(path):
        return AutoConfig.from_pretrained(path)


def load_causal_lm(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and the tokenizer at `source`; see `resolve_source`.

    The model is in evaluation mode, and on the GPU where there is one.
    """
    return load_model(source, AutoModelForCausalLM)


def load_seq2seq_lm(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder-decoder and the tokenizer at `source`, as `load_causal_lm` gives them."""
    return load_model(source, AutoModelForSeq2SeqLM)


def load_model(source: str, auto_class: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of one of transformers' Auto classes and the tokenizer at `source`; see `resolve_source`."""
    path = resolve_source(source)
    check_kind(source, encoder_decoder=auto_class is AutoModelForSeq2SeqLM)
    check_tokenizer_files(path, source)
    with clear_hub_errors(path):
        model, tokenizer = auto_class.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    if auto_class is AutoModelForSeq2SeqLM and tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {source} has no padding token, which pairs of texts need: set one "
            "(tokenizer.pad_token = …, then tokenizer.save_pretrained)"
        )
    if torch.cuda.is_available():
        model.cuda()
    return model, tokenizer


def check_kind(source: str, *, encoder_decoder: bool) -> None:
    """Raise ValueError where a model of the other kind is wanted than the one at `source`."""
    config = load_config(source)
    if is_native(config):
        raise ValueError(
            f"{source} computes the function of a converted original and is no language model: load it with "
            "transformers.AutoModel, or convert the original without --native"
        )
    for architecture, remedy in NO_LANGUAGE_MODELS.items():
        if architecture in (config.architectures or ()):
            raise ValueError(f"{source} is a {architecture} and writes no text: {remedy}")
    if bool(config.is_encoder_decoder) == encoder_decoder:
        return
    if encoder_decoder:
        raise ValueError(
            f"{source} is a {config.model_type}, which continues text (dfn-hf generate, evaluate): an encoder-decoder "
            "is wanted here"
        )
    raise ValueError(
        f"{source} is a {config.model_type}, an encoder-decoder (dfn-hf translate): a model that continues text is "
        "wanted here"
    )


def is_native(config: PreTrainedConfig) -> bool:
    """Whether it is of a model that `dfn-hf convert --native` writes."""
    return config.model_type.endswith("_native")


def check_tokenizer_files(path: str, source: str) -> None:
    """Raise ValueError where a folder holds no tokenizer; what is on the Hub is not looked at."""
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{source} holds no tokenizer: save one beside the model (tokenizer.save_pretrained)")


@contextmanager
def clear_hub_errors(path: str) -> Iterator[None]:
    """Say of what is neither a folder here nor loads from the Hub that both were tried."""
    try:
        yield
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise ValueError(f"there is no folder {path}, and the Hub does not give it: {error}") from error
