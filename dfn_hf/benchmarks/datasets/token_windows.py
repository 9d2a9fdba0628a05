"""Windows of tokens out of documents, none across two of them."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch


class TokenWindows:
    """All windows of `length` tokens that lie within one document.

    Args:
        documents: the tokens of each, 1-d integer arrays.
        length: tokens per window.

    Raises:
        ValueError: no document is that long.
    """

    unit = "tokens"

    def __init__(self, documents: Iterable[np.ndarray], length: int):
        long_enough = [document for document in documents if len(document) >= length]
        if not long_enough:
            raise ValueError(f"no document has {length} {self.unit}: choose a smaller length or longer texts")
        self.length = length
        self._tokens = np.concatenate(long_enough)
        self._sizes = np.array([len(document) for document in long_enough])
        self._windows_through = np.cumsum(self._sizes - length + 1)

    def __len__(self) -> int:
        return int(self._windows_through[-1])

    def random_batches(self, batch_size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Endless batches: `input_ids` and `labels`, `[batch_size, length]` int64, the same for the same seed."""
        generator = np.random.default_rng(seed)
        while True:
            yield self._batch(generator.integers(len(self), size=batch_size))

    def even_batches(self, num_windows: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """`num_windows` windows evenly spread over the text, in batches."""
        yield from self._batches(np.linspace(0, len(self) - 1, num_windows).astype(np.int64), batch_size)

    def consecutive_batches(self, at_most: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """The windows that follow each other from each document's start, in batches; what is left at its end is not.

        Of more windows than `at_most`, so many evenly spread over them.
        """
        firsts = self._windows_through - (self._sizes - self.length + 1)
        windows = np.concatenate(
            [
                np.arange(first, through, self.length)
                for first, through in zip(firsts, self._windows_through, strict=True)
            ]
        )
        number = min(at_most, len(windows))
        yield from self._batches(windows[np.arange(number) * len(windows) // number], batch_size)

    def _batches(self, windows: np.ndarray, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        for first in range(0, len(windows), batch_size):
            yield self._batch(windows[first : first + batch_size])

    def _batch(self, windows: np.ndarray) -> dict[str, torch.Tensor]:
        document = np.searchsorted(self._windows_through, windows, side="right")
        # The last length - 1 tokens of every earlier document start no window.
        starts = windows + document * (self.length - 1)
        input_ids = torch.from_numpy(self._tokens[starts[:, None] + np.arange(self.length)].astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids}
