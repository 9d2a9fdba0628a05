"""Training of `DFNForFieldReconstruction` on images, arrays and sound, whole or in pieces.

arrays = load_arrays("photographs/")
train, held_out = FieldPieces(arrays[1:], 4096, 2000), FieldPieces(arrays[:1], 4096, 32)
train_fields(new_field_model(arrays), train, held_out, "my-field")
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import ModelCard
from torch.utils.data import Dataset
from transformers import AutoConfig, TrainerCallback, TrainingArguments

from ..data.fields import FieldCollator, array_field, read_image, read_sound
from ..hub.model_card import PROVENANCE, UNSTATED, titled_card
from ..modeling.dfn.configuration_dfn import DFNConfig
from ..modeling.dfn.modeling_dfn_field import DFNForFieldReconstruction
from ..presets import SIZES, check_fields
from .trainer import MatrixDecayTrainer, TrainingResult, TrainingSettings, train_model

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
KINDS = (*IMAGES, ".npy", ".wav")
SAMPLES_PER_ENTITY = 16
LARGEST_VALUE = 10.0


def load_arrays(path: str | Path) -> list[np.ndarray]:
    """The images, NumPy arrays (`.npy`) and waveforms (`.wav`) of a file or a folder, each `[size, …, values]`.

    A `.npy` of two axes is a grid of single numbers, of three one of as many values as its last axis has, of four a
    clip over time.

    Raises:
        ValueError: none of these are there, or they differ in their axes or values.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}: check the path")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix.lower() in KINDS]
    if not files:
        raise ValueError(f"{path} holds no field: give files that end in {', '.join(KINDS)}")
    arrays = [read_array(file) for file in files]
    for file, array in zip(files, arrays, strict=True):
        if array.ndim != arrays[0].ndim or array.shape[-1] != arrays[0].shape[-1]:
            raise ValueError(
                f"{file} has {array.ndim - 1} axes of {array.shape[-1]} values and {files[0]} {arrays[0].ndim - 1} of "
                f"{arrays[0].shape[-1]}: a model is of one kind of field"
            )
    return arrays


def read_array(file: Path) -> np.ndarray:
    """One of them, `[size, …, values]`.

    Raises:
        ValueError: an array that cannot be read, has another number of axes, or floats that are no values of a field.
    """
    if file.suffix.lower() == ".wav":
        return read_sound(file)
    if file.suffix.lower() != ".npy":
        image = read_image(file)
        return image[..., None] if image.ndim == 2 else image
    try:
        array = np.load(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{file} holds no array of numbers: {error}") from error
    if not 1 <= array.ndim <= 4:
        raise ValueError(f"{file} has {array.ndim} axes: give an array of one to four")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ValueError(f"{file} holds numbers that are not finite: fill them in")
        if array.size and np.abs(array).max() > LARGEST_VALUE:
            raise ValueError(f"{file} holds numbers up to {np.abs(array).max():g}: scale them to about [-1, 1]")
    return array[..., None] if array.ndim <= 2 else array


class FieldPieces(Dataset):
    """Pieces of arrays as fields, drawn at random places, the same ones for the same seed.

    Args:
        arrays: `[size, …, values]` each, as `load_arrays` gives them.
        num_samples: of a piece at most; its sides are equal where the array's allow.
        length: how many pieces.
    """

    def __init__(self, arrays: Sequence[np.ndarray], num_samples: int, length: int, seed: int = 0):
        self.arrays, self.num_samples, self.length, self.seed = arrays, num_samples, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if not 0 <= number < self.length:
            raise IndexError(number)
        generator = np.random.default_rng((self.seed, number))
        array = self.arrays[int(generator.integers(len(self.arrays)))]
        sizes = piece_sizes(array.shape[:-1], self.num_samples)
        starts = [generator.integers(whole - size + 1) for whole, size in zip(array.shape, sizes, strict=False)]
        piece = array[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
        return array_field(piece, len(sizes))


def piece_sizes(sizes: Sequence[int], num_samples: int) -> list[int]:
    """Sides, at most `sizes`, of a piece of about `num_samples` and no more; as equal as can be."""
    left, chosen = num_samples, {}
    for place, (axis, size) in enumerate(sorted(enumerate(sizes), key=lambda pair: pair[1])):
        chosen[axis] = max(1, min(size, int(left ** (1 / (len(sizes) - place)) + 1e-9)))
        left //= chosen[axis]
    return [chosen[axis] for axis in range(len(sizes))]


def new_field_model(
    arrays: Sequence[np.ndarray], *, num_samples: int, size: str = "tiny", seed: int = 0, **options: Any
) -> DFNForFieldReconstruction:
    """A model with fresh weights for fields like these, of which it reads `num_samples` at a time.

    Args:
        size: one of `sizes.SIZES`.
        options: fields of `DFNConfig` that differ; `num_entities` is a sixteenth of the samples if not given.

    Raises:
        ValueError: an unknown size, or a field that the configuration does not have or refuses.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: choose one of {', '.join(SIZES)}")
    check_fields("dfn", options)
    usual = {
        "entity_sampling": "adaptive",
        "num_entities": max(1, num_samples // SAMPLES_PER_ENTITY),
        "coordinate_dim": arrays[0].ndim - 1,
        "value_dim": arrays[0].shape[-1],
        "is_causal": False,
    }
    torch.manual_seed(seed)
    return DFNForFieldReconstruction(DFNConfig(**SIZES[size] | usual | options))


class FieldTrainer(MatrixDecayTrainer):
    """A Trainer of fields, in any order."""

    def __init__(self, args: TrainingArguments, **kwargs: Any) -> None:
        args.train_sampling_strategy = "random"
        super().__init__(args=args, **kwargs)


def train_fields(
    model: DFNForFieldReconstruction,
    train: Dataset,
    held_out: Dataset,
    output_folder: str | Path,
    settings: TrainingSettings | None = None,
    *,
    hidden_share: float = 0.0,
    provenance: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: Iterable[TrainerCallback] = (),
) -> TrainingResult:
    """Train `model` to give back fields; saved, resumed and logged as by `training.train_model`.

    Args:
        train, held_out: fields, such as `FieldPieces`.
        hidden_share: of a field's samples, hidden from the model and asked for; 0 asks for those that it is given.

    Returns:
        Its losses are mean squared errors.
    """
    result = train_model(
        model,
        None,
        cast(Any, train),
        cast(Any, held_out),
        output_folder,
        settings,
        provenance=provenance,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        callbacks=callbacks,
        data_collator=FieldCollator(hidden_share),
        make_trainer=FieldTrainer,
    )
    if PartialState().is_main_process:
        field_card(result, provenance).save(result.folder / "README.md")
    return result


def field_card(result: TrainingResult, provenance: str) -> ModelCard:
    """The card of a freshly trained model of fields."""
    config = AutoConfig.from_pretrained(result.folder)
    name = result.folder.resolve().name
    text = f"""A `DFNForFieldReconstruction` over {config.coordinate_dim} axes with {config.value_dim} values a sample.

```python
from dfn_hf import DFNForFieldReconstruction
from dfn_hf.data.fields import array_field

model = DFNForFieldReconstruction.from_pretrained("{name}")
field = array_field(array, {config.coordinate_dim})  # an array of yours
reconstruction = model(field["coordinates"][None], field["values"][None]).reconstruction
```

## {PROVENANCE}

{provenance or UNSTATED}
Validation loss {result.validation_loss:.6f} (mean squared error).
"""
    return titled_card(config, name, text, task="feature-extraction")
