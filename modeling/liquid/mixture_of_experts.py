"""Mixture of experts; the number of experts per token follows the entropy of the router (Liquid paper, §3.4).

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
    """Decisions of one layer's router.

    Attributes:
        logits: `[B, M, m]`, in at least float32.
        index: int64 `[B, M, columns]`, experts in order of decreasing probability.
        weights: `[B, M, columns]`, 0 for unused experts.
    """

    logits: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


@use_experts_implementation(has_bias=True, has_gate=False)
class Experts(nn.Module):
    """m networks W_down GELU(W_up x + b_up) + b_down, stored as 3-D parameters.

    transformers' experts interface chooses the implementation by `config._experts_implementation`.

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
        """Eager implementation: every expert processes every token.

        Args:
            hidden_states: `[tokens, D]`.
            top_k_index: int64 `[tokens, k]`.
            top_k_weights: `[tokens, k]`.

        Returns:
            `[tokens, D]`.
        """
        inner = torch.einsum("td,mid->mti", hidden_states, self.up_proj) + self.up_proj_bias[:, None]
        outer = torch.einsum("mti,mdi->mtd", self.act_fn(inner), self.down_proj) + self.down_proj_bias[:, None]
        weights = outer.new_zeros(hidden_states.shape[0], self.num_experts)
        weights = weights.scatter_add(1, top_k_index, top_k_weights.to(outer.dtype))
        return torch.einsum("tm,mtd->td", weights, outer)


class MoELayer(nn.Module):
    """Mixture of experts y = Σ_j p_j Expert_j(x) over the most probable experts (Liquid paper, §3.4).

    p = softmax(W_g x + b_g), normalised over the selected experts. A token uses
    k = clamp(⌊k_base (1 + H(p) / log m) + 10⁻⁶⌋, 1, m) experts, or k_base if `dynamic_experts` is False.

    Args:
        config: `num_experts` m, `num_experts_per_tok` k_base, `dynamic_experts`, `normalize_expert_weights`,
            `max_expert_load` θ, `router_entropy_coef`, `router_aux_loss_coef`.

    Example:
        >>> import torch
        >>> from dfn_hf import LiquidConfig, MoELayer
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> moe = MoELayer(LiquidConfig(hidden_size=32, num_experts=2))
        >>> x = torch.randn(2, 10, 32)
        >>> y, router_loss, routing = moe(x, make_row_layout(2, 10, x.device))
        >>> y.shape, router_loss.shape
        (torch.Size([2, 10, 32]), torch.Size([2]))
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config)

    def forward(self, x: torch.Tensor, rows: RowLayout) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """Route the tokens of the rows to experts.

        Args:
            x: `[B, M, D]`.
            rows: `row_layout.RowLayout` of this call.

        Returns:
            (`[B, M, D]`; router loss of each row `[B]`; routing).
        """
        config = self.config
        real = rows.token_mask()
        with torch.autocast(x.device.type, enabled=False):
            logits = linear_in_weight_dtype(self.gate, x)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probability = logits.softmax(dim=-1)
        max_experts = min(config.num_experts, (1 + config.dynamic_experts) * config.num_experts_per_tok)
        weights, index = probability.topk(max_experts, dim=-1)
        used = torch.arange(max_experts, device=x.device) < self._num_experts(probability)[..., None]
        used = used & real[..., None]
        weights = weights.masked_fill(~used, 0)
        if config.normalize_expert_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        y = apply_chunked(self._mix_experts, x, index, weights)
        loss = self._loss(probability, index, used, real)
        return y, loss, Routing(logits, index, weights)

    def _mix_experts(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Run the selected experts and sum their weighted outputs."""
        y = self.experts(x.flatten(0, 1), index.flatten(0, 1), weights.flatten(0, 1).to(x.dtype))
        return y.view_as(x)

    def _num_experts(self, probability: torch.Tensor) -> torch.Tensor:
        """Return the number of experts that each token uses, `[B, M]`."""
        config = self.config
        base = probability.new_tensor(config.num_experts_per_tok)
        if not config.dynamic_experts or config.num_experts == 1:
            return base.expand(probability.shape[:2])
        relative_entropy = entropy(probability) / math.log(config.num_experts)
        return (base * (1 + relative_entropy) + 1e-6).floor().clamp(1, config.num_experts)

    def _loss(
        self, probability: torch.Tensor, index: torch.Tensor, used: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """Compute the router loss of each row over its real tokens, `[B]`.

        λ_entropy (log m − H(mean p)) + λ_overuse Σ_j relu(load_j − θ). The load of an expert is the fraction of tokens
        that use it; its gradient is that of the expert's mean probability.
        """
        config = self.config
        count = real.sum(dim=1, keepdim=True).clamp(min=1)
        mean = probability.masked_fill(~real[..., None], 0).sum(dim=1) / count
        used_fraction = torch.zeros_like(probability).scatter(-1, index, used.to(probability.dtype)).sum(dim=1) / count
        load = mean + (used_fraction - mean).detach()
        imbalance = math.log(config.num_experts) - entropy(mean)
        overuse = (load - config.max_expert_load).relu().sum(dim=-1)
        loss = config.router_entropy_coef * imbalance + config.router_aux_loss_coef * overuse
        return loss.masked_fill(~real.any(dim=1), 0)


def entropy(probability: torch.Tensor) -> torch.Tensor:
    """Return −Σ p log p over the last dimension; its gradient is finite at p = 0."""
    return torch.special.entr(probability.clamp(min=torch.finfo(probability.dtype).tiny)).sum(dim=-1)
