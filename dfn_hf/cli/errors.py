"""Errors that a user can correct, printed on one line."""

import sys

from ..extras import missing_extra

# Classes that libraries raise for a user's mistake, by the module that defines them. A module that is not imported
# has raised nothing, so it is not imported here either.
LIBRARY_ERRORS = {
    "torch": "OutOfMemoryError",
    "safetensors": "SafetensorError",
    "huggingface_hub.errors": "StrictDataclassError",
}


def refuse(mistaken: bool, message: str) -> None:
    """Raise ValueError with `message` if `mistaken`."""
    if mistaken:
        raise ValueError(message)


def is_user_error(error: Exception) -> bool:
    """Whether the user can correct it: a wrong value, a file, the network, memory, the disk or a missing extra."""
    if isinstance(error, ValueError | OSError | MemoryError):
        return True
    if isinstance(error, ImportError):
        return missing_extra(error) is not None
    return any(
        isinstance(error, getattr(sys.modules[module], name))
        for module, name in LIBRARY_ERRORS.items()
        if module in sys.modules
    )


def one_line(error: Exception) -> str:
    """The message of `error` on one line; for a configuration error, the message of the check that failed."""
    if isinstance(error, ImportError):
        return missing_extra(error) or str(error)
    if type(error).__name__.startswith("StrictDataclass") and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
