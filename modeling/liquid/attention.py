"""Attention of a Liquid block: to a sliding window of the row, and to the encoder states (Liquid paper, §3.3)."""

from functools import partial

import torch
from torch import nn

from ..modules.cache import FlowCacheLayer
from ..modules.row_layout import RowLayout
from ..modules.windowed_attention import GroupedQueryAttention, SelfAttention, rotate
from ..ops.chunking import apply_chunked


class EnhancedLocalAttentionWithGQA(nn.Module):
    """Sliding-window attention with grouped keys and values, followed by an output projection (Liquid paper, §3.3).

    Args:
        config: `LiquidConfig`.
        two_sided: whether to attend to both sides, as the encoder does; otherwise the attention is causal.

    Example:
        >>> import torch
        >>> from dfn_hf import EnhancedLocalAttentionWithGQA, LiquidConfig
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> from dfn_hf.modeling.modules.windowed_attention import RotaryEmbedding
        >>> config = LiquidConfig(hidden_size=64, attn_implementation="sdpa")
        >>> attention = EnhancedLocalAttentionWithGQA(config, two_sided=False)
        >>> x, rows = torch.randn(2, 10, 64), make_row_layout(2, 10, torch.device("cpu"))
        >>> rotary = RotaryEmbedding(config)(x, rows.positions)
        >>> y, weights = attention(x, rotary, rows, None, output_attentions=False)
        >>> y.shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, config, two_sided: bool):
        super().__init__()
        self.attention = SelfAttention(config, config.attention_window, two_sided)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        rows: RowLayout,
        state: FlowCacheLayer | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to the window; the arguments are those of `SelfAttention`.

        Args:
            x: `[B, M, hidden_size]`.

        Returns:
            (`[B, M, hidden_size]`; attention weights `[B, H, M, N]` or None).
        """
        y, weights = self.attention(x, rotary, rows, state, output_attentions)
        return self.o_proj(y), weights


class CrossAttention(GroupedQueryAttention):
    """Attention of each decoder entity to all real tokens of the source.

    Args:
        config: `LiquidConfig`.
    """

    is_causal = False

    def __init__(self, config):
        super().__init__(config)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        source: torch.Tensor,
        source_rotary: tuple[torch.Tensor, torch.Tensor] | None,
        source_mask: torch.Tensor | None,
        rows: RowLayout,
        state: FlowCacheLayer | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to the source; keys and values are computed once and kept in the cache.

        Args:
            x: `[B, M, hidden_size]`.
            rotary: cosines and sines of the decoder positions, each `[B, M, rotated features]`.
            source: encoder states `[B, S, hidden_size]`.
            source_rotary: cosines and sines of the source positions, each `[B, S, rotated features]`; unused if
                `state` holds keys.
            source_mask: bool `[B, S]`, True at real tokens, with at least one per row; None if all tokens are real.
            rows: `row_layout.RowLayout` of the decoder's call.
            state: cache layer for keys and values of the source, or None.
            output_attentions: whether to return the attention weights.

        Returns:
            (`[B, M, hidden_size]`; attention weights between columns `[B, H, M, S]` or None).
        """
        key = None if state is None else state.data("source_key")
        if key is not None:
            value = state.data("source_value")
        else:
            key = rotate(self.k_norm(self.project(self.k_proj, source)), *source_rotary)
            value = self.project(self.v_proj, source)
            if state is not None:
                state.replace("source_key", key.detach())
                state.replace("source_value", value.detach())
        if source_mask is None:
            source_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        mask = source_mask[:, None, None]
        if output_attentions:
            y, weights = self.attend_observed(self._queries(x, *rotary), key, value, mask, rows.pad_queries_with_grad)
            return self.o_proj(y.flatten(2)), weights
        return apply_chunked(partial(self._attend, key, value, mask), x, *rotary), None

    def _queries(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotate(self.q_norm(self.project(self.q_proj, x)), cos, sin)

    def _attend(self, key, value, mask: torch.Tensor, x: torch.Tensor, cos, sin) -> torch.Tensor:
        mask = mask.expand(-1, -1, x.shape[1], -1)
        return self.o_proj(self.attend(self._queries(x, cos, sin), key, value, mask).flatten(2))
