"""Finds and reads the JSON files of a saved model."""

import json
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

REMEDY = "save, copy or download it again"


def find_file(path: str, name: str, *, optional: bool = False) -> Path | None:
    """Return the file `name` of a folder, or of a Hub id after downloading it; None if there is none.

    Args:
        path: a folder or a Hub id.
        name: name of the file.
        optional: also return None if the Hub cannot be reached.

    Raises:
        OSError: the Hub does not provide `path`.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    found = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=not optional
    )
    return None if found is None else Path(found)


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        ValueError: the content is not a JSON object; the message names the file.
        OSError: the file cannot be read.
    """
    try:
        value = json.loads(file.read_bytes())
    except RecursionError:
        raise ValueError(f"{file} is damaged: its JSON is nested too deeply; {REMEDY}") from None
    except ValueError as error:  # invalid UTF-8, invalid JSON, or a number with thousands of digits
        reason = "it is empty" if not file.stat().st_size else f"it is not valid JSON ({error})"
        raise ValueError(f"{file} is damaged: {reason}; {REMEDY}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(value).__name__}, not a JSON object; {REMEDY}")
    return value
