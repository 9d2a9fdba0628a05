"""Loads a user's text files as a dataset of documents."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError

from .files import find_files, format_suffix, open_text
from .json_lines import JSON_LINES_SUFFIXES, json_records, text_of

TEXT_SUFFIXES = (".md", ".text", ".txt")
READ_CHARACTERS = 2**20

FEATURES = Features({"text": Value("large_string")})


class TextFile(NamedTuple):
    """A file with its size and times, so that the cache of `datasets` misses if the file has changed."""

    path: str
    size: int
    modified: int
    changed: int


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
        ValueError: `path` does not exist or holds no text, or a file cannot be read, is damaged, is not UTF-8, or is
            not JSON Lines with `text_field`. A stream raises it during iteration.
    """
    files = text_files(path)
    if next(read_documents(files, text_field), None) is None:
        raise ValueError(f"{os.fspath(path)} holds no text: give a file or folder with at least one word")
    arguments = {"files": files, "text_field": text_field}
    if streaming:
        return IterableDataset.from_generator(read_documents, features=FEATURES, gen_kwargs=arguments)
    try:
        return Dataset.from_generator(read_documents, features=FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def text_files(path: str | os.PathLike[str]) -> list[TextFile]:
    """List the file at `path`, or the text files in the folder at `path`; see `find_files`."""
    files = find_files(path, TEXT_SUFFIXES + JSON_LINES_SUFFIXES, "text")
    statuses = [file.stat() for file in files]
    return [
        TextFile(str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for file, status in zip(files, statuses, strict=True)
    ]


def read_documents(files: list[TextFile], text_field: str) -> Iterator[dict[str, str]]:
    """Yield the non-blank documents of `files` as `{"text": …}`."""
    for path, *_ in files:
        if format_suffix(Path(path)) in JSON_LINES_SUFFIXES:
            documents = json_texts(path, text_field)
        else:
            documents = iter([read_file(path)])
        for text in documents:
            if text.strip():
                yield {"text": text}


def read_file(path: str) -> str:
    """Read the text of a file.

    Raises:
        ValueError: see `open_text`; also if the text contains NUL, as binary files and UTF-16 do.
    """
    parts = []
    with open_text(path) as file:
        while part := file.read(READ_CHARACTERS):
            if "\0" in part:
                raise ValueError(f"{path} contains NUL characters and is not plain text: convert it to UTF-8 text")
            parts.append(part)
    return "".join(parts)


def json_texts(path: str, text_field: str) -> Iterator[str]:
    """Yield the text of each JSON line."""
    for number, record in json_records(path):
        yield text_of(record, text_field, f"{path}, line {number}", "set text_field (--text-field)")
