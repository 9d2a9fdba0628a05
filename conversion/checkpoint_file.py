"""Reading of checkpoint files of the originals: a dictionary of tensors, alone or together with other entries."""

import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

WEIGHTS_KEYS = ("model_state_dict", "state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.", "base_model.")  # of DDP, torch.compile, CUDAOptimizedFlowNetwork
UNSAFE_GLOBAL = re.compile(r"(?:GLOBAL|class) ([\w.]+)")  # in torch's error messages
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
    if not path.is_file():
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
    prefix = common_prefix(tensors)
    tensors = {key.removeprefix(prefix): tensor.detach() for key, tensor in tensors.items()}
    return CheckpointFile(path, tensors, prefix, settings, vocabulary)


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _load(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            mapped = file.read(2) == b"PK"  # zip format; files of torch < 1.6 cannot be mapped
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # about the pickle version
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        unsafe = UNSAFE_GLOBAL.search(str(error))
        if unsafe is None:
            raise ValueError(damaged_message(path, error)) from error
        raise ValueError(
            f"{path} refers to {unsafe.group(1)}, which could run code: save it again with only tensors and "
            "plain values"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise ValueError(damaged_message(path, error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} contains a {type(content).__name__} instead of a dictionary of tensors: save the state_dict"
        )
    return content


def damaged_message(path: Path, error: Exception) -> str:
    """Return the error message for a file that its reader rejects, with the first line of the reader's error."""
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{path} is damaged or not a checkpoint ({reason}): copy or save it again"


def check_tensor(path: Path, key: str, tensor: Any) -> None:
    """Raise `ValueError` unless `tensor` is a dense floating-point tensor with complete storage."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{path}: {key!r} is a {type(tensor).__name__}, not a tensor: save only the state_dict")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in FLOATS:
        raise ValueError(f"{path}: {key!r} has dtype {tensor.dtype} and layout {tensor.layout}: save dense floats")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{path}: {key!r} of shape {tuple(tensor.shape)} is larger than its data in the file: save it again"
        )


def common_prefix(keys: Iterable[str]) -> str:
    """Return the longest sequence of wrapper prefixes that every key starts with."""
    shared = os.path.commonprefix(list(keys))
    found = ""
    while wrapper := next((prefix for prefix in WRAPPERS if shared[len(found) :].startswith(prefix)), None):
        found += wrapper
    return found
