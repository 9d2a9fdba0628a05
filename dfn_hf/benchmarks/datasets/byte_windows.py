"""Windows of bytes within texts; a token is a byte (ids 0 to 255)."""

from collections.abc import Iterable
from functools import cache

import numpy as np
import torch

from dfn_hf.assets.corpus import load_corpus

from .token_windows import TokenWindows

VOCAB_SIZE = 256


class ByteWindows(TokenWindows):
    """All windows of `length` bytes that lie within one text."""

    unit = "bytes"

    def __init__(self, texts: Iterable[str], length: int):
        super().__init__((np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts), length)


@cache
def corpus_windows(split: str, length: int) -> ByteWindows:
    """Return the windows of `length` bytes of one split of the bundled corpus."""
    return ByteWindows(load_corpus(split)["text"], length)


def corpus_bytes(length: int) -> torch.Tensor:
    """Return the first `length` bytes of the bundled train split, `[1, length]` int64.

    Raises:
        ValueError: the split is shorter.
    """
    text = bytearray()
    for document in load_corpus("train")["text"]:
        text += document.encode("utf-8")
        if len(text) >= length:
            return torch.frombuffer(text[:length], dtype=torch.uint8).long()[None]
    raise ValueError(f"length is {length:,}: choose at most {len(text):,}, the bytes of the bundled train split")
