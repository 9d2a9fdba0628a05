"""Pairs of texts: loading, splitting and encoding for encoder-decoders.

Example:
    ```python
    pairs = encode_pairs(load_verses("train"), tokenizer, max_length=96)
    ```
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from ..assets.verses import load_verses
from .text import json_records, text_files

HELD_OUT_FRACTION = 0.05
MAX_HELD_OUT = 1000

SIDES = ["source", "target"]
FEATURES = Features({side: Value("string") for side in SIDES})


def load_pairs(path: str | os.PathLike[str], *, source_field: str = "source", target_field: str = "target") -> Dataset:
    """The pairs of a file of JSON Lines, or of all those below a folder.

    A line holds both fields, or a field `translation` that holds them, as WMT's do: with `source_field="en"` and
    `target_field="es"` that is `{"translation": {"en": …, "es": …}}`. Pairs of which a side is blank are left out.

    Args:
        path: file or folder, UTF-8; files may be compressed (.gz, .bz2, .xz).
        source_field, target_field: fields that hold the texts.

    Returns:
        A dataset with the string columns `source` and `target`.

    Raises:
        ValueError: nothing is there, it holds no pair, or a line is not JSON with these fields.
    """
    if source_field == target_field:
        raise ValueError(f"source and target are both {source_field!r}: name two fields")
    pairs = list(read_pairs(Path(path), source_field, target_field))
    if not pairs:
        raise ValueError(
            f"{os.fspath(path)} holds no pair of two texts: give JSON Lines with {source_field!r} and "
            f"{target_field!r}, neither of them blank"
        )
    return Dataset.from_list(pairs, features=FEATURES)


def read_pairs(path: Path, source_field: str, target_field: str) -> Iterator[dict[str, str]]:
    """The pairs of all JSON Lines files at `path`, one after another."""
    for file in text_files(path):
        for number, record in json_records(file.path):
            fields = record.get("translation", record)
            fields = fields if isinstance(fields, dict) else record
            source, target = (
                text_of(fields, name, f"{file.path}, line {number}") for name in (source_field, target_field)
            )
            if source.strip() and target.strip():
                yield {"source": source.strip(), "target": target.strip()}


def text_of(fields: dict[str, Any], name: str, place: str) -> str:
    """The text in a field."""
    if name not in fields:
        raise ValueError(f"{place} has no field {name!r}, only {', '.join(fields)}: name those that hold the texts")
    if not isinstance(fields[name], str):
        raise ValueError(f"{place}: {name!r} is {fields[name]!r}, not a text")
    return fields[name]


def training_pairs(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    pairs: Dataset | None = None,
    held_out: Dataset | None = None,
    *,
    seed: int = 0,
) -> tuple[Dataset, Dataset, int]:
    """Encoded pairs to train and to validate on, and how many were too long; see `encode_pairs`.

    Args:
        tokenizer: of the model to train.
        max_length: tokens of a side, at most.
        pairs: to train on; None for the embedded verses, which have a validation split of their own.
        held_out: to validate on; None for `HELD_OUT_FRACTION` of `pairs`, at most `MAX_HELD_OUT`, drawn at random.
        seed: of the drawing.

    Raises:
        ValueError: there is one pair alone, or every pair is longer than `max_length`.
    """
    if pairs is None:
        pairs = load_verses("train").select_columns(SIDES)
        held_out = load_verses("validation").select_columns(SIDES) if held_out is None else held_out
    if held_out is None:
        if len(pairs) < 2:
            raise ValueError("one pair is too few to train and to validate on: give more")
        split = pairs.train_test_split(min(MAX_HELD_OUT, max(1, round(HELD_OUT_FRACTION * len(pairs)))), seed=seed)
        pairs, held_out = split["train"], split["test"]
    train, validation = (encode_pairs(given, tokenizer, max_length) for given in (pairs, held_out))
    return train, validation, len(pairs) + len(held_out) - len(train) - len(validation)


def encode_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokens of each pair: `input_ids` of the source and `labels` of the target, each at most `max_length`.

    Longer pairs are left out, not cut: half a sentence is no translation.

    Args:
        pairs: with the string columns `source` and `target`.
        tokenizer: one that ends what it encodes by its end token.

    Raises:
        ValueError: every pair is longer.
    """

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        sources, targets = (tokenizer(batch[side])["input_ids"] for side in ("source", "target"))
        return {"input_ids": sources, "labels": targets}

    encoded = pairs.map(encode, batched=True, remove_columns=pairs.column_names)
    kept = encoded.filter(lambda pair: max(len(pair["input_ids"]), len(pair["labels"])) <= max_length)
    if not len(kept):
        raise ValueError(f"every pair is longer than {max_length} tokens a side: allow more (--max-length)")
    return kept
