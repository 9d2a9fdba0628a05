"""Tokenizes texts: with errors that a user can act on, and long texts with bounded memory."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

CHARACTER_CHUNK = 1 << 20


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, **options: Any) -> BatchEncoding:
    """Call the tokenizer on texts; `options` are its arguments.

    Raises:
        ValueError: the tokenizer has no token for a part of a text, or a text contains a lone surrogate.
    """
    try:
        return tokenizer(list(texts), verbose=False, **options)
    except Exception as error:
        if type(error) not in (Exception, TypeError):  # what the library tokenizers raises
            raise
        if not all(map(is_unicode, texts)):
            raise ValueError(
                "a text contains a lone surrogate, which is not valid Unicode: give UTF-8 text"
            ) from error
        raise ValueError(f"the tokenizer cannot encode a text ({error}): use another tokenizer") from error


def is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogates, which cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest token id plus 1. `len(tokenizer)` is smaller if the ids have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a text without special tokens; see `encode_texts`.

    The text is tokenized in parts, because a tokenizer needs about 150 bytes of memory per character.
    """
    ids: list[int] = []
    for part in split_text(text):
        ids += encode_texts([part], tokenizer, add_special_tokens=False, return_attention_mask=False)["input_ids"][0]
    return ids


def split_text(text: str) -> Iterator[str]:
    """Split a text into parts of at most `CHARACTER_CHUNK` characters.

    The cut is before the white space that contains a line break, where a byte-level BPE never merges tokens.
    """
    start = 0
    while len(text) - start > CHARACTER_CHUNK:
        limit = start + CHARACTER_CHUNK
        before_break = text[start : text.rfind("\n", start, limit) + 1].rstrip()
        stop = start + len(before_break) if before_break else limit
        yield text[start:stop]
        start = stop
    yield text[start:]
