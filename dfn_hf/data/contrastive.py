"""Rows of paired views, their collator and their sampler, for `DFNForContrastive`.

A view is a text (`input_ids`) or a field (`coordinates` and `values`). The keys of a row's second view have the prefix
`pair_`.

Example:
    ```python
    rows = text_pairs(load_verses("train"), tokenizer)
    batch = ContrastiveCollator(tokenizer.pad_token_id)(rows[:32])
    ```
"""

import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from .pairs import SIDES
from .tokens import encode_texts

PAIR = "pair_"
SORTED_BATCHES = 20

Row = dict[str, Any]


def text_view(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None) -> list[Row]:
    """Tokenize texts, truncate them to `max_length` tokens and return one row with `input_ids` per text.

    Raises:
        ValueError: a text has no tokens, or see `encode_texts`.
    """
    options = {"truncation": max_length is not None, "max_length": max_length}
    encoded = encode_texts(texts, tokenizer, **options)["input_ids"]
    for number, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"text {number} ({reprlib.repr(texts[number])}) has no tokens: remove it from the data")
    return [{"input_ids": ids} for ids in encoded]


def pair_views(first: Sequence[Row], second: Sequence[Row]) -> list[Row]:
    """Join first and second views to rows of two views.

    Raises:
        ValueError: `first` and `second` differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} views and second has {len(second)}: give equally many")
    return [
        {**one, **{PAIR + name: value for name, value in other.items()}}
        for one, other in zip(first, second, strict=True)
    ]


def text_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None) -> list[Row]:
    """Rows of two text views from the columns `source` and `target`, as `load_verses` and `load_pairs` return them."""
    source, target = (text_view(list(pairs[side]), tokenizer, max_length=max_length) for side in SIDES)
    return pair_views(source, target)


class ContrastiveCollator:
    """Collates rows of one or two views to the arguments of `DFNForContrastive`, padded on the right.

    A text becomes `input_ids` and `attention_mask`, int64 `[batch, length]`. A field becomes `coordinates` and
    `values`, float32 `[batch, samples, …]`, and `mask`, bool `[batch, samples]`.

    Args:
        pad_token_id: id at padded positions of texts; the mask hides them from the model. None means 0.
    """

    def __init__(self, pad_token_id: int | None = None) -> None:
        self.pad_token_id = pad_token_id or 0

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        batch = {}
        for prefix in ("", PAIR):
            for name, mask in (("input_ids", "attention_mask"), ("coordinates", "mask"), ("values", "mask")):
                if prefix + name in rows[0]:
                    padded, real = self._pad([torch.as_tensor(row[prefix + name]) for row in rows])
                    batch[prefix + name] = padded
                    batch[prefix + mask] = real.long() if name == "input_ids" else real
        return batch

    def _pad(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(len(tensor) for tensor in tensors)
        is_text = not tensors[0].is_floating_point()
        shape = (len(tensors), length, *tensors[0].shape[1:])
        padded = torch.full(shape, self.pad_token_id if is_text else 0, dtype=torch.long if is_text else torch.float32)
        real = torch.zeros(len(tensors), length, dtype=torch.bool)
        for row, tensor in enumerate(tensors):
            padded[row, : len(tensor)] = tensor
            real[row, : len(tensor)] = True
        return padded, real


class DistinctPairsSampler(Sampler[int]):
    """Samples batches without duplicate second views, because duplicates would be negatives of each other.

    Rows of similar length share a batch, and batches come in random order. An epoch omits the rows that do not fill
    a batch; each epoch uses a new order.

    Args:
        rows: rows of two views.
        batch_size: rows per batch.
        seed: seed of the order.

    Raises:
        ValueError: there are fewer than `batch_size` distinct second views.
    """

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int = 0) -> None:
        self.keys = [second_view_key(row) for row in rows]
        self.lengths = [len(row["input_ids" if "input_ids" in row else "coordinates"]) for row in rows]
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        distinct = len(set(self.keys))
        if distinct < batch_size:
            raise ValueError(
                f"batch_size is {batch_size} but there are only {distinct} distinct second views: lower batch_size "
                "(--batch-size), or give more pairs"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        order = generator.permutation(len(self.keys))
        span = SORTED_BATCHES * self.batch_size
        spans = [
            sorted(order[start : start + span], key=self.lengths.__getitem__) for start in range(0, len(order), span)
        ]
        batches = list(self._batches(int(number) for numbers in spans for number in numbers))
        for place in generator.permutation(len(batches)):
            yield from batches[place]

    def _batches(self, numbers: Iterable[int]) -> Iterator[list[int]]:
        """Yield each batch when it is full; a row joins the first batch that does not contain its second view."""
        started: list[dict[Any, int]] = []
        for number in numbers:
            key = self.keys[number]
            batch = next((batch for batch in started if key not in batch), None)
            if batch is None:
                batch = {}
                started.append(batch)
            batch[key] = number
            if len(batch) == self.batch_size:
                started.remove(batch)
                yield list(batch.values())


def second_view_key(row: Row) -> Any:
    """Hashable key of a row's second view, equal for equal views."""
    if PAIR + "input_ids" in row:
        return tuple(row[PAIR + "input_ids"])
    return torch.as_tensor(row[PAIR + "values"]).numpy().tobytes()
