"""Loads a user's text files as a dataset of documents."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError

TEXT_SUFFIXES = (".md", ".text", ".txt")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = (".bz2", ".gz", ".xz")

FEATURES = Features({"text": Value("large_string")})


class TextFile(NamedTuple):
    """A file with its size and modification time, so that the cache of `datasets` misses if the file has changed."""

    path: str
    size: int
    modified: int


def load_text(
    path: str | os.PathLike[str], *, text_field: str = "text", streaming: bool = False
) -> Dataset | IterableDataset:
    """Load documents from a file, or from all text files in a folder.

    A JSON Lines file (.jsonl, .ndjson) has one document per line; any other file is one document. A folder is searched
    recursively for text files (.txt, .text, .md) and JSON Lines files, sorted by path; hidden files are skipped. Files
    may be compressed (.gz, .bz2, .xz). Blank documents are skipped.

    Args:
        path: UTF-8 file or folder.
        text_field: field of a JSON line that holds the text.
        streaming: read the files during iteration, without a copy in the cache of `datasets`.

    Returns:
        A dataset with the string column `text`.

    Raises:
        ValueError: `path` does not exist or holds no text, or a file is not UTF-8 or not JSON Lines with `text_field`.
    """
    files = text_files(Path(path))
    if next(read_documents(files, text_field), None) is None:
        raise ValueError(f"{os.fspath(path)} holds no text: give a file or folder with at least one word")
    arguments = {"files": files, "text_field": text_field}
    if streaming:
        return IterableDataset.from_generator(read_documents, features=FEATURES, gen_kwargs=arguments)
    try:
        return Dataset.from_generator(read_documents, features=FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def text_files(path: Path) -> list[TextFile]:
    """List the file at `path`, or the text files in the folder at `path`, sorted by path.

    Raises:
        ValueError: `path` does not exist, or the folder holds no text file.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and is_text_below(path, file))
        if not found:
            suffixes = ", ".join(TEXT_SUFFIXES + JSON_LINES_SUFFIXES)
            raise ValueError(f"the folder {path} holds no text file ({suffixes}): add one, or give the path of a file")
    elif path.is_file():
        found = [path]
    else:
        raise ValueError(f"there is no file or folder {path}: check the path")
    return [TextFile(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def is_text_below(folder: Path, file: Path) -> bool:
    """Whether `file` has a text or JSON Lines suffix and is not hidden below `folder`."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and format_suffix(file) in TEXT_SUFFIXES + JSON_LINES_SUFFIXES


def format_suffix(file: Path) -> str:
    """Return the suffix without compression: `.jsonl` for `corpus.jsonl.xz`."""
    return (file.with_suffix("") if file.suffix in COMPRESSED_SUFFIXES else file).suffix


def read_documents(files: list[TextFile], text_field: str) -> Iterator[dict[str, str]]:
    """Yield the non-blank documents of `files` as `{"text": …}`."""
    for path, *_ in files:
        documents = (
            json_lines(path, text_field) if format_suffix(Path(path)) in JSON_LINES_SUFFIXES else read_file(path)
        )
        try:
            for text in documents:
                if text.strip():
                    yield {"text": text}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}): convert it to UTF-8") from error


def read_file(path: str) -> Iterator[str]:
    """Yield the text of a file as one document."""
    with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
        yield file.read()


def json_lines(path: str, text_field: str) -> Iterator[str]:
    """Yield the text of each JSON line."""
    for number, record in json_records(path):
        if not isinstance(record.get(text_field), str):
            raise ValueError(
                f"{path}, line {number} has no text in the field {text_field!r} (its fields: {', '.join(record)}): "
                "set text_field (--text-field)"
            )
        yield record[text_field]


def json_records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object of each line of a JSON Lines file; blank lines are skipped.

    Raises:
        ValueError: a line is not a JSON object.
    """
    with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}): write one object per line") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object: write one object per line")
            yield number, record
