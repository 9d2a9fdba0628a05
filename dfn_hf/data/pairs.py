"""Loads, splits and encodes pairs of texts for encoder-decoders.

Example:
    ```python
    pairs = encode_pairs(load_verses("train"), tokenizer, max_length=96)
    ```
"""

import os
import reprlib
from collections.abc import Iterator

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from ..assets.verses import load_verses
from .files import find_files
from .json_lines import JSON_LINES_SUFFIXES, json_records, text_of
from .tokens import encode_texts

HELD_OUT_FRACTION = 0.05
MAX_HELD_OUT = 1000

SIDES = ["source", "target"]
FEATURES = Features({side: Value("string") for side in SIDES})


def load_pairs(path: str | os.PathLike[str], *, source_field: str = "source", target_field: str = "target") -> Dataset:
    """Load pairs from a JSON Lines file, or from all JSON Lines files in a folder.

    A line holds both fields, or an object `translation` that holds them, as in the WMT datasets: with
    `source_field="en"` and `target_field="es"` that is `{"translation": {"en": …, "es": …}}`. Pairs with a blank
    source or target are skipped.

    Args:
        path: UTF-8 file or folder; files may be compressed (.gz, .bz2, .xz).
        source_field, target_field: names of the fields that hold the texts.

    Returns:
        A dataset with the string columns `source` and `target`.

    Raises:
        ValueError: `path` does not exist or holds no pair, a file cannot be read, is damaged or is not UTF-8, or a
            line is not a JSON object with these fields.
    """
    if source_field == target_field:
        raise ValueError(f"source_field and target_field are both {source_field!r}: name two fields")
    pairs = list(read_pairs(path, source_field, target_field))
    if not pairs:
        raise ValueError(
            f"{os.fspath(path)} holds no pair: give JSON Lines in which the fields {source_field!r} and "
            f"{target_field!r} are not blank"
        )
    return Dataset.from_list(pairs, features=FEATURES)


def read_pairs(path: str | os.PathLike[str], source_field: str, target_field: str) -> Iterator[dict[str, str]]:
    """Yield the pairs of all JSON Lines files at `path`."""
    for file in find_files(path, JSON_LINES_SUFFIXES, "JSON Lines"):
        for number, record in json_records(str(file)):
            fields = record.get("translation", record)
            fields = fields if isinstance(fields, dict) else record
            source, target = (
                text_of(fields, name, f"{file}, line {number}", "name the fields that hold the texts").strip()
                for name in (source_field, target_field)
            )
            if source and target:
                yield {"source": source, "target": target}


def training_pairs(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    pairs: Dataset | None = None,
    held_out: Dataset | None = None,
    *,
    seed: int = 0,
) -> tuple[Dataset, Dataset, int]:
    """Encode pairs for training and validation; see `encode_pairs`.

    Args:
        tokenizer: tokenizer of the model to train.
        max_length: maximum number of tokens of a source or target.
        pairs: pairs to train on; None means the bundled verses and their validation split.
        held_out: pairs to validate on; None holds out a random 5 % of `pairs`, at most 1,000.
        seed: seed of the random split.

    Returns:
        Training pairs, validation pairs, and the number of pairs skipped because they exceed `max_length`.

    Raises:
        ValueError: there is only one pair, or every pair exceeds `max_length`.
    """
    if pairs is None:
        pairs = load_verses("train").select_columns(SIDES)
        held_out = load_verses("validation").select_columns(SIDES) if held_out is None else held_out
    if held_out is None:
        if len(pairs) < 2:
            raise ValueError(
                f"there are {len(pairs)} pairs but a train and a validation split need at least 2: give more"
            )
        split = pairs.train_test_split(min(MAX_HELD_OUT, max(1, round(HELD_OUT_FRACTION * len(pairs)))), seed=seed)
        pairs, held_out = split["train"], split["test"]
    train, validation = (encode_pairs(given, tokenizer, max_length) for given in (pairs, held_out))
    return train, validation, len(pairs) + len(held_out) - len(train) - len(validation)


def encode_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenize pairs and skip those that exceed `max_length`; truncated sentences would not be translations.

    Args:
        pairs: dataset with the string columns `source` and `target`.
        tokenizer: a tokenizer that appends its end token to every text.
        max_length: maximum number of tokens of a source or target.

    Returns:
        A dataset with the columns `input_ids` (source) and `labels` (target).

    Raises:
        ValueError: a text has no tokens or cannot be encoded, or every pair exceeds `max_length`.
    """

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        sources, targets = (encode_texts(batch[side], tokenizer)["input_ids"] for side in SIDES)
        for side, encoded in zip(SIDES, (sources, targets), strict=True):
            for text, ids in zip(batch[side], encoded, strict=True):
                if not ids:
                    raise ValueError(f"the {side} {reprlib.repr(text)} has no tokens: remove the pair")
        return {"input_ids": sources, "labels": targets}

    encoded = pairs.map(encode, batched=True, remove_columns=pairs.column_names)
    kept = encoded.filter(lambda pair: max(len(pair["input_ids"]), len(pair["labels"])) <= max_length)
    if not len(kept):
        raise ValueError(f"every pair exceeds max_length {max_length}: increase it (--max-length)")
    return kept
