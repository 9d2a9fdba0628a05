"""Errors that a user can correct, printed on one line."""

import sys

# Classes that libraries raise for a user's mistake, by the module that defines them. A module that is not imported
# has raised nothing, so it is not imported here either.
LIBRARY_ERRORS = {
    "torch": "OutOfMemoryError",
    "safetensors": "SafetensorError",
    "huggingface_hub.errors": "StrictDataclassError",
}
# The extra of `pip install 'dfn-hf[...]'` that brings an optional package.
EXTRA_OF_PACKAGE = {
    "accelerate": "train",
    "datasets": "train",
    "fsspec": "train",
    "peft": "train",
    "matplotlib": "plot",
    "sacrebleu": "eval",
    "PIL": "fields",
    "skimage": "fields",
}


def refuse(mistaken: bool, message: str) -> None:
    """Raise ValueError with `message` if `mistaken`."""
    if mistaken:
        raise ValueError(message)


def is_user_error(error: Exception) -> bool:
    """Whether the user can correct it: a wrong value, a file, the network, memory, the disk or a missing extra."""
    if isinstance(error, ValueError | OSError | MemoryError):
        return True
    if isinstance(error, ModuleNotFoundError):
        return package_of(error) in EXTRA_OF_PACKAGE
    return any(
        isinstance(error, getattr(sys.modules[module], name))
        for module, name in LIBRARY_ERRORS.items()
        if module in sys.modules
    )


def one_line(error: Exception) -> str:
    """The message of `error` on one line; for a configuration error, the message of the check that failed."""
    if isinstance(error, ModuleNotFoundError):
        package = package_of(error)
        return f"this command needs {package}: pip install 'dfn-hf[{EXTRA_OF_PACKAGE[package]}]'"
    if type(error).__name__.startswith("StrictDataclass") and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def package_of(error: ModuleNotFoundError) -> str:
    """The top-level package that is missing."""
    return (error.name or "").partition(".")[0]
