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
