"""Block of Liquid (Liquid paper, §3.8). For the states s of a row:

s += Attention(LayerNorm(s))               sliding window, two-sided in the encoder, causal in the decoder
s += CrossAttention(LayerNorm(s), source)  decoder only
s += OptimizedGatedConvolution(LayerNorm(s))
s += MoELayer(LayerNorm(s))
s += FeedForward(LayerNorm(s))
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modules.cache import FlowCacheLayer
from ..modules.row_layout import RowLayout
from ..ops.chunking import apply_chunked
from .attention import CrossAttention, EnhancedLocalAttentionWithGQA
from .configuration_liquid import LiquidConfig
from .deformable_conv import OptimizedGatedConvolution
from .finite_check import check_finite
from .mixture_of_experts import MoELayer, Routing

STATE_LIMIT = 100.0  # bound of the feed-forward output (Liquid paper)


class FeedForward(nn.Module):
    """Feed-forward network clamp(W₂ Dropout(GELU(LayerNorm(W₁ s))), ±100)."""

    def __init__(self, config: LiquidConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.norm = nn.LayerNorm(config.intermediate_size, config.norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = self.dropout(F.gelu(self.norm(self.up_proj(states))))
        return self.down_proj(inner).clamp(-STATE_LIMIT, STATE_LIMIT)


class ImprovedTransformerBlock(GradientCheckpointingLayer):
    """Residual block of attention, cross-attention (decoder), gated convolution, experts and feed-forward network.

    Args:
        config: `LiquidConfig`.
        decoder: whether the block is causal and has cross-attention.
        name: name of the block in the errors of `finite_check`.
    """

    def __init__(self, config: LiquidConfig, decoder: bool, name: str):
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.finite_check, self.name = config.finite_check, name
        self.attention_norm = nn.LayerNorm(size, eps)
        self.attention = EnhancedLocalAttentionWithGQA(config, two_sided=not decoder)
        self.cross_norm = nn.LayerNorm(size, eps) if decoder else None
        self.cross_attention = CrossAttention(config) if decoder else None
        self.conv_norm = nn.LayerNorm(size, eps)
        self.gated_conv = OptimizedGatedConvolution(
            size, config.conv_kernel, config.conv_dilation, config.max_offset, decoder, norm_eps=eps
        )
        self.moe_norm = nn.LayerNorm(size, eps)
        self.moe = MoELayer(config)
        self.mlp_norm = nn.LayerNorm(size, eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        rows: RowLayout,
        source: torch.Tensor | None = None,
        source_rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        source_mask: torch.Tensor | None = None,
        past_key_values: FlowCacheLayer | None = None,
        cross_state: FlowCacheLayer | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, Routing]:
        """Run the block.

        Args:
            hidden_states: `[B, M, hidden_size]`.
            rotary: cosines and sines, each `[B, M, rotated features]`.
            rows: `row_layout.RowLayout` of this call.
            source: encoder states `[B, S, hidden_size]`; required in the decoder.
            source_rotary, source_mask: as for `CrossAttention`.
            past_key_values: cache layer of the row's own state, or None.
            cross_state: cache layer of the source's keys and values, or None.
            output_attentions: whether to return attention weights.

        Returns:
            (states `[B, M, hidden_size]`; self-attention weights or None; cross-attention weights or None; router loss
            `[B]`; routing).
        """
        y, weights = self.attention(
            apply_chunked(self.attention_norm, hidden_states), rotary, rows, past_key_values, output_attentions
        )
        hidden_states = hidden_states + self.dropout(self._check(y, "attention"))
        cross_weights = None
        if self.cross_attention is not None:
            y, cross_weights = self.cross_attention(
                apply_chunked(self.cross_norm, hidden_states),
                rotary,
                source,
                source_rotary,
                source_mask,
                rows,
                cross_state,
                output_attentions,
            )
            hidden_states = hidden_states + self.dropout(self._check(y, "cross-attention"))
        y = self.gated_conv(apply_chunked(self.conv_norm, hidden_states), rows, past_key_values)
        hidden_states = hidden_states + self.dropout(self._check(y, "gated convolution"))
        y, router_loss, routing = self.moe(apply_chunked(self.moe_norm, hidden_states), rows)
        hidden_states = hidden_states + self.dropout(self._check(y, "experts"))
        hidden_states = apply_chunked(self._add_feed_forward, hidden_states)
        return hidden_states, weights, cross_weights, router_loss, routing

    def _add_feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        y = self.mlp(self.mlp_norm(hidden_states))
        return hidden_states + self.dropout(self._check(y, "feed-forward network"))

    def _check(self, y: torch.Tensor, part: str) -> torch.Tensor:
        return check_finite(y, self.finite_check, f"{self.name}, {part}")
