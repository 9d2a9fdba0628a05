"""Linear maps with special inputs."""

import torch
from torch import nn


def linear_in_weight_dtype(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Apply `linear` to `x` converted to the dtype of its weight, and return that dtype.

    For small maps whose outputs select entities or experts, and therefore need float32. A family lists them in
    `_keep_in_fp32_modules`: transformers keeps them in float32 when a model is loaded in float16, and bitsandbytes
    does not quantize them. torchao quantizes them like other linear maps.
    """
    return linear(x.to(linear.weight.dtype))


def linear_of_batch(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a linear map to `[B, ..., D]`, as `[B, tokens, D]`: PEFT may have an adapter for each row of the batch."""
    return linear(x.flatten(1, -2)).unflatten(1, x.shape[1:-1]) if x.dim() > 3 else linear(x)
