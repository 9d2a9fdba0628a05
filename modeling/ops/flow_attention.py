"""Flow attention: biased dot-product attention of each entity to its local window and its k nearest predecessors.

ℓ_ij = q_i · k_j − λ_h log(1 + i − j) (DFN paper, §2.2). The caller writes the Gaussian affinity −γ‖q − k‖² + w as a
dot product: q = [2γ q, 1], k = [k, w − γ‖k‖²]. The term −γ‖q‖² is equal for all j, so the softmax does not depend on
it.

Memory is linear in the length: the forward pass processes the queries in chunks and keeps none of their logits, and
the backward pass recomputes them.

Shape letters: B batch, H heads, M queries of this call, N stored entities, E query/key features, D value features,
K neighbours, W local window.
"""

import math

import torch
from torch.nn import functional as F

from .custom_ops import custom_op, use_custom_ops
from .dispatch import attention_backend
from .flow_attention_torch import empty_y, flow_attention_backward_torch, flow_attention_forward_torch
from .higher_order import KernelFunction, differentiate_backward
from .kernels.flow_attention_cpu import attention_library, flow_attention_backward_cpu, flow_attention_forward_cpu


def flow_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the `window` most recent entities, the query's own included, and its neighbours.

    The logits are ℓ (module docstring). `dispatch.attention_backend` chooses between C, Triton and torch. The result
    is differentiable more than once; after the first time without dropout and in O(M (W + K) D) memory.

    Args:
        query: `[B, H, M, E]`, float32 or float64. Query a of a row has position i = past + a in the row.
        key: `[B, H, N, E]`, same dtype. Past and new entities by position; entities after the last query are not read.
        value: `[B, H, N, D]`, any floating dtype.
        decay: λ, `[H]`, same dtype as `query`.
        query_index: int64 `[B, M]`, position i of each query.
        reach: int64 `[B, M]`, number of entities directly before i that the query may attend to in its window.
        neighbors: int64 `[B, H, M, K]`, positions ≤ i − window, −1 for none.
        window: W ≥ 1.
        dropout: probability of dropping a weight.

    Returns:
        (y `[B, H, M, D]` in the dtype of `value`, log Σ exp ℓ `[B, H, M]` in the dtype of `query`).

    Example:
        >>> import torch
        >>> from dfn_hf.modeling.ops.flow_attention import flow_attention
        >>> query, key = torch.randn(2, 1, 4, 10, 3)  # batch 1, 4 heads, 10 entities, 3 features
        >>> value, decay = torch.randn(1, 4, 10, 8), torch.rand(4)
        >>> index = torch.arange(10)[None]
        >>> neighbors = torch.full((1, 4, 10, 2), -1)  # no neighbours: local attention only
        >>> y, lse = flow_attention(query, key, value, decay, index, index, neighbors, window=3)
        >>> y.shape, lse.shape
        (torch.Size([1, 4, 10, 8]), torch.Size([1, 4, 10]))
    """
    # The seed is a tensor, so that a compiled model draws a new one at each call.
    seed = torch.randint(2**62, (), device="cpu") if dropout > 0 else torch.zeros((), dtype=torch.int64)
    arguments = (query, key, value, decay, query_index, reach, neighbors, window, dropout, seed)
    if use_custom_ops():
        return _forward_operator(*arguments)
    return _FlowAttention.apply(*arguments)


class _FlowAttention(KernelFunction):
    """`flow_attention` with its backward pass; `seed` is the last argument."""

    @staticmethod
    def forward(*arguments):
        return flow_attention_forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_y, grad_lse):
        return _call_backward(ctx, _FlowAttentionBackward.apply, grad_y, grad_lse)


class _FlowAttentionBackward(KernelFunction):
    """`flow_attention_backward` with its own backward pass."""

    @staticmethod
    def forward(*arguments):
        return flow_attention_backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.window, ctx.dropout, _ = inputs
        ctx.save_for_backward(*tensors[:9])

    @staticmethod
    def backward(ctx, *cotangents):
        if ctx.dropout:
            raise RuntimeError("Second derivatives of flow attention need `attention_dropout=0`.")
        *tensors, query_index, reach, neighbors = ctx.saved_tensors

        def attend(query, key, value, decay):
            return flow_attention_plain(query, key, value, decay, query_index, reach, neighbors, ctx.window)

        gradients = differentiate_backward(attend, tuple(tensors[:2]), tuple(tensors[2:]), cotangents)
        return *gradients, *(None,) * 8


def flow_attention_plain(query, key, value, decay, query_index, reach, neighbors, window):
    """`flow_attention` without dropout as differentiable torch operations, O(M (W + K) D) memory."""
    back = torch.arange(window - 1, -1, -1, device=query.device)
    local = (query_index[..., None] - back)[:, None].expand(*query.shape[:3], window)
    is_visible = (back <= reach[..., None])[:, None].expand_as(local)
    is_visible = torch.cat([is_visible, neighbors >= 0], dim=-1)
    ids = torch.cat([local, neighbors], dim=-1).clamp(min=0)

    def gather(x):
        rows = x.gather(2, ids.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1]))
        return rows.unflatten(2, ids.shape[2:])

    log_age = torch.log1p((query_index[:, None, :, None] - ids).to(query.dtype))
    logits = (query.unsqueeze(-2) * gather(key)).sum(dim=-1) - decay.view(-1, 1, 1) * log_age
    logits = logits.masked_fill(~is_visible, -math.inf)
    lse = logits.logsumexp(dim=-1)
    weights = (logits - lse.unsqueeze(-1)).exp()
    y = (weights.unsqueeze(-1) * gather(value).to(weights.dtype)).sum(dim=-2)
    return y.to(value.dtype), lse


def flow_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
    dropout: float,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward pass of `flow_attention`; `seed`, an int64 scalar, determines the dropped weights."""
    inputs = (query, key, value, decay, query_index, reach, neighbors)
    backend = attention_backend(query, key, value, decay, dropout)
    if backend == "triton":
        from .kernels.triton_launch import flow_attention_forward_triton

        return flow_attention_forward_triton(*inputs, window)
    if backend == "c":
        return flow_attention_forward_cpu(attention_library(query, key, value, decay), *inputs, window)
    with torch.autocast(query.device.type, enabled=False):
        return flow_attention_forward_torch(*inputs, window, dropout, seed)


def flow_attention_backward(
    grad_y: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    dropout: float,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward pass of `flow_attention`: gradients of query, key, value and decay from those of y and lse."""
    inputs = (query, key, value, decay, query_index, reach, neighbors)
    backend = attention_backend(query, key, value, decay, dropout)
    if backend == "triton":
        from .kernels.triton_launch import flow_attention_backward_triton

        return flow_attention_backward_triton(grad_y, grad_lse, *inputs, y, lse, window)
    if backend == "c":
        library = attention_library(query, key, value, decay)
        return flow_attention_backward_cpu(library, grad_y, grad_lse, *inputs, lse, window)
    with torch.autocast(query.device.type, enabled=False):
        return flow_attention_backward_torch(grad_y, grad_lse, *inputs, window, dropout, seed)


def _save_for_backward(ctx, inputs, output):
    *tensors, window, dropout, seed = inputs
    ctx.save_for_backward(*tensors, *output, seed)
    ctx.options = window, dropout


def _call_backward(ctx, backward, grad_y, grad_lse):
    """Call `backward` with the saved tensors; index tensors, options and the seed have no gradient."""
    *tensors, seed = ctx.saved_tensors
    return *backward(grad_y, grad_lse, *tensors, *ctx.options, seed), None, None, None, None, None, None


def _backward_of_operator(ctx, grad_y, grad_lse):
    return _call_backward(ctx, _backward_operator, grad_y, grad_lse)


def _fake_forward(query, key, value, decay, query_index, reach, neighbors, window, dropout, seed):
    return empty_y(query, value), query.new_empty(query.shape[:3])


def _fake_backward(grad_y, grad_lse, query, key, value, decay, *others):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, decay))


_forward_operator = custom_op(
    flow_attention_forward, _fake_forward, backward=_backward_of_operator, setup_context=_save_for_backward
)
_backward_operator = custom_op(flow_attention_backward, _fake_backward)


def flow_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    decay: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    ahead: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """Return the weights of `flow_attention` as a dense matrix `[B, H, M, N]`, for inspection: O(M N) memory.

    Args:
        query, key, decay, query_index, reach, neighbors, window: as for `flow_attention`.
        ahead: int64 `[B, M]`, number of entities directly after i that the query may attend to; 0 if causal.
    """
    index = torch.arange(key.shape[2], device=key.device)
    age = query_index[:, None, :, None] - index
    visible = (age.abs() < window) & (age <= reach[:, None, :, None]) & (-age <= ahead[:, None, :, None])
    visible = visible.expand(-1, query.shape[1], -1, -1)
    # The extra column receives the entries of −1.
    is_neighbor = F.pad(torch.zeros_like(visible), (0, 1))
    is_neighbor = is_neighbor.scatter(-1, torch.where(neighbors < 0, key.shape[2], neighbors), True)[..., :-1]
    logits = query @ key.transpose(-1, -2) - decay.view(-1, 1, 1) * torch.log1p(age.abs().to(query.dtype))
    return logits.masked_fill(~(visible | is_neighbor), -math.inf).softmax(dim=-1)


def flow_attention_reference(query, key, value, decay, query_index, reach, neighbors, window):
    """Reference for `flow_attention`: a loop over rows, heads and queries."""
    batch, heads, length, _ = query.shape
    outputs, log_sums = [], []
    for row in range(batch):
        for head in range(heads):
            for a in range(length):
                i = int(query_index[row, a])
                oldest = i - min(window - 1, int(reach[row, a]))
                ids = list(range(oldest, i + 1)) + [j for j in neighbors[row, head, a].tolist() if j >= 0]
                age = torch.tensor([1.0 + i - j for j in ids], dtype=query.dtype)
                logits = key[row, head, ids] @ query[row, head, a] - decay[head] * age.log()
                outputs.append(logits.softmax(dim=0) @ value[row, head, ids].to(query.dtype))
                log_sums.append(logits.logsumexp(dim=0))
    y = torch.stack(outputs).view(batch, heads, length, -1)
    return y.to(value.dtype), torch.stack(log_sums).view(batch, heads, length)
