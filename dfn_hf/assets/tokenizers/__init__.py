"""The embedded tokenizers: byte-level BPEs of the corpus and of the verse pairs, and bytes. See README.md here."""

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

EMBEDDED = ("bpe", "byte", "bpe-en-es")


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """An embedded tokenizer by its name, or any other from its folder or Hub id.

    Args:
        name_or_path: "bpe" (4,096 tokens, trained on the train split), "byte" (256 bytes and two special tokens),
            "bpe-en-es" (8,000 tokens of English and Spanish, trained on the verse pairs; it ends what it encodes by
            the end token), or what `AutoTokenizer.from_pretrained` takes.

    Raises:
        ValueError: no tokenizer can be loaded from there.
    """
    source = Path(__file__).parent / name_or_path if name_or_path in EMBEDDED else name_or_path
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer loads from {str(name_or_path)!r}: give {', '.join(map(repr, EMBEDDED))}, a folder that "
            "holds a tokenizer, or a Hub id"
        ) from error
