"""Chooses the implementation of the neighbour search and of flow attention: C, Triton or torch.

- C runs on CPUs where a C compiler is installed: the search, and attention in float32.
- Triton runs on GPUs with compute capability 8.0 or higher and on AMD GPUs, for sizes that fit its registers.
- torch runs everywhere else, and everywhere if the environment variable `DFN_HF_KERNELS` is 0.

Each choice is logged once with its reason, at level INFO; a missing compiler or a missing Triton at level WARNING.
"""

from functools import cache

import torch
from transformers.utils import logging

from .box_tree import TreeIndex
from .kernels.box_tree_cpu import tree_library
from .kernels.c_compiler import SWITCH, kernels_enabled
from .kernels.flow_attention_cpu import attention_library

logger = logging.get_logger(__name__)

MIN_CAPABILITY = (8, 0)  # compute capability of an NVIDIA GPU
MAX_TRITON_FEATURES = 256  # per entity: its vectors stay in registers
MAX_TRITON_OFFSET = 2**31 - 1  # offsets within a row are int32
BACKEND_NAMES = {"c": "C", "triton": "Triton", "torch": "torch operations"}


def search_backend(query: torch.Tensor, index: TreeIndex | None) -> str:
    """Choose how `search_tree` searches.

    Args:
        query: int16 `[G, M, P]`.
        index: the trees, or None. Their layout decides on a CPU, where C and torch have different ones.

    Returns:
        "c", "triton" or "torch".

    Raises:
        RuntimeError: the index was filled in C, which no longer runs.
    """
    library = tree_library(query)
    if index is not None and index.pages is not None and library is None:
        raise RuntimeError(
            f"The cache was filled by the C code, which does not run now ({SWITCH} is 0, or the device is "
            f"{query.device}): start with an empty cache."
        )
    if library is not None and (index is None or index.pages is not None):
        return _log_choice("the neighbour search", "c", query)
    if can_use_triton_search(query):
        return _log_choice("the neighbour search", "triton", query)
    return _log_choice("the neighbour search", "torch", query)


def attention_backend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, dropout: float
) -> str:
    """Choose how `flow_attention` runs, forward and backward; the arguments are those of `flow_attention`.

    Returns:
        "c", "triton" or "torch".
    """
    if dropout == 0 and can_use_triton_attention(query, key, value, decay):
        return _log_choice("flow attention", "triton", query)
    if dropout == 0 and attention_library(query, key, value, decay) is not None:
        return _log_choice("flow attention", "c", query)
    return _log_choice("flow attention", "torch", query)


def is_decode_step(state, x: torch.Tensor) -> bool:
    """Return whether a call runs `attention_step`, torch operations of fixed shape for one query.

    It runs where a step is compiled or on a GPU. An uncompiled step on a CPU runs the general form, in C if it can.

    Args:
        state: the layer's cache (`FlowCacheLayer`), or None.
        x: `[B, H, M, features]`.
    """
    in_fixed_shape = state is not None and state.is_compileable and x.shape[2] == 1
    return in_fixed_shape and (torch.compiler.is_compiling() or x.device.type != "cpu")


def can_use_triton_search(query: torch.Tensor) -> bool:
    """Return whether the Triton kernels support a search of positions `[G, M, P]`."""
    length, position_dim = query.shape[-2:]
    return length * position_dim <= MAX_TRITON_OFFSET and triton_available(query.device)


def can_use_triton_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor) -> bool:
    """Return whether the Triton kernels support `flow_attention` of these tensors, without dropout.

    `query`, `key` and `decay` must be float32; `value` may also be bfloat16 or float16.
    """
    fits = query.dtype == key.dtype == decay.dtype == torch.float32 and query.numel() > 0
    fits = fits and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return fits and max(query.shape[-1], value.shape[-1]) <= MAX_TRITON_FEATURES and triton_available(query.device)


def triton_available(device: torch.device) -> bool:
    """Return whether Triton kernels can run on `device`."""
    return device.type == "cuda" and kernels_enabled() and _can_run(device)


@cache
def _can_run(device: torch.device) -> bool:
    """Return whether the device and the installation support Triton; log the reason once if not."""
    obstacle = _obstacle(device)
    if obstacle is not None:
        logger.warning(f"{obstacle} {device} uses torch operations instead, which are slower.")
    return obstacle is None


def _obstacle(device: torch.device) -> str | None:
    """Return why Triton cannot run on a GPU, as a sentence; None if it can."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"Triton needs compute capability {'.'.join(map(str, MIN_CAPABILITY))}."
    try:
        from .kernels.triton_launch import search_tree_triton  # noqa: F401 - tests whether the import works
    except ImportError as error:
        return f"Triton cannot be imported ({error})."
    return None


def _log_choice(operation: str, backend: str, x: torch.Tensor) -> str:
    """Return `backend`, after logging it once with its reason."""
    if not torch.compiler.is_compiling():
        _log_once(operation, backend, x.device.type, _torch_reason(x.device) if backend == "torch" else "")
    return backend


@cache
def _log_once(operation: str, backend: str, device: str, reason: str) -> None:
    logger.info(f"On {device}, {operation} runs in {BACKEND_NAMES[backend]}{reason}.")


def _torch_reason(device: torch.device) -> str:
    """Return why torch operations run on `device`, as the end of a sentence."""
    if not kernels_enabled():
        return f": {SWITCH} is 0"
    if device.type not in ("cpu", "cuda"):
        return ": no kernels exist for this device"
    if device.type == "cuda" and not triton_available(device):
        return ": Triton is not available"
    if device.type == "cpu" and tree_library(torch.empty(0, device=device, dtype=torch.int16)) is None:
        return ": the C code could not be compiled"
    return ": the kernels do not support the dtype, the sizes or an option of this call"


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
