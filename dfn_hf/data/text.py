"""Users' own text as a dataset of documents."""

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
    """A file and its state, so that the cache of `datasets` never serves the text of an older one."""

    path: str
    size: int
    modified: int


def load_text(
    path: str | os.PathLike[str], *, text_field: str = "text", streaming: bool = False
) -> Dataset | IterableDataset:
    """The documents of a file or of all files below a folder.

    A file of JSON Lines (.jsonl, .ndjson) has one document per line, any other file is one document. Of a folder, the
    text (.txt, .text, .md) and JSON Lines files are read, hidden ones left out, in the order of their paths. Files may
    be compressed (.gz, .bz2, .xz). Blank documents are left out.

    Args:
        path: file or folder, UTF-8.
        text_field: the field of each JSON line that holds the text.
        streaming: read while iterating, and keep nothing: for text larger than the disk cache should hold.

    Returns:
        A dataset with the string column `text`.

    Raises:
        ValueError: nothing is there, it holds no text, or a file is not UTF-8 or not JSON Lines with that field.
    """
    files = text_files(Path(path))
    if next(read_documents(files, text_field), None) is None:
        raise ValueError(f"{os.fspath(path)} holds no text: give a file or folder with at least one word in it")
    arguments = {"files": files, "text_field": text_field}
    if streaming:
        return IterableDataset.from_generator(read_documents, features=FEATURES, gen_kwargs=arguments)
    try:
        return Dataset.from_generator(read_documents, features=FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def text_files(path: Path) -> list[TextFile]:
    """`path` itself, or the text files below it.

    Raises:
        ValueError: there is no such file or folder, or no text file in the folder.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and is_text_below(path, file))
        if not found:
            suffixes = ", ".join(TEXT_SUFFIXES + JSON_LINES_SUFFIXES)
            raise ValueError(f"the folder {path} holds no text file ({suffixes}): add one, or name a file itself")
    elif path.is_file():
        found = [path]
    else:
        raise ValueError(f"there is no file or folder {path}: check the path")
    return [TextFile(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def is_text_below(folder: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and format_suffix(file) in TEXT_SUFFIXES + JSON_LINES_SUFFIXES


def format_suffix(file: Path) -> str:
    """The suffix that tells the format: of `corpus.jsonl.xz` it is `.jsonl`."""
    return (file.with_suffix("") if file.suffix in COMPRESSED_SUFFIXES else file).suffix


def read_documents(files: list[TextFile], text_field: str) -> Iterator[dict[str, str]]:
    for path, *_ in files:
        documents = json_lines(path, text_field) if format_suffix(Path(path)) in JSON_LINES_SUFFIXES else whole(path)
        try:
            for text in documents:
                if text.strip():
                    yield {"text": text}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first") from error


def whole(path: str) -> Iterator[str]:
    with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
        yield file.read()


def json_lines(path: str, text_field: str) -> Iterator[str]:
    for number, record in json_records(path):
        if not isinstance(record.get(text_field), str):
            raise ValueError(
                f"{path}, line {number} has no text in the field {text_field!r} (its fields: {', '.join(record)}): "
                "name the field that holds the text"
            )
        yield record[text_field]


def json_records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the object of each line of a file of JSON Lines, blank ones left out.

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
                raise ValueError(f"{path}, line {number} has no text, for it has no fields: write one object per line")
            yield number, record
