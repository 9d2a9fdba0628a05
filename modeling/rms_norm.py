"""Root mean square layer normalisation."""

import torch
from torch import nn


class RMSNorm(nn.Module):
    """g ⊙ s · rsqrt(mean(s²) + ε), in at least float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (self.weight * normed).to(states.dtype)
