"""`dfn-hf train field` and `dfn-hf train contrastive` as functions: from files to a saved model."""

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
from ..modeling.dfn.configuration_dfn import DFNConfig
from ..modeling.dfn.modeling_dfn_contrastive import DFNForContrastive
from ..presets import SIZES, check_fields
from .contrastive import train_contrastive
from .field import KINDS, FieldPieces, load_arrays, new_field_model, read_array, train_fields
from .trainer import TrainingResult, TrainingSettings

HELD_OUT_PIECES = 64
HELD_OUT_FRACTION = 0.05
VERSES = "the verses of the World English Bible and the Reina-Valera"


def learn_fields(
    data: str | Path,
    output: Path,
    settings: TrainingSettings,
    *,
    num_samples: int,
    size: str,
    options: dict[str, Any],
    hidden_share: float,
    resume: bool,
    overwrite: bool,
) -> TrainingResult:
    """A model with fresh weights that gives back pieces of `num_samples` of the fields of a file or folder.

    Of several files a twentieth is held out, at least one; of one, other pieces of it.

    Raises:
        ValueError: no fields there, or what the configuration refuses.
    """
    arrays = load_arrays(data)
    model = new_field_model(arrays, num_samples=num_samples, size=size, seed=settings.seed, **options)
    count = max(1, round(HELD_OUT_FRACTION * len(arrays))) if len(arrays) > 1 else 0
    pieces = settings.max_steps * settings.batch_size * settings.gradient_accumulation_steps
    return train_fields(
        model,
        FieldPieces(arrays[count:], num_samples, pieces, settings.seed),
        FieldPieces(arrays[:count] or arrays, num_samples, HELD_OUT_PIECES, settings.seed + 1),
        output,
        settings,
        hidden_share=hidden_share,
        provenance=f"Trained on {data}, in pieces of {num_samples} samples, from scratch.",
        resume=resume,
        overwrite=overwrite,
    )


def learn_pairs(
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
    """A model with fresh weights that embeds the two sides of pairs close to each other.

    Args:
        data: JSON Lines; a side that names an image, an array or a WAV file, from their folder on, is that field. None
            takes the embedded verses.

    Raises:
        ValueError: no pairs there, sides of two kinds of field, an unknown size, or what the configuration refuses.
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
            raise ValueError(f"{field} is the tokenizer's or the objective's: leave out --config-override {field}")
    if data is None:
        pairs, held_out = load_verses("train"), load_verses("validation")
    else:
        split = load_pairs(data, source_field=source_field, target_field=target_field)
        parts = split.train_test_split(HELD_OUT_FRACTION, seed=settings.seed)
        pairs, held_out = parts["train"], parts["test"]
    folder = Path("." if data is None else data)
    folder = folder if folder.is_dir() else folder.parent
    rows, held_out_rows = (two_views(part, folder, tokenizer, max_length) for part in (pairs, held_out))
    config = DFNConfig(**SIZES[size] | field_options(rows) | fixed | options)
    torch.manual_seed(settings.seed)
    return train_contrastive(
        DFNForContrastive(config),
        tokenizer,
        rows,
        held_out_rows,
        output,
        settings,
        provenance=f"Trained on {VERSES if data is None else data}, from scratch.",
        resume=resume,
        overwrite=overwrite,
    )


def two_views(pairs: Dataset, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Rows of pairs, each side a text or, where all its texts name files, fields."""
    sides = (one_side(list(pairs[side]), folder, tokenizer, max_length) for side in SIDES)
    return pair_views(*sides)


def one_side(texts: Sequence[str], folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """The views of one side."""
    if not all(Path(text).suffix.lower() in KINDS for text in texts):
        return text_view(texts, tokenizer, max_length=max_length)
    views: list[Row] = []
    for text in texts:
        if not (folder / text).is_file():
            raise ValueError(f"{folder / text} is not there: name files from the folder of the pairs on")
        array = read_array(folder / text)
        views.append(dict(array_field(array, array.ndim - 1)))
    return views


def field_options(rows: Sequence[Row]) -> dict[str, Any]:
    """What the configuration says of the fields among the views, if there are any."""
    kinds = {
        (row[f"{prefix}coordinates"].shape[1], row[f"{prefix}values"].shape[1])
        for row in rows
        for prefix in ("", "pair_")
        if f"{prefix}coordinates" in row
    }
    if len(kinds) > 1:
        raise ValueError(f"the pairs hold fields of several kinds, (axes, values) {sorted(kinds)}: a model takes one")
    if not kinds:
        return {}
    coordinate_dim, value_dim = kinds.pop()
    return {"contrastive_fields": True, "coordinate_dim": coordinate_dim, "value_dim": value_dim}
