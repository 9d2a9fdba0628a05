"""Trains a new field model or embedding model from files, as `dfn-hf train field` and `train contrastive` do."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..assets.verses import load_verses
from ..data.contrastive import Row, pair_views, text_view
from ..data.fields import array_field
from ..data.pairs import SIDES, load_pairs
from ..hub.private_paths import public_name
from ..modeling.dfn.configuration_dfn import DFNConfig
from ..modeling.dfn.modeling_dfn_contrastive import DFNForContrastive
from ..presets import SIZES, check_fields
from .contrastive import train_contrastive
from .field import KINDS, FieldCrops, load_arrays, new_field_model, read_array, train_fields
from .run import TrainingResult
from .settings import TrainingSettings

NUM_VALIDATION_CROPS = 64
HELD_OUT_FRACTION = 0.05
VERSES = "the verses of the World English Bible and the Reina-Valera"


def train_new_field_model(
    data: str | Path,
    output: Path,
    settings: TrainingSettings,
    *,
    num_samples: int,
    size: str,
    options: dict[str, Any],
    mask_ratio: float,
    resume: bool,
    overwrite: bool,
) -> TrainingResult:
    """Train a new model to reconstruct random crops of the fields in a file or folder.

    5 % of the files, at least one, are held out for validation. A single file is also validated on, at other crops.

    Args:
        data: image, `.npy` or `.wav` file, or a folder of them.
        output: new or empty folder for the model.
        settings: settings of the run.
        num_samples: maximum number of samples per crop.
        size: a key of `presets.SIZES`.
        options: fields of `DFNConfig` that override the preset.
        mask_ratio: fraction of samples to mask, see `FieldCollator`.
        resume, overwrite: see `train_model`.

    Raises:
        ValueError: `data` holds no fields, or `DFNConfig` rejects a value.
    """
    arrays = load_arrays(data)
    model = new_field_model(arrays, num_samples=num_samples, size=size, seed=settings.seed, **options)
    count = max(1, round(HELD_OUT_FRACTION * len(arrays))) if len(arrays) > 1 else 0
    num_crops = settings.max_steps * settings.batch_size * settings.gradient_accumulation_steps
    return train_fields(
        model,
        FieldCrops(arrays[count:], num_samples, num_crops, settings.seed),
        FieldCrops(arrays[:count] or arrays, num_samples, NUM_VALIDATION_CROPS, settings.seed + 1),
        output,
        settings,
        mask_ratio=mask_ratio,
        provenance=f"Trained on {public_name(data)}, in crops of {num_samples} samples, from scratch.",
        resume=resume,
        overwrite=overwrite,
    )


def train_new_contrastive_model(
    data: str | Path | None,
    output: Path,
    settings: TrainingSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source_field: str,
    target_field: str,
    max_length: int,
    size: str,
    options: dict[str, Any],
    resume: bool,
    overwrite: bool,
) -> TrainingResult:
    """Train a new embedding model on pairs of views.

    Args:
        data: JSON Lines file or folder of pairs. If all texts of a side are paths of images, `.npy` or `.wav` files,
            relative to the folder of `data`, its views are these fields. None means the bundled verses.
        output: new or empty folder for the model.
        settings: settings of the run.
        tokenizer: tokenizer of the texts.
        source_field, target_field: JSON fields that hold the two sides.
        max_length: maximum number of tokens per text; longer texts are truncated.
        size: a key of `presets.SIZES`.
        options: fields of `DFNConfig` that override the preset.
        resume, overwrite: see `train_model`.

    Raises:
        ValueError: `data` holds no pairs or fields of several kinds, `size` is unknown, or `DFNConfig` rejects a
            value.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: choose one of {', '.join(SIZES)}")
    check_fields("dfn", options)
    fixed = {
        "vocab_size": len(tokenizer),
        "is_causal": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    for field in options:
        if field in fixed:
            raise ValueError(f"{field} is set by the tokenizer or the objective: remove --config-override {field}")
    if data is None:
        pairs, held_out = load_verses("train"), load_verses("validation")
    else:
        split = load_pairs(data, source_field=source_field, target_field=target_field)
        if len(split) < 2:
            raise ValueError(
                f"{data} holds one pair, but one is needed for training and one for validation: give more pairs"
            )
        parts = split.train_test_split(HELD_OUT_FRACTION, seed=settings.seed)
        pairs, held_out = parts["train"], parts["test"]
    folder = Path("." if data is None else data)
    folder = folder if folder.is_dir() else folder.parent
    rows, held_out_rows = (pair_rows(part, folder, tokenizer, max_length) for part in (pairs, held_out))
    config = DFNConfig(**SIZES[size] | field_options(rows) | fixed | options)
    torch.manual_seed(settings.seed)
    return train_contrastive(
        DFNForContrastive(config),
        tokenizer,
        rows,
        held_out_rows,
        output,
        settings,
        provenance=f"Trained on {VERSES if data is None else public_name(data)}, from scratch.",
        resume=resume,
        overwrite=overwrite,
    )


def pair_rows(pairs: Dataset, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Rows of two views; see `side_views`."""
    sides = (side_views(list(pairs[side]), folder, tokenizer, max_length) for side in SIDES)
    return pair_views(*sides)


def side_views(texts: Sequence[str], folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Views of one side: fields if all texts are paths of field files relative to `folder`, else token ids."""
    if not all(Path(text).suffix.lower() in KINDS for text in texts):
        return text_view(texts, tokenizer, max_length=max_length)
    views: list[Row] = []
    for text in texts:
        if not os.path.exists(folder / text):
            raise ValueError(f"{folder / text} does not exist: give paths relative to {folder}")
        array = read_array(folder / text)
        views.append(dict(array_field(array, array.ndim - 1)))
    return views


def field_options(rows: Sequence[Row]) -> dict[str, Any]:
    """Options of `DFNConfig` for the fields among the views, empty if there are none."""
    kinds = {
        (row[f"{prefix}coordinates"].shape[1], row[f"{prefix}values"].shape[1])
        for row in rows
        for prefix in ("", "pair_")
        if f"{prefix}coordinates" in row
    }
    if len(kinds) > 1:
        raise ValueError(f"the pairs hold fields with (axes, values) {sorted(kinds)}: give fields of one kind")
    if not kinds:
        return {}
    coordinate_dim, value_dim = kinds.pop()
    return {"contrastive_fields": True, "coordinate_dim": coordinate_dim, "value_dim": value_dim}
