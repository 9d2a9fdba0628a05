"""Reading of checkpoint files of the originals: a dictionary of tensors, alone or together with other entries."""

import os
import re
import reprlib
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..data.files import damaged, explain_read_errors

WEIGHTS_KEYS = ("model_state_dict", "state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.", "base_model.")  # of DDP, torch.compile, CUDAOptimizedFlowNetwork
UNSAFE_GLOBAL = re.compile(r"(?:GLOBAL|class) ([\w.]+)")  # in torch's error messages
KIND = "a checkpoint"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class CheckpointFile:
    """Content of a checkpoint file.

    Attributes:
        path: the file.
        tensors: tensors by the original's key, memory-mapped if the file format allows it.
        prefix: prefix that wrappers added to every key in the file; `tensors` has the keys without it.
        settings: the file's `config`, or an empty mapping.
        vocabulary: the file's `stoi`, or an empty mapping.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor]
    prefix: str
    settings: Mapping[str, Any]
    vocabulary: Mapping[str, int]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the largest number of values."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    def reopen(self) -> "CheckpointFile":
        """Map the file again: pages read so far no longer count as memory once this object is dropped."""
        return read_checkpoint(self.path)


def read_checkpoint(path: Path) -> CheckpointFile:
    """Read an original checkpoint without executing code from it.

    Raises:
        ValueError: the file is missing, truncated, not a checkpoint, or would execute code; or a tensor is not a dense
            floating-point tensor. The message names the file or the key.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass the checkpoint file in it, or --from llama for a Llama folder")
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: pass a checkpoint file of the original (.pt, .pth, .bin, .safetensors), or a Hub "
            "id with --from llama"
        )
    content = _load(path)
    weights = next((content[key] for key in WEIGHTS_KEYS if isinstance(content.get(key), Mapping)), None)
    settings, vocabulary = (_mapping(content, key) if weights is not None else {} for key in ("config", "stoi"))
    tensors = content if weights is None else weights
    if not tensors or not all(isinstance(key, str) for key in tensors):
        raise ValueError(
            f"{path} contains no weights: save a dictionary of named tensors, alone or under one of {WEIGHTS_KEYS}"
        )
    for key, tensor in tensors.items():
        check_tensor(path, key, tensor)
    check_total_size(path, tensors)
    prefix = common_prefix(tensors)
    tensors = {key.removeprefix(prefix): tensor.detach() for key, tensor in tensors.items()}
    return CheckpointFile(path, tensors, prefix, settings, vocabulary)


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _load(path: Path) -> Mapping[str, Any]:
    try:
        with explain_read_errors(path, KIND):
            content = _load_tensors(path)
    except ValueError as error:
        message = str(error.__cause__)
        if "weights_only" not in message:
            raise
        # torch's message advises loading the file in a way that runs its code, so it is not passed on.
        unsafe = UNSAFE_GLOBAL.search(message)
        if unsafe is None:
            raise damaged(path, KIND, ValueError("it is not a pickle of tensors")) from error
        raise ValueError(
            f"{path} refers to {unsafe.group(1)}, which could run code: save it again with only tensors and "
            "plain values"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} contains a {type(content).__name__} instead of a dictionary of tensors: save the state_dict"
        )
    return content


def _load_tensors(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"  # zip format; files of torch < 1.6 cannot be mapped
    if mapped:
        check_archive(path)
    with warnings.catch_warnings(action="ignore"):  # about the pickle version
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def check_archive(path: Path) -> None:
    """Raise ValueError if a zip file holds compressed records: torch writes none, and they could fill the memory."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("it is a compressed zip file")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError("its records are larger than the file")


def check_tensor(path: Path, key: str, tensor: Any) -> None:
    """Raise `ValueError` unless `tensor` is a dense floating-point tensor with complete storage."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(
            f"{path}: {reprlib.repr(key)} is a {type(tensor).__name__}, not a tensor: save only the state_dict"
        )
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_nested or tensor.device.type != "cpu":
        raise ValueError(f"{path}: {reprlib.repr(key)} is a tensor without data in the file: save plain tensors")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in FLOATS:
        raise ValueError(
            f"{path}: {reprlib.repr(key)} has dtype {tensor.dtype} and layout {tensor.layout}: save dense floats"
        )
    if num_bytes(tensor) > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{path}: {reprlib.repr(key)} of shape {tuple(tensor.shape)} is larger than its data in the file: save it "
            "again"
        )


def check_total_size(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` if the tensors are more than twice as large as the file; tied weights may share data."""
    total, size = sum(map(num_bytes, tensors.values())), path.stat().st_size
    if total > 2 * size:
        raise ValueError(
            f"{path} has {size:,} bytes but its tensors have {total:,}: save it again with tensors that share no data"
        )


def num_bytes(tensor: torch.Tensor) -> int:
    """Return the number of bytes of the values of a tensor."""
    return tensor.numel() * tensor.element_size()


def common_prefix(keys: Iterable[str]) -> str:
    """Return the longest sequence of wrapper prefixes that every key starts with."""
    shared = os.path.commonprefix(list(keys))
    found = ""
    while wrapper := next((prefix for prefix in WRAPPERS if shared[len(found) :].startswith(prefix)), None):
        found += wrapper
    return found
