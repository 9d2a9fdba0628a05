"""Causal attention with grouped key-value heads, full or over a sliding window, through transformers' interface.

A window mask alone saves nothing: for a window, blocks of queries and the keys they see are folded into the batch.
"""

from functools import partial

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, repeat_kv, rotate_half

from .padding import Rows
from .pieces import in_pieces
from .rms_norm import RMSNorm
from .state_cache import StateLayer
from .windows import block_length, by_offset, join_blocks, key_blocks, query_blocks, to_dense


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

    def attend(self, query, key, value, mask, output_attentions: bool):
        """`[B, M, H, head_dim]`, and weights `[B, H, M, N]` if asked; mask bool `[B, 1, M, N]`, None for causal."""
        implementation = "eager" if output_attentions else self.config._attn_implementation
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        y, weights = interface(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        return y, weights if output_attentions else None


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
        rows: Rows,
        state: StateLayer | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args: u `[B, M, hidden_size]`; rotary: cosine and sine of each place, `[B, M, rotated features]`.

        Returns:
            (what the heads read, side by side `[B, M, hidden_size]`; weights between the entities of the rows so far
            `[B, H, M, num_entities]`, or None).
        """
        query, key, value = in_pieces(self._projected, u, *rotary)
        attend = self._over_all if self.window is None else self._over_window
        return attend(query, key, value, rows, state, output_attentions)

    def _projected(self, u, cos, sin) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, heads side by side: `[B, M, features]` each."""
        query, key, value = (self.project(linear, u) for linear in (self.q_proj, self.k_proj, self.v_proj))
        query, key = (rotate(x, cos, sin) for x in (self.q_norm(query), self.k_norm(key)))
        return tuple(x.transpose(1, 2).flatten(2) for x in (query, key, value))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, M, features]` → `[B, heads, M, head_dim]`."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _over_all(self, query, key, value, rows: Rows, state: StateLayer | None, output_attentions: bool):
        query, key, value = (self._heads(x) for x in (query, key, value))
        started = state is None or state.data("key") is None
        if state is not None:
            key, value = state.append("key", key), state.append("value", value)
            num_entities = query.shape[2] if started else key.shape[2]
            key, value = key[:, :, :num_entities], value[:, :, :num_entities]
        mask = None
        if not started or rows.segment is not None:
            places = torch.arange(key.shape[2], device=key.device)
            mask = (places <= rows.index[..., None])[:, None]
            if rows.segment is not None:
                mask = mask & (places >= (rows.index - rows.reach)[..., None])[:, None]
        y, weights = self.attend(query, key, value, mask, output_attentions)
        return y.flatten(2), None if weights is None else weights[..., : int(rows.index.max()) + 1]

    def _over_window(self, query, key, value, rows: Rows, state: StateLayer | None, output_attentions: bool):
        length = query.shape[1]
        before = self.window - 1
        after = before if self.two_sided else 0
        block = block_length(length, before)
        if state is None:
            key, value = (nn.functional.pad(x, (0, 0, before, after)) for x in (key, value))
        else:
            key, value = state.tail("key", key, before), state.tail("value", value, before)
        ahead = rows.ahead() if after else torch.zeros_like(rows.reach)
        y, *weights = in_pieces(
            partial(self._over_blocks, before, output_attentions),
            query_blocks(query, block),
            key_blocks(key, before, block, after),
            key_blocks(value, before, block, after),
            query_blocks(rows.reach[..., None].clamp(max=before), block),
            query_blocks(ahead[..., None].clamp(min=0, max=after), block),
            size=block,
        )
        y = join_blocks(y, length)
        if not output_attentions:
            return y, None
        by_head = join_blocks(weights[0], length).unflatten(-1, (query.shape[2] // self.head_dim, -1)).transpose(1, 2)
        return y, to_dense(by_head, rows.index + after, int(rows.index.max()) + 1)

    def _over_blocks(self, before: int, output_attentions: bool, query, key, value, reach, ahead):
        """`[B, N, T, features]` of each block, and if asked its weights by offset `[B, N, T, H · offsets]`.

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
        y, weights = self.attend(query, key, value, mask, output_attentions)
        results = (
            (y.flatten(2), by_offset(weights).transpose(1, 2).flatten(2)) if output_attentions else (y.flatten(2),)
        )
        return tuple(x.unflatten(0, (batch, -1)) for x in results)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The attention interface in plain torch, with its softmax in at least float32.

    Args:
        query: `[B, H, M, D]`; key, value: `[B, H', N, D]`; attention_mask: bool `[B, 1, M, N]`, None for causal.

    Returns:
        (`[B, M, H, D]`, weights `[B, H, M, N]`).
    """
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is None:
        attention_mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of as many features of `[B, heads, M, head_dim]` as `cos` `[B, M, ·]` has; the rest stays."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = turned * cos.unsqueeze(1) + rotate_half(turned) * sin.unsqueeze(1)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
