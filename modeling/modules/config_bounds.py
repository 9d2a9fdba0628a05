"""Bounds of the numbers in a configuration, so that a wrong one is refused before anything is allocated."""

import math
from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

# Limits far above any model that fits on one machine. Few layers are allowed, because each is built as a module even
# without storage.
MAX_LAYERS = 2**10
MAX_VOCABULARY = 2**28
MAX_WIDTH = 2**20
MAX_LENGTH = 2**31  # tokens
MAX_WINDOW = 2**16  # tokens, taps or slots of one operation
MAX_FACTOR = 2**20
MAX_TOKEN_ID = 2**31
MAX_ROPE_NUMBER = 2**50
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


def check_bounds(config: PreTrainedConfig, bounds: Mapping[str, tuple[int, int]]) -> None:
    """Raise `ValueError` for a field below its minimum, above its maximum or not finite; None is accepted.

    Args:
        config: the configuration.
        bounds: minimum and maximum of each field.
    """
    for field, (least, most) in bounds.items():
        value = getattr(config, field)
        if value is None or least <= value <= most:
            continue
        if most < value < math.inf:
            raise ValueError(f"`{field}` must be at most {most}, got {number_text(value)}.")
        rule = "finite and not negative" if least == 0 else f"at least {least}"
        raise ValueError(f"`{field}` must be {rule}, got {number_text(value)}.")


def check_rope_parameters(parameters: Mapping[str, Any] | None) -> None:
    """Raise `ValueError` for an unknown type of rotary embedding, and for a parameter that is not a finite number."""
    for name, value in (parameters or {}).items():
        if name in ("rope_type", "type"):
            if value not in ROPE_TYPES:
                raise ValueError(f"`rope_parameters` sets {name} to {value!r}: use one of {', '.join(ROPE_TYPES)}.")
            continue
        if value is None and name not in ("rope_theta", "factor"):
            continue
        for number in value if isinstance(value, list) and name.endswith("_factor") else [value]:
            if not isinstance(number, int | float):
                raise ValueError(f"`rope_parameters` sets {name} to {number!r}, which must be a number.")
            if not -MAX_ROPE_NUMBER <= number <= MAX_ROPE_NUMBER:
                raise ValueError(
                    f"`rope_parameters` sets {name} to {number_text(number)}, which must be finite and at most "
                    f"{MAX_ROPE_NUMBER}."
                )


def number_text(value: float) -> str:
    """Return a number as text; an integer with more than 30 digits as a power of ten."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"about {'-' if value < 0 else ''}10^{int(value.bit_length() * math.log10(2))}"
    return str(value)
