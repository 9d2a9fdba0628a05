"""Chooses the implementation of the neighbour search and of flow attention: C, Triton or torch.

- C runs on CPUs, in float32, where a C compiler is installed.
- Triton runs on GPUs with compute capability 8.0 or higher and on AMD GPUs, for sizes that fit its registers.
- torch runs everywhere else, and everywhere if the environment variable `DFN_HF_KERNELS` is 0.

Each choice is logged once with its reason, at level INFO; a missing compiler or a missing Triton at level WARNING.
"""

from functools import cache

import torch
from transformers.utils import logging

from .custom_ops import use_custom_ops
from .kernels.c_compiler import SWITCH, kernels_enabled
from .kernels.flow_attention_cpu import attention_library
from .kernels.neighbor_search_cpu import MAX_CANDIDATES, MAX_NEIGHBORS, search_library

logger = logging.get_logger(__name__)

MIN_CAPABILITY = (8, 0)  # compute capability of an NVIDIA GPU
MAX_TRITON_CANDIDATES = 512  # per query: their codes stay in registers
MAX_TRITON_FEATURES = 256  # per entity: its vectors stay in registers
MAX_TRITON_OFFSET = 2**31 - 1  # offsets within a row are int32
BACKEND_NAMES = {"c": "C", "triton": "Triton", "torch": "torch operations"}


def cells_backend(positions: torch.Tensor, on_grid: bool) -> str:
    """Choose how `CellGrids.cells` computes cells.

    Args:
        positions: `[..., M, P]`.
        on_grid: whether all positions are multiples of the grid step. Only then do all backends give the same cells.

    Returns:
        "c", "triton" or "torch".
    """
    if not on_grid or use_custom_ops():
        return "torch"
    if search_library(positions) is not None:
        return _log_choice("cells", "c", positions)
    if can_use_triton_search(positions):
        return _log_choice("cells", "triton", positions)
    return _log_choice("cells", "torch", positions)


def search_backend(
    query_positions: torch.Tensor,
    query_index: torch.Tensor,
    num_tables: int,
    candidates_per_table: int,
    num_neighbors: int,
    *,
    addressed: bool,
    with_chains: bool,
) -> str:
    """Choose how `search_cells` searches.

    Args:
        query_positions: `[G, M, P]`.
        query_index: int64 `[G, M]`, position of each query in its row.
        addressed: whether cells are few enough to be numbered, positions lie on the grid and rows have no segments.
        with_chains: whether chains are kept between calls. Triton then searches only calls that start all rows.

    Returns:
        "c", "triton" or "torch".
    """
    fits = addressed and num_neighbors <= MAX_NEIGHBORS and candidates_per_table <= MAX_CANDIDATES
    if fits and search_library(query_positions) is not None:
        return _log_choice("the neighbour search", "c", query_positions)
    if addressed and can_use_triton_search(query_positions, num_tables, candidates_per_table):
        if not with_chains or (query_positions.shape[1] > 1 and bool((query_index[:, 0] == 0).all())):
            return _log_choice("the neighbour search", "triton", query_positions)
    return _log_choice("the neighbour search", "torch", query_positions)


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
    """Return whether a call runs `search_step` and `attention_step`, torch operations of fixed shape for one query.

    They run where a step is compiled or on a GPU. An uncompiled step on a CPU runs the general form, in C if it can.

    Args:
        state: the layer's cache (`FlowCacheLayer`), or None.
        x: `[B, H, M, features]`.
    """
    in_fixed_shape = state is not None and state.is_compileable and x.shape[2] == 1
    return in_fixed_shape and (torch.compiler.is_compiling() or x.device.type != "cpu")


def can_use_triton_search(positions: torch.Tensor, num_tables: int = 1, candidates_per_table: int = 1) -> bool:
    """Return whether the Triton kernels support a search of positions `[..., M, P]` that lie on the grid."""
    length, position_dim = positions.shape[-2:]
    fits = next_power_of_2(num_tables) * next_power_of_2(candidates_per_table) <= MAX_TRITON_CANDIDATES
    fits = fits and positions.dtype == torch.float32 and 0 < length * position_dim <= MAX_TRITON_OFFSET
    return fits and triton_available(positions.device)


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
        from .kernels.triton_launch import search_cells_triton  # noqa: F401 - tests whether the import works
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
    if device.type == "cpu" and search_library(torch.empty(0, device=device, dtype=torch.float32)) is None:
        return ": the C code could not be compiled"
    return ": the kernels do not support the dtype, the sizes or an option of this call"


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
