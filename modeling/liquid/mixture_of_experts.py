"""A mixture of experts whose number per token follows the router's doubt (Liquid, §3.4).

Shape letters: B batch, M entities of this call, m experts, D features.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations import use_experts_implementation

from ..modules.linear import linear_in_weight_dtype
from ..modules.row_layout import RowLayout
from ..ops.chunking import apply_chunked


@dataclass
class Routing:
    """How a layer's router decided.

    Attributes:
        logits: `[B, M, m]`, in at least float32.
        index: int64 `[B, M, columns]`, experts from the most probable on.
        weights: `[B, M, columns]`, 0 for those that are not used.
    """

    logits: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


@use_experts_implementation(has_bias=True, has_gate=False)
class Experts(nn.Module):
    """m networks W_down GELU(W_up x + b_up) + b_down as 3-D parameters, run by the interface that the config names.

    Args:
        config: `num_experts`, `hidden_size`, `moe_intermediate_size`.
    """

    def __init__(self, config):
        super().__init__()
        num, size, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = num
        self.up_proj = nn.Parameter(torch.empty(num, inner, size))
        self.up_proj_bias = nn.Parameter(torch.zeros(num, inner))
        self.down_proj = nn.Parameter(torch.empty(num, size, inner))
        self.down_proj_bias = nn.Parameter(torch.zeros(num, size))
        self.act_fn = F.gelu

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        """The eager way: `[tokens, D]`, `[tokens, k]` twice → `[tokens, D]`; every expert sees every token."""
        inner = torch.einsum("td,mid->mti", hidden_states, self.up_proj) + self.up_proj_bias[:, None]
        outer = torch.einsum("mti,mdi->mtd", self.act_fn(inner), self.down_proj) + self.down_proj_bias[:, None]
        weights = outer.new_zeros(hidden_states.shape[0], self.num_experts)
        weights = weights.scatter_add(1, top_k_index, top_k_weights.to(outer.dtype))
        return torch.einsum("tm,mtd->td", weights, outer)


class MoELayer(nn.Module):
    """y = Σ_j p_j Expert_j(x) over the most probable experts, p = softmax(W_g x + b_g) made to sum to 1 over them.

    A token uses k = clamp(⌊k_base (1 + H(p) / log m) + 10⁻⁶⌋, 1, m) of them, or k_base where `dynamic_experts` is off.

    Args:
        config: `num_experts` m, `num_experts_per_tok` k_base, `dynamic_experts`, `normalize_expert_weights`,
            `max_expert_load` θ, `router_entropy_coef`, `router_aux_loss_coef`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config)

    def forward(self, x: torch.Tensor, rows: RowLayout) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """`[B, M, D]` → (the same; the router's loss of each row `[B]`; how it decided)."""
        config = self.config
        real = rows.token_mask()
        with torch.autocast(x.device.type, enabled=False):
            logits = linear_in_weight_dtype(self.gate, x)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probability = logits.softmax(dim=-1)
        most = min(config.num_experts, (1 + config.dynamic_experts) * config.num_experts_per_tok)
        weights, index = probability.topk(most, dim=-1)
        used = torch.arange(most, device=x.device) < self._count(probability)[..., None]
        used = used & real[..., None]
        weights = weights.masked_fill(~used, 0)
        if config.normalize_expert_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        y = apply_chunked(self._mixed, x, index, weights)
        loss = self._loss(probability, index, used, real)
        return y, loss, Routing(logits, index, weights)

    def _mixed(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = self.experts(x.flatten(0, 1), index.flatten(0, 1), weights.flatten(0, 1).to(x.dtype))
        return y.view_as(x)

    def _count(self, probability: torch.Tensor) -> torch.Tensor:
        """Experts that each token uses, `[B, M]`."""
        config = self.config
        base = probability.new_tensor(config.num_experts_per_tok)
        if not config.dynamic_experts or config.num_experts == 1:
            return base.expand(probability.shape[:2])
        doubt = entropy(probability) / math.log(config.num_experts)
        return (base * (1 + doubt) + 1e-6).floor().clamp(1, config.num_experts)

    def _loss(self, probability, index, used, real) -> torch.Tensor:
        """λ_entropy (log m − H(mean p)) + λ_overuse Σ_j relu(load_j − θ) over the real tokens of each row, `[B]`.

        The load of an expert is the share of tokens that use it, with the gradient of its mean probability.
        """
        config = self.config
        count = real.sum(dim=1, keepdim=True).clamp(min=1)
        mean = probability.masked_fill(~real[..., None], 0).sum(dim=1) / count
        chosen = torch.zeros_like(probability).scatter(-1, index, used.to(probability.dtype)).sum(dim=1) / count
        load = mean + (chosen - mean).detach()
        imbalance = math.log(config.num_experts) - entropy(mean)
        overuse = (load - config.max_expert_load).relu().sum(dim=-1)
        loss = config.router_entropy_coef * imbalance + config.router_aux_loss_coef * overuse
        return loss.masked_fill(~real.any(dim=1), 0)


def entropy(probability: torch.Tensor) -> torch.Tensor:
    """−Σ p log p over the last dimension, with a finite gradient at 0 too."""
    return torch.special.entr(probability.clamp(min=torch.finfo(probability.dtype).tiny)).sum(dim=-1)
