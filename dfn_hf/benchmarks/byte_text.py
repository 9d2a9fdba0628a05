"""Windows of bytes out of documents, none across two of them."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

VOCAB_SIZE = 256


class ByteWindows:
    """All windows of `length` bytes that lie within one document; a token is a byte (ids 0 to 255).

    Args:
        texts: the documents.
        length: bytes per window.

    Raises:
        ValueError: no document is that long.
    """

    def __init__(self, texts: Iterable[str], length: int):
        documents = [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]
        documents = [document for document in documents if len(document) >= length]
        if not documents:
            raise ValueError(f"no document has {length} bytes: choose a smaller length or longer texts")
        self.length = length
        self._bytes = np.concatenate(documents)
        sizes = np.array([len(document) for document in documents])
        self._windows_through = np.cumsum(sizes - length + 1)

    def __len__(self) -> int:
        return int(self._windows_through[-1])

    def random_batches(self, batch_size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Endless batches: `input_ids` and `labels`, `[batch_size, length]` int64, the same for the same seed."""
        generator = np.random.default_rng(seed)
        while True:
            yield self._batch(generator.integers(len(self), size=batch_size))

    def even_batches(self, num_windows: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """`num_windows` windows evenly spread over the text, in batches."""
        windows = np.linspace(0, len(self) - 1, num_windows).astype(np.int64)
        for first in range(0, num_windows, batch_size):
            yield self._batch(windows[first : first + batch_size])

    def _batch(self, windows: np.ndarray) -> dict[str, torch.Tensor]:
        document = np.searchsorted(self._windows_through, windows, side="right")
        # The last length - 1 bytes of every earlier document start no window.
        starts = windows + document * (self.length - 1)
        input_ids = torch.from_numpy(self._bytes[starts[:, None] + np.arange(self.length)].astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids}
