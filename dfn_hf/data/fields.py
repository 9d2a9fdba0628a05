"""Images, arrays and sound as fields: coordinates in [−1, 1] and values, batches of them, and how well one is met.

Shape letters: N samples, c coordinate_dim, v value_dim.
"""

import math
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def grid_coordinates(*sizes: int) -> torch.Tensor:
    """Coordinates of an array's samples, float32 `[N, c]`, the last axis fastest.

    Steps are the same along all axes: the longest spans [−1, 1], the others lie about 0.

    Raises:
        ValueError: no size, or one below 1.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be one or more positive numbers, got {list(sizes)}")
    longest = max(*sizes, 2) - 1
    axes = [torch.linspace(-1, 1, size) * ((size - 1) / longest) if size > 1 else torch.zeros(1) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def array_field(array: Any, coordinate_dim: int) -> dict[str, torch.Tensor]:
    """An array, NumPy's or torch's, as a field: `coordinates` float32 `[N, c]` and `values` float32 `[N, v]`.

    Args:
        array: `[size, …]`, `coordinate_dim` axes and, where values are not single numbers, one more for them.

    Integers of 8 or 16 bits and booleans are taken as shares of their type's range, so that 0 … 255 becomes −1 … 1;
    floats stay.

    Raises:
        ValueError: another number of axes, no samples, or numbers of other types.
    """
    array = np.asarray(array)
    if array.dtype == bool:
        array = array * np.uint8(255)
    if array.ndim not in (coordinate_dim, coordinate_dim + 1):
        raise ValueError(
            f"an array with coordinate_dim {coordinate_dim} must have {coordinate_dim} axes, or one more for the "
            f"values; got the shape {list(array.shape)}"
        )
    if 0 in array.shape:
        raise ValueError(f"an array of the shape {list(array.shape)} holds no samples")
    integer = np.issubdtype(array.dtype, np.integer)
    if not (integer and array.dtype.itemsize <= 2 or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(
            f"the array holds {array.dtype}, which says nothing of its range: give uint8, uint16 or int16, or floats "
            "that are about as large as 1"
        )
    if integer:
        limits = np.iinfo(array.dtype)
        array = (array.astype(np.float64) - limits.min) / (float(limits.max) - limits.min) * 2 - 1
    values = torch.from_numpy(np.array(array, dtype=np.float32)).reshape(math.prod(array.shape[:coordinate_dim]), -1)
    return {"coordinates": grid_coordinates(*array.shape[:coordinate_dim]), "values": values}


def image_field(path: str | Path) -> dict[str, torch.Tensor]:
    """An image file as a field over (y, x) with values in [−1, 1]: 1 for grey, 3 for colour. See `read_image`."""
    return array_field(read_image(path), 2)


def read_image(path: str | Path) -> np.ndarray:
    """An image file: `[height, width]` where it is grey, uint8 or uint16, else uint8 `[height, width, 3]`.

    Raises:
        OSError: no such file, or no image.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.uint16)
        return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def sound_field(path: str | Path) -> dict[str, torch.Tensor]:
    """A WAV file as a field over time with values in [−1, 1], one for each channel. See `read_sound`."""
    return array_field(read_sound(path), 1)


def read_sound(path: str | Path) -> np.ndarray:
    """A WAV file, uint8 or int16 `[length, channels]`. See `read_wav`."""
    return read_wav(path)[0]


def read_wav(path: str | Path) -> tuple[np.ndarray, int]:
    """The samples of a WAV file of 8 or 16 bits, uint8 or int16 `[length, channels]`, and how many make a second.

    Raises:
        OSError: no such file. ValueError: no WAV file, or one of another sample width.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is no WAV file of plain samples: {error}") from error
    if width not in (1, 2):
        raise ValueError(f"{path} has samples of {8 * width} bits: convert it to 8 or 16")
    return np.frombuffer(frames, dtype="u1" if width == 1 else "<i2").reshape(-1, channels), rate


def psnr(reconstruction: torch.Tensor, values: torch.Tensor, value_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB of tensors of one shape; `value_range` is 2 for values in [−1, 1]."""
    return -10 * ((reconstruction - values).double().square().mean() / value_range**2).log10().item()


def snr(reconstruction: torch.Tensor, values: torch.Tensor) -> float:
    """Signal-to-noise ratio in dB of tensors of one shape."""
    values = values.double()
    return 10 * (values.square().sum() / (reconstruction - values).square().sum()).log10().item()


class FieldCollator:
    """Collate fields of different sizes: `mask` says which samples there are, and NaN in `labels` is not scored.

    A field has `coordinates` `[N, c]` and `values` `[N, v]`, and may have `mask` bool `[N]`, True where a sample is
    given to the model. Without one, with `hidden_share`, so large a share of the samples is hidden, drawn anew at
    each call from torch's random state.

    Args:
        hidden_share: in [0, 1): 0.75 for masked-field pre-training on what is hidden; 0 to reconstruct what is given.
    """

    def __init__(self, hidden_share: float = 0.0):
        if not 0 <= hidden_share < 1:
            raise ValueError(f"hidden_share must lie in [0, 1), got {hidden_share}")
        self.hidden_share = hidden_share

    def __call__(self, fields: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        fields = [{name: torch.as_tensor(x) for name, x in field.items()} for field in fields]
        masks = [self._mask(field) for field in fields]
        hides = any(not mask.all() for mask in masks)
        labels = [
            field["values"].masked_fill(mask.unsqueeze(-1), math.nan) if hides else field["values"]
            for field, mask in zip(fields, masks, strict=True)
        ]
        return {
            "coordinates": _pad([field["coordinates"] for field in fields], 0.0),
            "values": _pad([field["values"] for field in fields], 0.0),
            "mask": _pad(masks, False),
            "labels": _pad(labels, math.nan),
        }

    def _mask(self, field: dict[str, torch.Tensor]) -> torch.Tensor:
        if "mask" in field:
            return field["mask"].bool()
        length = len(field["values"])
        mask = torch.ones(length, dtype=torch.bool)
        if self.hidden_share:
            mask[torch.randperm(length)[: min(round(self.hidden_share * length), length - 1)]] = False
        return mask


def _pad(tensors: list[torch.Tensor], value: float | bool) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
