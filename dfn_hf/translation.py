"""From pairs of texts to an encoder-decoder that turns one into the other, and how well it does.

pairs = encode_pairs(load_verses("train"), tokenizer, max_length=96)
translate(model, tokenizer, ["In the beginning"])
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, Features, Value
from sacrebleu.metrics import BLEU, CHRF
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .text_files import json_records, text_files
from .verses import load_verses

HELD_OUT_SHARE = 0.05
MOST_HELD_OUT = 1000

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
        held_out: to validate on; None for `HELD_OUT_SHARE` of `pairs`, at most `MOST_HELD_OUT`, drawn at random.
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
        split = pairs.train_test_split(min(MOST_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(pairs)))), seed=seed)
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
        raise ValueError(f"every pair is longer than {max_length} tokens a side: allow more (--block-size)")
    return kept


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[str]:
    """What an encoder-decoder makes of each text.

    Args:
        model: its device is kept; it is put into evaluation mode.
        tokenizer: the model's.
        num_beams: 1 takes the most probable token each time.
        max_new_tokens: tokens of a target, at most.
        batch_size: texts at a time; those of like length stand together.

    Raises:
        ValueError: a text is blank.
    """
    if any(not text.strip() for text in texts):
        raise ValueError("a text is blank: there is nothing to translate")
    model.eval()
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    outputs = [""] * len(texts)
    for start in range(0, len(texts), batch_size):
        numbers = order[start : start + batch_size]
        batch = tokenizer([texts[number] for number in numbers], padding=True, return_tensors="pt").to(model.device)
        with torch.no_grad():
            generated = cast(Any, model).generate(
                **batch, num_beams=num_beams, do_sample=False, max_new_tokens=max_new_tokens
            )
        for number, text in zip(numbers, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True):
            outputs[number] = text
    return outputs


def shuffle_sources(sources: Sequence[str]) -> list[str]:
    """Each source in the place of another: half a turn, so that none keeps its own and books change."""
    half = len(sources) // 2
    return [*sources[half:], *sources[:half]]


@dataclass(frozen=True)
class TranslationScores:
    """Of a set of translations against one reference each, both from 0 to 100 (sacrebleu's defaults).

    Attributes:
        chrf: character n-gram F-score.
        bleu: of words, 13a tokenisation.
    """

    chrf: float
    bleu: float


def score_translations(translations: Sequence[str], references: Sequence[str]) -> TranslationScores:
    """chrF and BLEU of `translations`."""
    return TranslationScores(
        chrf=CHRF().corpus_score(translations, [references]).score,
        bleu=BLEU().corpus_score(translations, [references]).score,
    )
