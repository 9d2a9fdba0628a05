"""When search and attention run in Triton: on GPUs that it is made for, with sizes that its programs hold.

Without Triton, on older GPUs and with `DFN_HF_KERNELS=0` torch does the work.
"""

from functools import cache

import torch
from transformers.utils import logging

from .kernels.c_compiler import kernels_enabled

logger = logging.get_logger(__name__)

MIN_CAPABILITY = (8, 0)  # of an NVIDIA GPU
MAX_TRITON_CANDIDATES = 512  # of a query: their codes are held in registers
MAX_TRITON_FEATURES = 256  # of an entity: likewise
MAX_TRITON_OFFSET = 2**31 - 1  # what offsets within a row reach


def can_use_triton_search(positions: torch.Tensor, num_tables: int = 1, candidates_per_table: int = 1) -> bool:
    """Whether cells and neighbours of positions on the grid, `[..., M, P]`, are found by the kernels."""
    length, position_dim = positions.shape[-2:]
    fits = next_power_of_2(num_tables) * next_power_of_2(candidates_per_table) <= MAX_TRITON_CANDIDATES
    fits = fits and positions.dtype == torch.float32 and 0 < length * position_dim <= MAX_TRITON_OFFSET
    return fits and triton_available(positions.device)


def can_use_triton_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fading: torch.Tensor
) -> bool:
    """Whether `flow_attention.flow_attention` without dropout runs in the kernels: in float32, but for values."""
    fits = query.dtype == key.dtype == fading.dtype == torch.float32 and query.numel() > 0
    fits = fits and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return fits and max(query.shape[-1], value.shape[-1]) <= MAX_TRITON_FEATURES and triton_available(query.device)


def triton_available(device: torch.device) -> bool:
    return device.type == "cuda" and kernels_enabled() and _can_run(device)


@cache
def _can_run(device: torch.device) -> bool:
    """The reason is logged once where it is no."""
    obstacle = _obstacle(device)
    if obstacle is not None:
        logger.warning(f"{obstacle} {device} goes on with torch operations, which are slower.")
    return obstacle is None


def _obstacle(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"Triton needs compute capability {'.'.join(map(str, MIN_CAPABILITY))}."
    try:
        from .kernels.triton_launch import search_cells_triton  # noqa: F401 - it is asked whether it can be imported
    except ImportError as error:
        return f"Triton cannot be imported ({error})."
    return None


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
