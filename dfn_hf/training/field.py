"""Training of `DFNForFieldReconstruction` on images, arrays and sound, or on random crops of them.

Example:
    ```python
    arrays = load_arrays("photographs/")
    train, held_out = FieldCrops(arrays[1:], 4096, 2000), FieldCrops(arrays[:1], 4096, 32)
    train_fields(new_field_model(arrays, num_samples=4096), train, held_out, "my-field")
    ```
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import ModelCard
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..data.fields import FieldCollator, array_field, check_samples, read_image, read_npy, read_sound
from ..data.files import find_files
from ..hub.model_card import PROVENANCE, UNSTATED, options_line, titled_card
from ..modeling.dfn.configuration_dfn import DFNConfig
from ..modeling.dfn.modeling_dfn_field import DFNForFieldReconstruction
from ..presets import SIZES, check_fields
from .run import TrainingResult
from .settings import TrainingSettings
from .trainer import MatrixDecayTrainer, train_model

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
KINDS = (*IMAGES, ".npy", ".wav")
SAMPLES_PER_ENTITY = 16
MAX_VALUE = 10.0


def load_arrays(path: str | Path) -> list[np.ndarray]:
    """Load images, NumPy arrays (`.npy`) and waveforms (`.wav`) from a file or a folder, each `[size, …, values]`.

    A `.npy` array with one or two axes has one value per sample. With three or four axes, the last axis holds the
    values; four axes are a clip over time. Hidden files in a folder are skipped.

    Raises:
        ValueError: `path` does not exist or holds no such file, a file cannot be read or is damaged, or the files
            differ in the number of axes or values.
    """
    files = find_files(path, KINDS, "field")
    arrays = [read_array(file) for file in files]
    for file, array in zip(files, arrays, strict=True):
        if array.ndim != arrays[0].ndim or array.shape[-1] != arrays[0].shape[-1]:
            raise ValueError(
                f"{file} has {array.ndim - 1} axes and {array.shape[-1]} values per sample, but {files[0]} has "
                f"{arrays[0].ndim - 1} and {arrays[0].shape[-1]}: give files of one kind"
            )
    return arrays


def read_array(file: Path) -> np.ndarray:
    """Read one image, array or waveform, `[size, …, values]`; see `load_arrays`.

    Raises:
        ValueError: the file is damaged or of another kind, holds no samples, does not have one to four axes, or has
            floats that are not finite or larger than 10.
    """
    suffix = file.suffix.lower()
    if suffix not in KINDS:
        raise ValueError(f"{file} is not a field: give a file with one of the suffixes {', '.join(KINDS)}")
    if suffix == ".wav":
        return read_sound(file)
    if suffix in IMAGES:
        image = read_image(file)
        return image[..., None] if image.ndim == 2 else image
    array = read_npy(file)
    if not 1 <= array.ndim <= 4:
        raise ValueError(f"{file} has {array.ndim} axes: give an array with one to four")
    check_samples(array, str(file))
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ValueError(f"{file} holds values that are not finite: replace them")
        if np.abs(array).max() > MAX_VALUE:
            raise ValueError(f"{file} holds values up to {np.abs(array).max():g}: scale them to about [-1, 1]")
    return array[..., None] if array.ndim <= 2 else array


class FieldCrops(Dataset):
    """A dataset of random crops of arrays, as fields. Crop `number` depends on `seed` and `number` only.

    Args:
        arrays: arrays `[size, …, values]`, from `load_arrays`.
        num_samples: maximum number of samples of a crop. Its sides are equal if the array is large enough.
        length: number of crops.
        seed: seed of the crop positions.
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
        sizes = crop_sizes(array.shape[:-1], self.num_samples)
        starts = [generator.integers(whole - size + 1) for whole, size in zip(array.shape, sizes, strict=False)]
        crop = array[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
        return array_field(crop, len(sizes))


def crop_sizes(sizes: Sequence[int], num_samples: int) -> list[int]:
    """Sides of a crop with at most `num_samples` samples: at most `sizes`, and as equal as possible."""
    remaining, sides = num_samples, {}
    for place, (axis, size) in enumerate(sorted(enumerate(sizes), key=lambda pair: pair[1])):
        sides[axis] = max(1, min(size, int(remaining ** (1 / (len(sizes) - place)) + 1e-9)))
        remaining //= sides[axis]
    return [sides[axis] for axis in range(len(sizes))]


def new_field_model(
    arrays: Sequence[np.ndarray], *, num_samples: int, size: str = "tiny", seed: int = 0, **options: Any
) -> DFNForFieldReconstruction:
    """Build a randomly initialized model for fields like `arrays`.

    Args:
        arrays: arrays `[size, …, values]`, which determine `coordinate_dim` and `value_dim`.
        num_samples: samples per field; the default of `num_entities` is a sixteenth of it.
        size: a key of `presets.SIZES`.
        seed: seed of the weights.
        options: fields of `DFNConfig` that override the preset.

    Raises:
        ValueError: `size` is unknown, or `DFNConfig` has no such field or rejects its value.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: choose one of {', '.join(SIZES)}")
    check_fields("dfn", options)
    defaults = {
        "entity_sampling": "adaptive",
        "num_entities": max(1, num_samples // SAMPLES_PER_ENTITY),
        "coordinate_dim": arrays[0].ndim - 1,
        "value_dim": arrays[0].shape[-1],
        "is_causal": False,
    }
    torch.manual_seed(seed)
    return DFNForFieldReconstruction(DFNConfig(**SIZES[size] | defaults | options))


class FieldTrainer(MatrixDecayTrainer):
    """A Trainer that draws fields in random order, not grouped by length."""

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
    mask_ratio: float = 0.0,
    provenance: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: Iterable[TrainerCallback] = (),
) -> TrainingResult:
    """Train `model` to reconstruct fields. Checkpoints, resuming and logs are those of `train_model`.

    Args:
        model: model to train.
        train, held_out: datasets of fields, such as `FieldCrops`.
        mask_ratio: fraction of samples to mask, see `FieldCollator`; 0 trains plain reconstruction.
        output_folder, settings, provenance, resume, overwrite, progress, callbacks: see `train_model`.

    Returns:
        The result, with mean squared errors as losses.
    """
    return train_model(
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
        data_collator=FieldCollator(mask_ratio),
        make_trainer=FieldTrainer,
        make_card=field_card,
    )


def field_card(
    model: PreTrainedModel, *, name: str, provenance: str, settings: dict[str, Any], validation_loss: float
) -> ModelCard:
    """Model card of a trained field model; for the arguments see `model_card`."""
    config = model.config
    text = f"""A `DFNForFieldReconstruction`: {config.coordinate_dim} axes, {config.value_dim} values per sample.

```python
from dfn_hf import DFNForFieldReconstruction
from dfn_hf.data.fields import array_field

model = DFNForFieldReconstruction.from_pretrained("{name}")
field = array_field(array, {config.coordinate_dim})  # your array
reconstruction = model(field["coordinates"][None], field["values"][None]).reconstruction
```

## {PROVENANCE}

{provenance or UNSTATED}
Validation loss {validation_loss:.6f} (mean squared error).

{options_line(settings)}
"""
    return titled_card(config, name, text, task="feature-extraction")
