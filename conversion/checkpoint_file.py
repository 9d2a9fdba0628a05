"""Checkpoint files as the originals write them: a dictionary of tensors, bare or beside other things."""

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
REFUSED = re.compile(r"(?:GLOBAL|class) ([\w.]+)")  # torch's words
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class CheckpointFile:
    """What a checkpoint file holds.

    Attributes:
        path: the file.
        tensors: by the original's key, mapped from the file where its format allows.
        prefix: what wrappers put before every key in the file; not part of the keys here.
        settings: the file's `config`, or nothing.
        vocabulary: the file's `stoi`, or nothing.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor]
    prefix: str
    settings: Mapping[str, Any]
    vocabulary: Mapping[str, int]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the numbers have."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    def reopened(self) -> "CheckpointFile":
        """The same file mapped afresh: pages read so far stop counting as memory once this one is dropped."""
        return read_checkpoint(self.path)


def read_checkpoint(path: Path) -> CheckpointFile:
    """Read a native checkpoint without running any code in it.

    Raises:
        ValueError: no such file; it is truncated, no checkpoint, or would run code; or a tensor is not a plain
            floating-point one. The message names the file or the key.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the checkpoint file in it, or for a Llama's folder --from llama")
    if not path.is_file():
        raise ValueError(
            f"{path} is no file: give a checkpoint that the original saved (.pt, .pth, .bin, .safetensors), or "
            "--from llama with a Hub id"
        )
    content = _load(path)
    weights = next((content[key] for key in WEIGHTS_KEYS if isinstance(content.get(key), Mapping)), None)
    settings, vocabulary = (_mapping(content, key) if weights is not None else {} for key in ("config", "stoi"))
    tensors = content if weights is None else weights
    if not tensors or not all(isinstance(key, str) for key in tensors):
        raise ValueError(
            f"{path} holds no weights: a dictionary of named tensors is wanted, or one under {WEIGHTS_KEYS}"
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
            mapped = file.read(2) == b"PK"  # torch's zip format; files of torch before 1.6 are read whole
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # of pickle's version
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        refused = REFUSED.search(str(error))
        if refused is None:
            raise ValueError(damaged(path, error)) from error
        raise ValueError(
            f"{path} asks to call {refused.group(1)}, and is not loaded because that could run code: save it again "
            "with tensors and plain values alone"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in whichever part of the reader it meets first
        raise ValueError(damaged(path, error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, no dictionary of tensors: save its state_dict")
    return content


def damaged(path: Path, error: Exception) -> str:
    """What to say of a file that its reader fails on, with the reader's own first line."""
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{path} is damaged or no checkpoint ({reason}): copy or save it again"


def check_tensor(path: Path, key: str, tensor: Any) -> None:
    """Raise ValueError unless `tensor` is a plain floating-point tensor with storage of its own size."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{path}: {key!r} is a {type(tensor).__name__}, no tensor: save the state_dict alone")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in FLOATS:
        raise ValueError(f"{path}: {key!r} has dtype {tensor.dtype}, layout {tensor.layout}: dense floats are wanted")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: {key!r} of shape {tuple(tensor.shape)} is larger than what the file holds of it")


def common_prefix(keys: Iterable[str]) -> str:
    """Wrappers' prefixes that every key starts with."""
    shared = os.path.commonprefix(list(keys))
    found = ""
    while wrapper := next((one for one in WRAPPERS if shared[len(found) :].startswith(one)), None):
        found += wrapper
    return found
