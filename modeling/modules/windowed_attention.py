"""Softmax attention with grouped key-value heads, full or over a sliding window, through transformers' interface.

A window mask alone would not save computation. With a window, blocks of queries and their keys are folded into the
batch, which takes O(length × window) time and memory.

Shape letters: B batch, M entities of this call, N keys, H attention heads, H' key-value heads, T entities per block.
"""

from functools import partial

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, repeat_kv, rotate_half

from ..ops.band import block_length, join_blocks, key_blocks, query_blocks
from ..ops.chunking import apply_chunked
from .cache import FlowCacheLayer
from .rms_norm import RMSNorm
from .row_layout import RowLayout, pad_attention_with_grad


class RotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary position embedding (Su et al. 2021). With an odd `head_dim` the last feature is not rotated."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)  # type: ignore[arg-type]  # it reads fields that the families' configurations have

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Return (frequencies `[head_dim // 2]`, scaling of the attention)."""
        rotated = config.head_dim // 2 * 2
        frequencies = torch.arange(0, rotated, 2, dtype=torch.float32) / max(rotated, 1)
        return config.rope_parameters["rope_theta"] ** -frequencies, 1.0


class GroupedQueryAttention(nn.Module):
    """Projections of grouped-query attention (Ainslie et al. 2023) with RMSNorm on queries and keys per head.

    Args:
        config: has `hidden_size`, `num_attention_heads`, `num_key_value_heads`, `head_dim`, `norm_eps`,
            `attention_dropout` and the attention implementation.

    Example:
        >>> import torch
        >>> from dfn_hf import FlowNetworkConfig
        >>> from dfn_hf.modeling.modules.windowed_attention import GroupedQueryAttention
        >>> config = FlowNetworkConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2)
        >>> attention, x = GroupedQueryAttention(config).eval(), torch.randn(1, 10, 16)
        >>> query, key = attention.project(attention.q_proj, x), attention.project(attention.k_proj, x)
        >>> value = attention.project(attention.v_proj, x)
        >>> attention.attend(query, key, value, mask=None).shape
        torch.Size([1, 10, 4, 4])
    """

    is_causal = True  # applies if no mask is given

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
        """Project `[B, M, hidden_size]` and split heads: `[B, heads, M, head_dim]`."""
        return linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, query, key, value, mask) -> torch.Tensor:
        """Run the configured attention implementation.

        Args:
            query: `[B, H, M, head_dim]`.
            key, value: `[B, H', N, head_dim]`.
            mask: bool `[B, 1, M, N]`; None for causal attention with N = M.

        Returns:
            `[B, M, H, head_dim]`.
        """
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return interface(self, query, key, value, mask, dropout=self._dropout(), scaling=self.scaling)[0]

    def attend_observed(self, query, key, value, mask, observe) -> tuple[torch.Tensor, torch.Tensor]:
        """Run eager attention and return its weights too; arguments as for `attend`.

        Args:
            observe: converts weights `[B, H, M, N]` to (weights between columns, the same weights gathered back), so
                that the output has a gradient at the returned weights.

        Returns:
            (`[B, M, H, head_dim]`, weights between columns).
        """
        _, weights = eager_attention_forward(self, query, key, value, mask, self.scaling, self._dropout())
        observed, weights = observe(weights)
        return (weights @ repeat_kv(value, self.num_key_value_groups)).transpose(1, 2), observed

    def _dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0


class SelfAttention(GroupedQueryAttention):
    """Self-attention, causal or two-sided, over all entities or a sliding window.

    Args:
        config: as for `GroupedQueryAttention`.
        window: number of most recent entities to attend to, the entity itself included; None for all.
        two_sided: whether to attend to `window − 1` later entities too. Requires a window and no cache.

    Example:
        >>> import torch
        >>> from dfn_hf import FlowNetworkConfig
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> from dfn_hf.modeling.modules.windowed_attention import RotaryEmbedding, SelfAttention
        >>> config = FlowNetworkConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2)
        >>> u, rows = torch.randn(2, 10, 16), make_row_layout(2, 10, torch.device("cpu"))
        >>> rotary = RotaryEmbedding(config)(u, rows.segment_positions)
        >>> y, weights = SelfAttention(config, window=4)(u, rotary, rows, state=None, output_attentions=True)
        >>> y.shape, weights.shape
        (torch.Size([2, 10, 16]), torch.Size([2, 4, 10, 10]))
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
        """Attend within each segment.

        Args:
            u: `[B, M, hidden_size]`.
            rotary: cosine and sine of each position, `[B, M, rotated features]`.
            rows: layout of this call.
            state: the layer's cache, or None.
            output_attentions: whether to return the weights; this runs eager attention.

        Returns:
            (concatenated heads `[B, M, hidden_size]`, without an output projection; weights between the columns so far
            `[B, H, M, N]`, or None).
        """
        query, key, value = apply_chunked(self._projected, u, *rotary)
        if output_attentions:
            return self._observed(query, key, value, rows, state)
        attend = self._over_all if self.window is None else self._over_window
        return attend(query, key, value, rows, state), None

    def _projected(self, u, cos, sin) -> tuple[torch.Tensor, ...]:
        """Return rotated queries, rotated keys and values with concatenated heads, `[B, M, features]` each."""
        query, key, value = (self.project(linear, u) for linear in (self.q_proj, self.k_proj, self.v_proj))
        query, key = (rotate(x, cos, sin) for x in (self.q_norm(query), self.k_norm(key)))
        return tuple(x.transpose(1, 2).flatten(2) for x in (query, key, value))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """Split heads: `[B, M, features]` → `[B, heads, M, head_dim]`."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _observed(self, query, key, value, rows: RowLayout, state: FlowCacheLayer | None):
        """Attend, full or windowed, with the dense weights between columns."""
        before: torch.Tensor | int
        after: torch.Tensor | int
        if self.window is None:
            key, value = self._appended(self._heads(key), self._heads(value), state)
            first, before, after = torch.zeros_like(rows.positions[:1, :1]), rows.positions.max(), 0
        else:
            key, value = (self._heads(x) for x in self._around(key, value, state))
            before = self.window - 1
            first, after = rows.positions[:, :1] - before, before if self.two_sided else 0
        positions = first + torch.arange(key.shape[2], device=key.device)
        age = rows.positions[..., None] - positions[:, None]
        ahead = rows.tokens_after().clamp(0, after)[..., None]
        mask = ((age <= rows.segment_positions[..., None].clamp(max=before)) & (age >= -ahead))[:, None]
        observe = partial(pad_attention_with_grad, positions=positions, rows=rows, state=state)
        y, weights = self.attend_observed(self._heads(query), key, value, mask, observe)
        return y.flatten(2), weights

    def _appended(self, key, value, state: FlowCacheLayer | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values `[B, H', M, head_dim]` to those of earlier calls."""
        if state is None:
            return key, value
        started, length = state.data("key") is None, key.shape[2]
        key, value = state.append("key", key), state.append("value", value)
        return (key[:, :, :length], value[:, :, :length]) if started else (key, value)

    def _around(self, key, value, state: FlowCacheLayer | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Extend keys and values `[B, M, features]` by the window before the call and, if two-sided, after it."""
        before = self.window - 1
        if state is None:
            after = before if self.two_sided else 0
            key, value = (nn.functional.pad(x, (0, 0, before, after)) for x in (key, value))
            return key, value
        return state.roll("key", key, before), state.roll("value", value, before)

    def _over_all(self, query, key, value, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        """Attend to all earlier entities of the segment; arguments and result `[B, M, features]`."""
        query, key, value = (self._heads(x) for x in (query, key, value))
        started = state is None or state.data("key") is None
        key, value = self._appended(key, value, state)
        mask = None
        if not started or rows.segment is not None:
            keys = torch.arange(key.shape[2], device=key.device)
            mask = (keys <= rows.positions[..., None])[:, None]
            if rows.segment is not None:
                mask = mask & (keys >= (rows.positions - rows.segment_positions)[..., None])[:, None]
        return self.attend(query, key, value, mask).flatten(2)

    def _over_window(self, query, key, value, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        """Attend to the window in blocks; arguments and result `[B, M, features]`."""
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

    def _over_blocks(self, before: int, query, key, value, behind, ahead) -> torch.Tensor:
        """Attend within n blocks; returns `[B, n, T, features]`.

        Args:
            before: keys in front of each block.
            query: `[B, n, T, features]`.
            key, value: `[B, n, keys, features]`.
            behind, ahead: `[B, n, T, 1]`, number of entities that each query attends to before and after it.
        """
        batch, _, block, _ = query.shape
        keys = torch.arange(key.shape[2], device=key.device)
        age = keys[before : before + block, None] - keys
        behind, ahead = behind.flatten(0, 1), ahead.flatten(0, 1)
        mask = ((age >= -ahead) & (age <= behind))[:, None]
        # Blocks are folded into the batch: [B · n, heads, T or keys, head_dim].
        query, key, value = (self._heads(x.flatten(0, 1)) for x in (query, key, value))
        return self.attend(query, key, value, mask).flatten(2).unflatten(0, (batch, -1))


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """transformers' attention interface in torch operations, with scores and softmax in at least float32.

    Args:
        module: has `num_key_value_groups`.
        query: `[B, H, M, D]`.
        key, value: `[B, H', N, D]`.
        attention_mask: bool `[B, 1, M, N]`; None for causal attention.
        scaling: factor of the scores.
        dropout: probability of dropping a weight in training.

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
    """Rotate the first R features of `[B, heads, M, head_dim]`; `cos` and `sin` are `[B, M, R]`."""
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    rotated = rotated * cos.unsqueeze(1) + rotate_half(rotated) * sin.unsqueeze(1)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated
