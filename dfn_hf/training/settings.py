"""Settings of a training run. Imports no library: the CLI checks settings before it imports torch."""

import math
from dataclasses import dataclass
from typing import Any

from ..messages import number_text

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**32 - 1  # of numpy
MAX_FACTOR = 1e6


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training run with AdamW, linear warm-up, cosine decay and gradients clipped to norm 1.

    Attributes:
        max_steps: optimizer steps.
        batch_size: blocks per device and forward pass.
        gradient_accumulation_steps: forward passes per optimizer step.
        learning_rate: peak learning rate, reached after warm-up; the cosine decays to 0.
        warmup_ratio: fraction of the steps in which the learning rate rises linearly from 0.
        weight_decay: weight decay of parameters with two or more dimensions; biases, norms and other vectors have 0.
        save_steps: steps between evaluations; each evaluation saves a checkpoint.
        seed: seed of the order of blocks and of dropout.
    """

    max_steps: int = 1000
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-3
    warmup_ratio: float = 0.1
    weight_decay: float = 0.1
    save_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "save_steps"):
            check_integer(name, getattr(self, name), 1, MAX_COUNT)
        check_integer("seed", self.seed, 0, MAX_SEED)
        for name in ("learning_rate", "weight_decay", "warmup_ratio"):
            check_number(name, getattr(self, name), MAX_FACTOR)
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be at least 0 and below 1, got {self.warmup_ratio}")


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raise ValueError unless `value` is an integer from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {str(value)[:80]!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {number_text(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {number_text(value)}")


def check_number(name: str, value: Any, most: float) -> None:
    """Raise ValueError unless `value` is a finite number of at most `most`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {str(value)[:80]!r}")
    if not -math.inf < value <= most:
        raise ValueError(f"{name} must be a finite number of at most {most}, got {number_text(value)}")
