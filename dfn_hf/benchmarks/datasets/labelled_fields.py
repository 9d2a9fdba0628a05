"""Labelled fields: digits spoken in English, and handwritten digits of 8 × 8 pixels (scikit-learn)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from dfn_hf.data.audio import HOP_SECONDS, spectrum_field
from dfn_hf.data.contrastive import ContrastiveCollator, Row, pair_views

from .spoken_digits import WORDS, spoken_digits

TRAINED_IMAGES = 1347  # of 1,797
SIDE = 8
NUM_FRAMES = 16


@dataclass(frozen=True)
class LabelledFields:
    """A set of fields with one caption each.

    Attributes:
        fields: first views (`coordinates`, `values`).
        labels: index of each field's caption in `captions`.
        captions: the ten texts.
        augment: returns a random variation of a field; None without augmentation.
        vector: returns a field as one vector of fixed length, for classifiers.
    """

    fields: list[Row]
    labels: list[int]
    captions: tuple[str, ...]
    augment: Callable[[Row, np.random.Generator], Row] | None
    vector: Callable[[Row], np.ndarray]

    def batches(
        self, captions: list[Row], collator: ContrastiveCollator, seed: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield endless batches of one augmented field per caption; `captions` holds the captions' tokens."""
        generator = np.random.default_rng(seed)
        of_label = [np.flatnonzero(np.equal(self.labels, label)) for label in range(len(captions))]
        while True:
            fields = [self.fields[generator.choice(numbers)] for numbers in of_label]
            if self.augment is not None:
                fields = [self.augment(field, generator) for field in fields]
            yield collator(pair_views(fields, captions))

    def augmented_vectors(self, copies: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return vectors `[fields · (copies + 1), …]` of all fields and their augmented copies, and the labels."""
        generator = np.random.default_rng(seed)
        fields = list(self.fields)
        if self.augment is not None:
            fields += [self.augment(field, generator) for _ in range(copies) for field in self.fields]
        return np.stack([self.vector(field) for field in fields]), np.tile(
            self.labels, len(fields) // len(self.fields)
        )


def spoken_digit_fields(folder: str | Path) -> tuple[LabelledFields, LabelledFields]:
    """Return training fields and held-out fields from other recordings of the same speaker; see `spoken_digits`."""
    train, held_out = (
        LabelledFields(
            fields=[spectrum_field(take.samples, take.rate) for take in takes],
            labels=[WORDS.index(take.word) for take in takes],
            captions=WORDS,
            augment=augment_sound,
            vector=lambda field: resample_time(field["values"], NUM_FRAMES).flatten().numpy(),
        )
        for takes in spoken_digits(folder)
    )
    return train, held_out


def handwritten_digit_fields() -> tuple[LabelledFields, LabelledFields]:
    """Return the first 1,347 images for training and the last 450 as held-out fields.

    The data set is ordered by writer, so the held-out images come from other writers.
    """
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    axis = torch.linspace(-1, 1, SIDE)
    coordinates = torch.cartesian_prod(axis, axis)
    fields = [
        {"coordinates": coordinates, "values": torch.from_numpy(image).float().unsqueeze(1) / 8 - 1}
        for image in images
    ]
    train, held_out = (
        LabelledFields(
            fields=fields[part],
            labels=digits[part].tolist(),
            captions=tuple(f"a handwritten {word}" for word in WORDS),
            augment=None,
            vector=lambda field: field["values"].flatten().numpy(),
        )
        for part in (slice(TRAINED_IMAGES), slice(TRAINED_IMAGES, None))
    )
    return train, held_out


def resample_time(values: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Resample values `[frames, bands]` linearly to `num_frames` frames over the same duration."""
    return interpolate(values.T[None], size=num_frames, mode="linear")[0].T


def augment_sound(field: Row, generator: np.random.Generator) -> Row:
    """Change the speed and pitch of a sound, cut its ends, add noise, and mask a frequency band and a time span."""
    values = field["values"]
    bands = values.shape[1]
    values = resample_time(values, max(NUM_FRAMES, round(len(values) * generator.uniform(0.75, 1.3))))
    places = torch.arange(bands) + generator.uniform(-1.5, 1.5)
    lower = places.floor().long()
    fraction = (places - lower).float()
    low, high = (values[:, number.clamp(0, bands - 1)] for number in (lower, lower + 1))
    values = low * (1 - fraction) + high * fraction
    first, last = generator.integers(0, max(1, len(values) // 8), 2)
    values = values[first : len(values) - last]
    values = values + 0.2 * torch.from_numpy(generator.standard_normal(values.shape)).float()
    band, moment = generator.integers(bands), generator.integers(len(values))
    values[:, band : band + generator.integers(5)] = 0
    values[moment : moment + generator.integers(8)] = 0
    seconds = HOP_SECONDS * torch.arange(len(values), dtype=torch.float32)
    return {"coordinates": (seconds - seconds.mean()).unsqueeze(1), "values": values}
