"""Tokenizes long texts with bounded memory."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

CHARACTER_CHUNK = 1 << 20


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a text without special tokens.

    The text is tokenized in parts, because a tokenizer needs about 150 bytes of memory per character.
    """
    ids: list[int] = []
    for part in split_text(text):
        ids += tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
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
