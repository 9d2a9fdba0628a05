"""Where Triton kernels are used: on GPUs that they are made for, if Triton is installed."""

from functools import cache

import torch
from transformers.utils import logging

from .native_library import switched_on

logger = logging.get_logger(__name__)

LEAST_CAPABILITY = (8, 0)  # of an NVIDIA GPU: what Triton supports


def triton_runs_on(device: torch.device) -> bool:
    """Whether this device's tensors go to the kernels; not while native code is switched off."""
    return device.type == "cuda" and switched_on() and _can_run(device)


@cache
def _can_run(device: torch.device) -> bool:
    """The reason is logged once where it is no."""
    obstacle = _obstacle(device)
    if obstacle is not None:
        logger.warning(f"{obstacle} {device} goes on with torch operations, which are slower.")
    return obstacle is None


def _obstacle(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"Triton needs compute capability {'.'.join(map(str, LEAST_CAPABILITY))}."
    try:
        from .flow_kernels import FlowAttentionOnGPU  # noqa: F401 - what it imports is asked
    except ImportError as error:
        return f"Triton cannot be imported ({error})."
    return None
