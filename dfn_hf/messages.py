"""The text of an exception on one line. Imports the standard library only."""

import math

from .extras import missing_extra

MAX_LENGTH = 1200


def message_of(error: BaseException) -> str:
    """Return the message of `error` on one line, see `one_line`.

    A configuration error of huggingface_hub gives the message of the check that failed, and a missing optional package
    gives the command that installs it.
    """
    if isinstance(error, ImportError):
        return missing_extra(error) or str(error)
    if type(error).__name__.startswith("StrictDataclass") and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """Put a text on one line, escape characters that are not printable, and truncate it to `MAX_LENGTH` characters."""
    text = " ".join(text[: 2 * MAX_LENGTH].split())
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]} …"


def number_text(value: float) -> str:
    """Return a number as text; an integer with more than 30 digits as a power of ten."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"about {'-' if value < 0 else ''}10^{int(value.bit_length() * math.log10(2))}"
    return str(value)
