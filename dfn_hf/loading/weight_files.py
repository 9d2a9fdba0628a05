"""The weight files of a saved model: their names, and the names, shapes and types of the tensors in their headers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, logging

from ..storage.manifest import agrees, read_manifest
from .errors import explain_damage
from .model_files import REMEDY, find_file, read_json_object

logger = logging.get_logger(__name__)

# The order in which transformers looks for weights.
FILE_NAMES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


@dataclass(frozen=True)
class Header:
    """Entry of a tensor in the header of a weight file.

    Attributes:
        shape: shape of the tensor.
        is_float: whether its numbers are real floating-point numbers.
    """

    shape: tuple[int, ...]
    is_float: bool


def weight_files(path: str, explicit: str | None = None) -> list[Path]:
    """Return the weight files of a folder or of a Hub id, downloaded; an empty list if there is none.

    Args:
        path: a folder or a Hub id.
        explicit: name of the file that the configuration gives (`transformers_weights`), or None.

    Raises:
        ValueError: the index of the shards is damaged, or names a file that is missing or outside the folder.
    """
    for name in FILE_NAMES if explicit is None else (explicit,):
        check_file_name(name, f"{path}/config.json")
        file = find_file(path, name)
        if file is not None:
            return [file] if not name.endswith(".index.json") else shards(path, file)
    return []


def shards(path: str, index: Path) -> list[Path]:
    """Return the files that an index names.

    Raises:
        ValueError: the index is damaged, or names a file that is missing or outside the folder.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} is damaged: its weight_map does not map names of weights to files; {REMEDY}")
    if not isinstance(read_json_object(index).get("metadata"), dict):
        raise ValueError(f"{index} is damaged: it has no metadata; {REMEDY}")
    files = []
    for name in sorted(set(weight_map.values())):
        check_file_name(name, str(index))
        file = find_file(path, name)
        if file is None:
            raise ValueError(f"{index} names the file {name!r}, which is missing: copy or download the model again")
        files.append(file)
    return files


def check_file_name(name: Any, where: str) -> None:
    """Raise ValueError unless `name` is the name of a weight file, without folders."""
    if not isinstance(name, str) or name != Path(name).name or not name.endswith((".safetensors", ".bin", ".json")):
        raise ValueError(
            f"{where} names {str(name)[:80]!r} as weights: only .safetensors and .bin files beside it are read"
        )


def warn_about_changes(path: str, files: list[Path]) -> None:
    """Log a warning for each weight file that differs from its record in the manifest of the folder.

    Args:
        path: a folder, or a Hub id, which has no manifest.
        files: the weight files of the model.
    """
    records = read_manifest(Path(path)) or {}
    for file in files:
        if file.name in records and not agrees(file.resolve(), records[file.name]):
            logger.warning(
                f"{file} has changed since dfn-hf wrote it: if you did not change it, copy or download the model again"
            )


def read_headers(files: list[Path]) -> dict[str, Header]:
    """Return the tensors of weight files by name, without reading the numbers of safetensors files.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    headers: dict[str, Header] = {}
    for file in files:
        with explain_damage(str(file)):
            headers |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    return headers


def _read_safetensors(file: Path) -> dict[str, Header]:
    with safe_open(file, "pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        return {
            name: Header(tuple(part.get_shape()), part.get_dtype().startswith(("F", "BF")))
            for name, part in slices.items()
        }


def _read_pickle(file: Path) -> dict[str, Header]:
    tensors = torch.load(file, map_location="meta", weights_only=True)
    return {name: Header(tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in tensors.items()}
