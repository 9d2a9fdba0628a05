"""Windows of tokens within documents."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch


class TokenWindows:
    """All windows of `length` tokens that lie within one document.

    Args:
        documents: the tokens of each document, integer `[tokens]`.
        length: tokens per window.

    Raises:
        ValueError: every document is shorter than `length`.
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
        """Yield endless batches of `input_ids` and `labels`, `[batch_size, length]` int64, determined by `seed`."""
        generator = np.random.default_rng(seed)
        while True:
            yield self._batch(generator.integers(len(self), size=batch_size))

    def evenly_spaced_batches(self, num_windows: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield `num_windows` evenly spaced windows in batches."""
        yield from self._batches(np.linspace(0, len(self) - 1, num_windows).astype(np.int64), batch_size)

    def consecutive_batches(self, max_windows: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield non-overlapping windows from the start of each document in batches; an incomplete last one is dropped.

        If there are more than `max_windows`, this number of evenly spaced ones is yielded.
        """
        firsts = self._windows_through - (self._sizes - self.length + 1)
        windows = np.concatenate(
            [
                np.arange(first, through, self.length)
                for first, through in zip(firsts, self._windows_through, strict=True)
            ]
        )
        number = min(max_windows, len(windows))
        yield from self._batches(windows[np.arange(number) * len(windows) // number], batch_size)

    def _batches(self, windows: np.ndarray, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        for first in range(0, len(windows), batch_size):
            yield self._batch(windows[first : first + batch_size])

    def _batch(self, windows: np.ndarray) -> dict[str, torch.Tensor]:
        document = np.searchsorted(self._windows_through, windows, side="right")
        # No window starts at the last length - 1 tokens of a document.
        starts = windows + document * (self.length - 1)
        input_ids = torch.from_numpy(self._tokens[starts[:, None] + np.arange(self.length)].astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids}
