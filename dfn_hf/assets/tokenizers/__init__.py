"""Loads the bundled tokenizers: two byte-level BPEs and a byte tokenizer. README.md describes them."""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...loading.tokenizer_files import load_checked_tokenizer
from ...messages import message_of

BUNDLED = ("bpe", "byte", "bpe-en-es")


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load a bundled tokenizer by name, or any other by folder or Hub id.

    Args:
        name_or_path: "bpe" (4,096 tokens, trained on the corpus), "byte" (256 bytes and two special tokens), or
            "bpe-en-es" (8,000 tokens, trained on the English and Spanish verses; appends its end token to every text).
            Otherwise an argument of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: no tokenizer loads from `name_or_path`.
    """
    source = Path(__file__).parent / name_or_path if name_or_path in BUNDLED else name_or_path
    try:
        return load_checked_tokenizer(str(source))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer loads from {str(name_or_path)!r}: give {', '.join(map(repr, BUNDLED))}, a folder that "
            f"holds a tokenizer, or a Hub id ({message_of(error)})"
        ) from error
