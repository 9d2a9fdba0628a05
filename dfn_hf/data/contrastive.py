"""Pairs of views as rows, and batches of them, for `DFNForContrastive`.

rows = text_pairs(load_verses("train"), tokenizer)
batch = ContrastiveCollator(tokenizer.pad_token_id)(rows[:32])

A view is a text (`input_ids`) or a field (`coordinates` and `values`); the second view of a row has the same names
with the prefix `pair_`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from .pairs import SIDES

PAIR = "pair_"
SORTED_BATCHES = 20

Row = dict[str, Any]


def text_view(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None) -> list[Row]:
    """The tokens of each text as the tokenizer gives them, cut after `max_length`: rows of `input_ids`.

    Raises:
        ValueError: a text has no token.
    """
    encoded = tokenizer(list(texts), truncation=max_length is not None, max_length=max_length)["input_ids"]
    for number, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"text {number} is {texts[number]!r}, which has no token: leave it out")
    return [{"input_ids": ids} for ids in encoded]


def pair_views(first: Sequence[Row], second: Sequence[Row]) -> list[Row]:
    """Rows of two views each.

    Raises:
        ValueError: there are more of one than of the other.
    """
    if len(first) != len(second):
        raise ValueError(f"there are {len(first)} first views and {len(second)} second: each needs its pair")
    return [
        {**one, **{PAIR + name: value for name, value in other.items()}}
        for one, other in zip(first, second, strict=True)
    ]


def text_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None) -> list[Row]:
    """Rows of the columns `source` and `target`, such as `load_verses` and `translation.load_pairs` give."""
    source, target = (text_view(list(pairs[side]), tokenizer, max_length=max_length) for side in SIDES)
    return pair_views(source, target)


class ContrastiveCollator:
    """Rows of one or two views → what `DFNForContrastive` takes, each view padded on the right.

    Texts come to `input_ids` and `attention_mask`, int64 `[batch, length]`; fields to `coordinates` and `values`,
    float32 `[batch, samples, …]`, and `mask`, bool `[batch, samples]`.

    Args:
        pad_token_id: stands at padded places of texts; no model reads it.
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
    """An order in which every batch holds each second view once: two alike would be each other's negatives.

    Batches are of rows about as long as each other and come in random order. Rows that would complete no batch are
    left out of an epoch; each epoch draws anew.

    Args:
        rows: of two views.
        batch_size: rows of a batch.
        seed: of the order.

    Raises:
        ValueError: there are fewer than `batch_size` different second views.
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
                f"a batch of {batch_size} needs as many different second views, and there are {distinct}: lower "
                "batch_size (--batch-size), or give more pairs"
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
        """Batches as they fill up; a row goes into the first that lacks its second view."""
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
    """What tells one second view from another."""
    if PAIR + "input_ids" in row:
        return tuple(row[PAIR + "input_ids"])
    return torch.as_tensor(row[PAIR + "values"]).numpy().tobytes()
