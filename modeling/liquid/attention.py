"""The attentions of a Liquid block: over a sliding window of its own row, and over the encoder's states (§3.3)."""

from functools import partial

import torch
from torch import nn

from ..modules.cache import FlowCacheLayer
from ..modules.row_layout import RowLayout
from ..modules.windowed_attention import GroupedQueryAttention, SelfAttention, rotate
from ..ops.chunking import apply_chunked


class EnhancedLocalAttentionWithGQA(nn.Module):
    """Sliding-window attention with grouped keys and values, causal or on both sides, and its output projection.

    Args:
        config: `LiquidConfig`.
        two_sided: see a window on both sides, as the encoder does.
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
        """`[B, M, hidden_size]` → (the same, weights `[B, H, M, N]` or None); arguments as for `SelfAttention`."""
        y, weights = self.attention(x, rotary, rows, state, output_attentions)
        return self.o_proj(y), weights


class CrossAttention(GroupedQueryAttention):
    """Attention of each entity of the decoder over all real tokens of the source."""

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
        """
        Args:
            x: `[B, M, hidden_size]`; source: `[B, S, hidden_size]`.
            rotary, source_rotary: cosine and sine of the place of each in its row, `[B, M or S, rotated features]`;
                the latter is not needed once `state` holds keys.
            source_mask: bool `[B, S]`, True where real, at least once in a row; None if everywhere.
            rows: of the decoder's call, in which x lies.
            state: holds keys and values of the source from the first call on, or None.

        Returns:
            (`[B, M, hidden_size]`, weights between columns `[B, H, M, S]` or None).
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
            y, weights = self.attend_observed(self._queries(x, *rotary), key, value, mask, rows.observe_queries)
            return self.o_proj(y.flatten(2)), weights
        return apply_chunked(partial(self._read, key, value, mask), x, *rotary), None

    def _queries(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotate(self.q_norm(self.project(self.q_proj, x)), cos, sin)

    def _read(self, key, value, mask: torch.Tensor, x: torch.Tensor, cos, sin) -> torch.Tensor:
        mask = mask.expand(-1, -1, x.shape[1], -1)
        return self.o_proj(self.attend(self._queries(x, cos, sin), key, value, mask).flatten(2))
