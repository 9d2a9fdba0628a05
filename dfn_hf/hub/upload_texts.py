"""Reads the text files of a model folder and removes local paths from them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..loading.model_files import read_json_object
from .private_paths import find_private_path, without_paths

ADAPTER_CONFIG, ADAPTER_CARD = "adapter/adapter_config.json", "adapter/README.md"
BASE = "base_model_name_or_path"


def clean_configs(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Return the new contents of the JSON files that hold local paths in the fields for models and files.

    Raises:
        ValueError: a file is not a JSON object, or contains a local path in another field.
    """
    changed: dict[str, bytes] = {}
    for name in names:
        value = read_json_object(folder / name)
        clean = without_paths(value)
        text = json.dumps(clean, indent=2, ensure_ascii=False)
        refuse_private_paths(folder, name, text)
        if clean != value:
            changed[name] = f"{text}\n".encode()
    return changed


def clean_texts(folder: Path, names: Iterable[str], configs: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the new content of the card of an adapter whose base model has another name in `configs`.

    Args:
        names: text files of `folder`.
        configs: result of `clean_configs`.

    Raises:
        ValueError: a file is not UTF-8, or contains a local path.
    """
    changed: dict[str, bytes] = {}
    for name in names:
        text = read_text(folder, name)
        if name == ADAPTER_CARD and ADAPTER_CONFIG in configs:
            path = read_json_object(folder / ADAPTER_CONFIG).get(BASE)
            if isinstance(path, str) and path in text:
                text = text.replace(path, json.loads(configs[ADAPTER_CONFIG])[BASE])
                changed[name] = text.encode()
        refuse_private_paths(folder, name, text)
    return changed


def refuse_private_paths(folder: Path, name: str, text: str) -> None:
    """Raise ValueError if the text of a file contains a path in the home folder or beside `folder`."""
    private = find_private_path(text, folder)
    if private is not None:
        raise ValueError(f"{folder / name} contains the local path {private}: remove it from the file")


def read_text(folder: Path, name: str) -> str:
    """Return the text of a file; ValueError if it is not UTF-8."""
    try:
        return (folder / name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / name} is not UTF-8 text ({error}): save it as UTF-8") from error
