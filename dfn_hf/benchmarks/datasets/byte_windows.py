"""Windows of bytes within texts; a token is a byte (ids 0 to 255)."""

from collections.abc import Iterable

import numpy as np

from .token_windows import TokenWindows

VOCAB_SIZE = 256


class ByteWindows(TokenWindows):
    """All windows of `length` bytes that lie within one text."""

    unit = "bytes"

    def __init__(self, texts: Iterable[str], length: int):
        super().__init__((np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts), length)
