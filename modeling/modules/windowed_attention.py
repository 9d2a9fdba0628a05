"""Causal attention with grouped key-value heads, full or over a sliding window, through transformers' interface.

A window mask alone saves nothing: for a window, blocks of queries and the keys they see are folded into the batch.
"""

from functools import partial

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, repeat_kv, rotate_half

from ..ops.band import block_length, join_blocks, key_blocks, query_blocks
from ..ops.chunking import apply_chunked
from .cache import FlowCacheLayer
from .rms_norm import RMSNorm
from .row_layout import RowLayout, pad_attention_with_grad


class RotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary embedding of an even number of features: of an odd head the last one stays as it is."""

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        rotated = config.head_dim // 2 * 2
        frequencies = torch.arange(0, rotated, 2, dtype=torch.float32) / max(rotated, 1)
        return config.rope_parameters["rope_theta"] ** -frequencies, 1.0


class GroupedQueryAttention(nn.Module):
    """Projections of a softmax attention whose queries and keys are normalised per head, and the way to its interface.

    Args:
        config: `num_attention_heads`, `num_key_value_heads`, `head_dim`, `attention_dropout` and the implementation.
    """

    is_causal = True  # where no mask is given

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

    def project(self, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """`[B, M, hidden_size]` → `[B, heads, M, head_dim]`."""
        return linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, query, key, value, mask) -> torch.Tensor:
        """`[B, M, H, head_dim]`; mask: bool `[B, 1, M, N]`, None for causal."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return interface(self, query, key, value, mask, dropout=self._dropout(), scaling=self.scaling)[0]

    def attend_observed(self, query, key, value, mask, observe) -> tuple[torch.Tensor, torch.Tensor]:
        """(As `attend`, weights between columns that it was read through).

        Args:
            observe: weights `[B, H, M, N]` → (those between columns, the same weights read back from there).
        """
        _, weights = eager_attention_forward(self, query, key, value, mask, self.scaling, self._dropout())
        observed, weights = observe(weights)
        return (weights @ repeat_kv(value, self.num_key_value_groups)).transpose(1, 2), observed

    def _dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0


class SelfAttention(GroupedQueryAttention):
    """Attention of each entity over itself and those before it, or on both sides.

    Args:
        config: as for `GroupedQueryAttention`.
        window: most recent entities that are seen, the entity itself included; None for all.
        two_sided: see as many on the other side too; rows are then known whole.
    """

    def __init__(self, config, window: int | None, two_sided: bool = False):
        super().__init__(config)
        self.window = window
        self.two_sided = two_sided

    def forward(
        self,
        u: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        rows: RowLayout,
        state: FlowCacheLayer | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args: u `[B, M, hidden_size]`; rotary: cosine and sine of each place, `[B, M, rotated features]`.

        Returns:
            (what the heads read, side by side `[B, M, hidden_size]`; weights between the columns so far
            `[B, H, M, N]`, or None).
        """
        query, key, value = apply_chunked(self._projected, u, *rotary)
        if output_attentions:
            return self._observed(query, key, value, rows, state)
        attend = self._over_all if self.window is None else self._over_window
        return attend(query, key, value, rows, state), None

    def _projected(self, u, cos, sin) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, heads side by side: `[B, M, features]` each."""
        query, key, value = (self.project(linear, u) for linear in (self.q_proj, self.k_proj, self.v_proj))
        query, key = (rotate(x, cos, sin) for x in (self.q_norm(query), self.k_norm(key)))
        return tuple(x.transpose(1, 2).flatten(2) for x in (query, key, value))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, M, features]` → `[B, heads, M, head_dim]`."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _observed(self, query, key, value, rows: RowLayout, state: FlowCacheLayer | None):
        """Both kinds of attention, read through all weights between columns."""
        if self.window is None:
            key, value = self._appended(self._heads(key), self._heads(value), state)
            places, before, after = torch.zeros_like(rows.positions[:1, :1]), rows.positions.max(), 0
        else:
            key, value = (self._heads(x) for x in self._around(key, value, state))
            before = self.window - 1
            places, after = rows.positions[:, :1] - before, before if self.two_sided else 0
        places = places + torch.arange(key.shape[2], device=key.device)
        age = rows.positions[..., None] - places[:, None]
        ahead = rows.tokens_after().clamp(0, after)[..., None]
        mask = ((age <= rows.segment_positions[..., None].clamp(max=before)) & (age >= -ahead))[:, None]
        observe = partial(pad_attention_with_grad, places=places, rows=rows, state=state)
        y, weights = self.attend_observed(self._heads(query), key, value, mask, observe)
        return y.flatten(2), weights

    def _appended(self, key, value, state: FlowCacheLayer | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, heads, M, head_dim]` behind those of earlier calls."""
        if state is None:
            return key, value
        started, length = state.data("key") is None, key.shape[2]
        key, value = state.append("key", key), state.append("value", value)
        return (key[:, :, :length], value[:, :, :length]) if started else (key, value)

    def _around(self, key, value, state: FlowCacheLayer | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, M, features]` with those that the first and the last query of the call can see."""
        before = self.window - 1
        if state is None:
            after = before if self.two_sided else 0
            return tuple(nn.functional.pad(x, (0, 0, before, after)) for x in (key, value))
        return state.roll("key", key, before), state.roll("value", value, before)

    def _over_all(self, query, key, value, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        query, key, value = (self._heads(x) for x in (query, key, value))
        started = state is None or state.data("key") is None
        key, value = self._appended(key, value, state)
        mask = None
        if not started or rows.segment is not None:
            places = torch.arange(key.shape[2], device=key.device)
            mask = (places <= rows.positions[..., None])[:, None]
            if rows.segment is not None:
                mask = mask & (places >= (rows.positions - rows.segment_positions)[..., None])[:, None]
        return self.attend(query, key, value, mask).flatten(2)

    def _over_window(self, query, key, value, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        length = query.shape[1]
        before = self.window - 1
        after = before if self.two_sided else 0
        block = block_length(length, before)
        key, value = self._around(key, value, state)
        ahead = rows.tokens_after() if after else torch.zeros_like(rows.segment_positions)
        y = apply_chunked(
            partial(self._over_blocks, before),
            query_blocks(query, block),
            key_blocks(key, before, block, after),
            key_blocks(value, before, block, after),
            query_blocks(rows.segment_positions[..., None].clamp(max=before), block),
            query_blocks(ahead[..., None].clamp(min=0, max=after), block),
            size=block,
        )
        return join_blocks(y, length)

    def _over_blocks(self, before: int, query, key, value, reach, ahead) -> torch.Tensor:
        """`[B, N, T, features]` of each block.

        Args:
            query: `[B, N, T, features]`; key, value: `[B, N, keys, features]`.
            reach, ahead: `[B, N, T, 1]`, entities that each sees on either side.
        """
        batch, _, block, _ = query.shape
        places = torch.arange(key.shape[2], device=key.device)
        age = places[before : before + block, None] - places
        reach, ahead = reach.flatten(0, 1), ahead.flatten(0, 1)
        mask = ((age >= -ahead) & (age <= reach))[:, None]
        # Blocks join the batch: [B · N, H, T or keys, head_dim].
        query, key, value = (self._heads(x.flatten(0, 1)) for x in (query, key, value))
        return self.attend(query, key, value, mask).flatten(2).unflatten(0, (batch, -1))


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The attention interface in plain torch, its scores and their softmax in at least float32.

    Args:
        query: `[B, H, M, D]`; key, value: `[B, H', N, D]`; attention_mask: bool `[B, 1, M, N]`, None for causal.

    Returns:
        (`[B, M, H, D]`, weights `[B, H, M, N]`).
    """
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).transpose(2, 3) * scaling
    if attention_mask is None:
        attention_mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    scores = scores.masked_fill(~attention_mask, torch.finfo(dtype).min)
    weights = scores.softmax(dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of as many features of `[B, heads, M, head_dim]` as `cos` `[B, M, ·]` has; the rest stays."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = turned * cos.unsqueeze(1) + rotate_half(turned) * sin.unsqueeze(1)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
