"""Small linear maps that decide: they stay in float32 where a model is loaded in float16, and are never quantized.

A family names them in `_keep_in_fp32_modules`, which transformers' loading and its quantizers go by.
"""

import torch
from torch import nn


def linear_in_weight_dtype(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`linear(x)` in the dtype of the map, whatever that of `x` is."""
    return linear(x.to(linear.weight.dtype))
