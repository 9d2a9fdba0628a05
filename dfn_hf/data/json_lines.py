"""Reads JSON Lines. Every error names the file and the line."""

import json
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from .files import open_text

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
MAX_NAMES = 10  # field names in an error


def json_records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object of each line of a JSON Lines file; blank lines are skipped.

    Raises:
        ValueError: a line is not a JSON object; or see `open_text`.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except RecursionError as error:
                raise ValueError(f"{path}, line {number} nests too deeply: write one flat object per line") from error
            except ValueError as error:  # also an integer with thousands of digits
                raise ValueError(f"{path}, line {number} is not JSON ({error}): write one object per line") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object: write one object per line")
            yield number, record


def text_of(record: Mapping[str, Any], name: str, place: str, remedy: str) -> str:
    """Return the text in the field `name` of a JSON object.

    Args:
        record: the object.
        name: name of the field.
        place: file and line, for errors.
        remedy: what to do if there is no such field.

    Raises:
        ValueError: there is no such field, it holds no string, or the string contains a lone surrogate.
    """
    if name not in record:
        raise ValueError(f"{place} has no field {name!r}, only {field_names(record)}: {remedy}")
    text = record[name]
    if not isinstance(text, str):
        raise ValueError(f"{place}: the field {name!r} is {reprlib.repr(text)}: give a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = f"\\u{ord(text[error.start]):04x}"
            raise ValueError(
                f"{place}: the field {name!r} contains {lone}, a lone surrogate: remove it or write the pair"
            ) from error
    return text


def field_names(record: Mapping[str, Any]) -> str:
    """The first field names of a JSON object, for errors."""
    names = [reprlib.repr(name) for name in list(record)[:MAX_NAMES]] or ["{}"]
    return ", ".join([*names, "…"] if len(record) > MAX_NAMES else names)
