"""Small linear maps whose outputs select entities or experts, and therefore need float32.

A family lists them in `_keep_in_fp32_modules`: transformers keeps them in float32 when a model is loaded in float16,
and bitsandbytes does not quantize them. torchao quantizes them like other linear maps.
"""

import torch
from torch import nn


def linear_in_weight_dtype(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Apply `linear` to `x` converted to the dtype of its weight, and return that dtype."""
    return linear(x.to(linear.weight.dtype))
