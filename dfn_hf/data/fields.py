"""Converts images, arrays and sound to fields (coordinates in [−1, 1] and values), collates them, and scores them.

Shape letters: N samples, c coordinate_dim, v value_dim.
"""

import math
import os
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import FREE_BYTES, MAX_EXPANSION, damaged, explain_read_errors

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")  # Pillow runs external programs for some other formats


def grid_coordinates(*sizes: int) -> torch.Tensor:
    """Coordinates of the samples of an array, float32 `[N, c]`, in row-major order.

    The step is the same along all axes. The longest axis spans [−1, 1]; the others are centred at 0.

    Args:
        sizes: length of each axis.

    Raises:
        ValueError: no size is given, or a size is below 1.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be one or more positive integers, got {list(sizes)}")
    longest = max(*sizes, 2) - 1
    axes = [torch.linspace(-1, 1, size) * ((size - 1) / longest) if size > 1 else torch.zeros(1) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def array_field(array: Any, coordinate_dim: int) -> dict[str, torch.Tensor]:
    """Convert an array to a field.

    8-bit and 16-bit integers and booleans are scaled linearly from their type's range to [−1, 1], for example uint8
    from [0, 255]. Floats keep their values.

    Args:
        array: NumPy array or tensor with `coordinate_dim` axes, and one more axis if a sample has several values.
        coordinate_dim: number of coordinate axes.

    Returns:
        `coordinates` float32 `[N, c]` and `values` float32 `[N, v]`.

    Raises:
        ValueError: the array has another number of axes, no samples, or an unsupported dtype.
    """
    array = np.asarray(array)
    if array.ndim not in (coordinate_dim, coordinate_dim + 1):
        raise ValueError(
            f"the array has shape {list(array.shape)} but coordinate_dim is {coordinate_dim}: give {coordinate_dim} "
            "axes, and one more if a sample has several values"
        )
    check_samples(array, "the array")
    if array.dtype == bool:
        array = array * np.uint8(255)
    if np.issubdtype(array.dtype, np.integer):
        limits = np.iinfo(array.dtype)
        array = (array.astype(np.float64) - limits.min) / (float(limits.max) - limits.min) * 2 - 1
    values = torch.from_numpy(np.array(array, dtype=np.float32)).reshape(math.prod(array.shape[:coordinate_dim]), -1)
    return {"coordinates": grid_coordinates(*array.shape[:coordinate_dim]), "values": values}


def check_samples(array: np.ndarray, name: str) -> None:
    """Raise ValueError if the array has no samples or a dtype whose value range is not defined; `name` names it."""
    if 0 in array.shape:
        raise ValueError(
            f"{name} has shape {list(array.shape)} and holds no samples: give an array without empty axes"
        )
    small = np.issubdtype(array.dtype, np.integer) and array.dtype.itemsize <= 2
    if not (small or array.dtype == bool or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(
            f"{name} has dtype {array.dtype}, whose value range is not defined: convert it to uint8, uint16 "
            "or int16, or to floats in about [-1, 1]"
        )


def read_npy(path: str | Path) -> np.ndarray:
    """Read a `.npy` file. The header is checked before memory is allocated, and objects are not unpickled.

    Raises:
        ValueError: the file is missing, damaged, truncated, or holds objects.
    """
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with explain_read_errors(path, "an array that numpy.save wrote"), open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in formats:
            raise ValueError(f"format version {version[0]}.{version[1]}")
        shape, _, dtype = formats[version](file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if min(shape, default=0) < 0:
            raise ValueError(f"its shape is {list(shape)}")
        expected, found = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - file.tell()
        if found < expected:
            raise ValueError(f"the header declares {expected:,} bytes of values, but the file holds {found:,}")
        file.seek(0)
        return np.load(file, allow_pickle=False)


def image_field(path: str | Path) -> dict[str, torch.Tensor]:
    """Read an image file as a field over (y, x); values lie in [−1, 1], 1 per sample if grey, else 3 (RGB)."""
    return array_field(read_image(path), 2)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file: a grey image as uint8 or uint16 `[height, width]`, any other as uint8 `[height, width, 3]`.

    Raises:
        ValueError: the file is missing, damaged, not an image, or has pixels of more than 16 bits.
    """
    from PIL import Image

    with explain_read_errors(path, "a PNG, JPEG, WebP, TIFF or BMP image"):
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if math.prod(image.size) > max(FREE_BYTES, MAX_EXPANSION * os.stat(path).st_size):
                raise ValueError(f"it has {image.size[0]:,} x {image.size[1]:,} pixels, too many for its size")
            if not image.mode.startswith(("I", "F")):
                return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
            mode, pixels = image.mode, np.asarray(image)
    if mode == "F" or pixels.min() < 0 or pixels.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"{path} has pixels of 32 bits: convert it to 8 or 16 bits, or save the array as .npy")
    return pixels.astype(np.uint16)


def sound_field(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a WAV file as a field over time; values lie in [−1, 1], one per channel."""
    return array_field(read_sound(path), 1)


def read_sound(path: str | Path) -> np.ndarray:
    """Read the samples of a WAV file, uint8 or int16 `[length, channels]`; see `read_wav`."""
    return read_wav(path)[0]


def read_wav(path: str | Path) -> tuple[np.ndarray, int]:
    """Read a WAV file with 8 or 16 bits per sample.

    Returns:
        The samples, uint8 or int16 `[length, channels]`, and the sampling rate in Hz.

    Raises:
        ValueError: the file is missing, damaged or truncated, is not a PCM WAV file, has another sample width, or
            holds no sample.
    """
    kind = "a PCM WAV file"
    with explain_read_errors(path, kind), wave.open(str(path), "rb") as file:
        channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
        num_frames = file.getnframes()
        frames = file.readframes(min(num_frames, os.stat(path).st_size // (channels * width)))
    if width not in (1, 2):
        raise ValueError(f"{path} has {8 * width} bits per sample: convert it to 8 or 16 bits")
    if len(frames) != num_frames * channels * width:
        found = len(frames) // (channels * width)
        raise damaged(
            path, kind, ValueError(f"the header declares {num_frames:,} frames, but the file holds {found:,}")
        )
    if not frames:
        raise ValueError(f"{path} holds no sample: remove it from the data")
    if rate < 1:
        raise ValueError(f"{path} has a sampling rate of {rate} Hz: save it with the rate of the recording")
    return np.frombuffer(frames, dtype="u1" if width == 1 else "<i2").reshape(-1, channels), rate


def psnr(reconstruction: torch.Tensor, values: torch.Tensor, value_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of equal shape; `value_range` is 2 for values in [−1, 1]."""
    return -10 * ((reconstruction - values).double().square().mean() / value_range**2).log10().item()


def snr(reconstruction: torch.Tensor, values: torch.Tensor) -> float:
    """Signal-to-noise ratio in dB of two tensors of equal shape."""
    values = values.double()
    return 10 * (values.square().sum() / (reconstruction - values).square().sum()).log10().item()


class FieldCollator:
    """Collates fields of different sizes, and masks samples for pre-training.

    A field has `coordinates` `[N, c]` and `values` `[N, v]`. It may have `mask`, bool `[N]`, True for the samples that
    the model reads; otherwise each call masks a fraction `mask_ratio` of the samples, drawn with torch's generator.
    In a batch, `mask` is False at masked and padded samples, and `labels` are NaN at samples that are not scored. If
    any sample is masked, the loss scores masked samples only; otherwise it scores all samples.

    Args:
        mask_ratio: fraction of samples to mask, in [0, 1): 0.75 for masked pre-training, 0 for reconstruction.
    """

    def __init__(self, mask_ratio: float = 0.0):
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be at least 0 and below 1, got {mask_ratio}")
        self.mask_ratio = mask_ratio

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
        if self.mask_ratio:
            mask[torch.randperm(length)[: min(round(self.mask_ratio * length), length - 1)]] = False
        return mask


def _pad(tensors: list[torch.Tensor], value: float | bool) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
