"""Turns the exceptions of libraries that load a part of a model into one sentence that names the part."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..extras import missing_extra
from ..messages import message_of
from .model_files import REMEDY

# Words in messages of libraries that advise something unsafe: running the code of a folder, unpickling objects.
REMOTE_CODE_ADVICE = "trust_remote_code"
RUST_PANIC = "PanicException"
PICKLE_ADVICE = ("weights_only", "WeightsUnpickler", "Unsupported operand")


@contextmanager
def explain_damage(part: str | Callable[[], str]) -> Iterator[None]:
    """Raise any error of a library about `part` as a ValueError, except an `OSError` and a lack of memory.

    Tokenizers and transformers raise exceptions of every class for damaged files. A panic of Rust does not derive from
    `Exception`.

    Args:
        part: the file or the files that are loaded; a function is called when there is an error.

    Raises:
        ValueError: the library has raised an error; the message names `part`.
        MemoryError: there is not enough memory.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
            raise
        if isinstance(error, ImportError) and missing_extra(error) is not None:
            raise
        name = part if isinstance(part, str) else part()
        if "allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError":
            raise MemoryError(f"there is not enough memory for {name}: {message_of(error)}") from error
        raise ValueError(damage(name, error)) from error


def damage(part: str, error: BaseException) -> str:
    """Return one sentence about an error of loading `part`, without unsafe advice of libraries."""
    message = message_of(error)
    if REMOTE_CODE_ADVICE in message:
        return (
            f"{part} needs Python code that dfn-hf does not run: use a model of a family that dfn-hf or transformers "
            "supports"
        )
    if any(advice in message for advice in PICKLE_ADVICE):
        return (
            f"{part} is damaged or holds objects other than tensors, which dfn-hf does not load: save the model again "
            "with save_pretrained, or download it again"
        )
    if isinstance(error, RecursionError):
        message = "its JSON is nested too deeply"
    elif not isinstance(error, ValueError):
        message = f"{type(error).__name__}: {message}"
    return f"{part} is damaged or not supported ({message}): {REMEDY}"


@contextmanager
def explain_hub_errors(path: str) -> Iterator[None]:
    """Raise an OSError for a path that is no local folder as a ValueError that names both places that were tried."""
    try:
        yield
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise ValueError(f"there is no folder {path}, and the Hub does not provide it: {message_of(error)}") from error
