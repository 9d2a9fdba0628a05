"""Flow attention: biased dot-product attention of each entity to its local window and its found neighbours.

ℓ_ij = q_i · k_j − λ_h log(1 + i − j), where the caller has written the Gaussian affinity as a dot product:
q = [2γ q, 1], k = [k, w − γ‖k‖²]; the term −γ‖q‖² is the same for all j and leaves with the softmax.

Only linear memory is ever held: the forward pass goes through the queries in chunks and keeps none of their logits;
the backward pass computes them again, chunk by chunk.

Shape letters: B batch, H heads, M queries of this call, N stored entities, E query/key features, D value features,
K found neighbours, W local window.
"""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .custom_ops import custom_op, use_custom_ops
from .dispatch import can_use_triton_attention
from .kernels.flow_attention_cpu import attention_library, flow_attention_backward_cpu, flow_attention_forward_cpu

EMBEDDING_BAG_SUM = 0  # its mode, as torch numbers them
ELEMENT_CHUNK = 2**21  # features of the neighbours of the queries that are worked on at a time


def flow_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    fading: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of ℓ over N(i) = the `window` most recent entities of i, itself included, and its neighbours.

    Args:
        query: `[B, H, M, E]`, float32 or float64. Query a of a row has index i = past + a.
        key: `[B, H, N, E]`, same dtype; value: `[B, H, N, D]`, any dtype. Past and new entities, by index.
        fading: λ, `[H]`.
        query_index: int64 `[B, M]`.
        reach: int64 `[B, M]`, how many of the entities just before i it may see.
        neighbors: int64 `[B, H, M, K]`, indices ≤ i − window, −1 for none.
        dropout: probability of leaving out a weight.

    Returns:
        (y `[B, H, M, D]` in the dtype of value, log Σ exp ℓ `[B, H, M]` in the dtype of query).
    """
    # Drawn as a tensor, so that a compiled model draws anew each time.
    seed = torch.randint(2**62, (), device="cpu") if dropout > 0 else torch.zeros((), dtype=torch.int64)
    arguments = (query, key, value, fading, query_index, reach, neighbors, window, dropout, seed)
    if use_custom_ops():
        return _read_operator(*arguments)
    return _FlowAttention.apply(*arguments)


class _FlowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        y, total = read(*arguments)
        _keep_for_backward(ctx, arguments, (y, total))
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_total):
        return _backward(ctx, read_gradients, grad_y, grad_total)


def read(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    fading: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
    dropout: float,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flow_attention` without a gradient; `seed` is that of its dropout."""
    if dropout == 0 and can_use_triton_attention(query, key, value, fading):
        from .kernels.triton_launch import flow_attention_forward_triton

        return flow_attention_forward_triton(query, key, value, fading, query_index, reach, neighbors, window)
    library = _library(query, key, value, fading, dropout)
    if library is not None:
        return flow_attention_forward_cpu(library, query, key, value, fading, query_index, reach, neighbors, window)
    with torch.autocast(query.device.type, enabled=False):
        return _read(query, key, value, fading, query_index, reach, neighbors, window, dropout, seed)


def read_gradients(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    fading: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    y: torch.Tensor,
    total: torch.Tensor,
    window: int,
    dropout: float,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and fading, given those of what `read` returned."""
    inputs = (query, key, value, fading, query_index, reach, neighbors)
    if dropout == 0 and can_use_triton_attention(query, key, value, fading):
        from .kernels.triton_launch import flow_attention_backward_triton

        return flow_attention_backward_triton(grad_y, grad_total, *inputs, y, total, window)
    library = _library(query, key, value, fading, dropout)
    if library is not None:
        return flow_attention_backward_cpu(library, grad_y, grad_total, *inputs, total, window)
    with torch.autocast(query.device.type, enabled=False):
        return _gradients(grad_y, grad_total, *inputs, window, dropout, seed)


def _library(query, key, value, fading, dropout):
    return attention_library(query, key, value, fading) if dropout == 0 else None


def _keep_for_backward(ctx, inputs, output):
    *tensors, window, dropout, seed = inputs
    ctx.save_for_backward(*tensors, *output, seed)
    ctx.options = window, dropout


def _backward(ctx, gradients, grad_y, grad_total):
    *tensors, seed = ctx.saved_tensors
    return *gradients(grad_y, grad_total, *tensors, *ctx.options, seed), None, None, None, None, None, None


def _backward_of_operator(ctx, grad_y, grad_total):
    return _backward(ctx, _gradients_operator, grad_y, grad_total)


def empty_y(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`[B, H, M, D]` where heads of an entity lie together, as what comes after takes them."""
    batch, heads, length, _ = query.shape
    return value.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


def _shape_of_read(query, key, value, fading, query_index, reach, neighbors, window, dropout, seed):
    return empty_y(query, value), query.new_empty(query.shape[:3])


def _shape_of_gradients(grad_y, grad_total, query, key, value, fading, *others):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, fading))


_read_operator = custom_op(read, _shape_of_read, backward=_backward_of_operator, setup_context=_keep_for_backward)
_gradients_operator = custom_op(read_gradients, _shape_of_gradients)


def _read(query, key, value, fading, query_index, reach, neighbors, window, dropout, seed):
    batch, heads, length, _ = query.shape
    y = empty_y(query, value)
    total = query.new_empty(batch, heads, length)
    local_key, local_value = (_local(x, query_index, window) for x in (key, value))
    flat_key, flat_value = (_flat(x, query.dtype) for x in (key, value))
    for part in _chunks(query, value, neighbors):
        near = slice(part.start, part.stop + window - 1)
        chosen = _flat_ids(neighbors[:, :, part], key)
        local, far, total[:, :, part] = _weights(
            query[:, :, part],
            local_key[:, :, near],
            _products_at(chosen, flat_key, query[:, :, part]),
            fading,
            reach[:, part],
            query_index[:, part],
            neighbors[:, :, part],
            window,
        )
        local, far = _dropped(local, far, dropout, seed, part.start)
        mixed = _mix_local(local, local_value[:, :, near].to(local.dtype), window)
        y[:, :, part] = (mixed + _mix_at(far, chosen, flat_value)).to(y.dtype)
    return y, total


def _gradients(grad_y, grad_total, query, key, value, fading, query_index, reach, neighbors, window, dropout, seed):
    accumulate = torch.promote_types(torch.float32, query.dtype)
    inputs = (query, key, value, fading)
    grad_query, grad_key, grad_value, grad_fading = grads = [
        torch.zeros(x.shape, dtype=accumulate, device=x.device) for x in inputs
    ]
    local_key, local_value = (_local(x, query_index, window) for x in (key, value))
    grad_local_key, grad_local_value = (torch.zeros_like(x, dtype=accumulate) for x in (local_key, local_value))
    flat_key, flat_value = (_flat(x, accumulate) for x in (key, value))
    far_weights, far_grads = (torch.empty(neighbors.shape, dtype=accumulate, device=query.device) for _ in range(2))
    for part in _chunks(query, value, neighbors):
        near = slice(part.start, part.stop + window - 1)
        chosen, length = _flat_ids(neighbors[:, :, part], key), part.stop - part.start
        near_key, near_value = local_key[:, :, near], local_value[:, :, near].to(accumulate)
        asked, index, found = query[:, :, part], query_index[:, part], neighbors[:, :, part]
        given = grad_y[:, :, part].to(accumulate)
        far_logits = _products_at(chosen, flat_key, asked)
        local, far, _ = _weights(asked, near_key, far_logits, fading, reach[:, part], index, found, window)
        kept_local, kept_far = _dropped(local, far, dropout, seed, part.start)

        # dℓ_j = kept_j (dy · v_j) − p_j (Σ_i kept_i (dy · v_i) − d total)
        size, span = local.shape[-2:]
        blocked_query, blocked_given = _blocks(asked, size), _blocks(given, size)
        dlocal = kept_local * (blocked_given @ _windows(near_value, size, span))
        dfar = kept_far * _products_at(chosen, flat_value, given)
        sums = F.pad(dfar.sum(dim=-1) - grad_total[:, :, part], (0, local.shape[2] * size - length))
        sums = dlocal.sum(dim=-1) + sums.view(dlocal.shape[:-1])
        dlocal -= local * sums.unsqueeze(-1)
        dfar -= far * sums.flatten(2)[:, :, :length, None]

        from_local = dlocal @ _windows(near_key, size, span).transpose(-1, -2)
        grad_query[:, :, part] = from_local.flatten(2, 3)[:, :, :length] + _mix_at(dfar, chosen, flat_key)
        grad_local_key[:, :, near] += _overlapped(dlocal.transpose(-1, -2) @ blocked_query, size, near_key.shape[2])
        grad_local_value[:, :, near] += _overlapped(
            kept_local.transpose(-1, -2) @ blocked_given, size, near_value.shape[2]
        )
        grad_fading -= (dlocal * _local_fade(size, window, dlocal)).sum(dim=(0, 2, 3, 4))
        grad_fading -= (dfar * _far_fade(index, found, dfar)).sum(dim=(0, 2, 3))
        far_weights[:, :, part], far_grads[:, :, part] = kept_far, dfar
    _add_local(grad_key, grad_local_key, query_index, window)
    _add_local(grad_value, grad_local_value, query_index, window)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            at = row, head
            read = _by_entity(neighbors[at], key.shape[2])
            grad_key[at] += _sum_by_entity(read, far_grads[at], query[at].to(accumulate))
            grad_value[at] += _sum_by_entity(read, far_weights[at], grad_y[at].to(accumulate))
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))


def _by_entity(neighbors: torch.Tensor, num_entities: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Who read an entity: `[M, K]` → (places among the M K in the order of entities, where each entity's begin `[N]`).

    What is −1 counts for entity 0: its weight is 0. The order is fixed, so sums over it are the same each time.
    """
    codes = neighbors.clamp(min=0).flatten() << 32 | torch.arange(neighbors.numel(), device=neighbors.device)
    if codes.device.type == "cpu":
        codes.numpy().sort()  # several times faster than torch's sort of int64
    else:
        codes = codes.sort().values
    counts = (codes >> 32).bincount(minlength=num_entities)
    return codes & 0xFFFFFFFF, counts.cumsum(dim=0) - counts


def _sum_by_entity(
    read: tuple[torch.Tensor, torch.Tensor], weights: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """Σ_i weight_ij g_i for each entity j: weights `[M, K]`, vectors `[M, F]` → `[N, F]`."""
    places, begins = read
    queries = places.div(max(weights.shape[-1], 1), rounding_mode="floor")
    weights = weights.flatten().index_select(0, places)
    return F.embedding_bag(queries, vectors, offsets=begins, per_sample_weights=weights, mode="sum")


def _first_of_windows(query_index: torch.Tensor, window: int) -> int | torch.Tensor:
    """The oldest entity in the window of a row's first query: one number if it is the same in all rows."""
    first = query_index[:, 0] - (window - 1)
    if torch.compiler.is_exporting() or bool((first != (start := int(first[0]))).any()):
        return first
    return start


def _local(x: torch.Tensor, query_index: torch.Tensor, window: int) -> torch.Tensor:
    """The entities that windows reach, from the oldest on, zero before their row's start: `[B, H, M + W − 1, ...]`."""
    first, length = _first_of_windows(query_index, window), query_index.shape[1] + window - 1
    if isinstance(first, int):
        held = x[:, :, max(first, 0) : first + length]
        return F.pad(held, (0, 0, -first, 0)) if first < 0 else held
    places = first[:, None] + torch.arange(length, device=x.device)
    rows = x.gather(2, places.clamp(0, x.shape[2] - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return rows.masked_fill((places < 0)[:, None, :, None], 0)


def _add_local(total: torch.Tensor, local: torch.Tensor, query_index: torch.Tensor, window: int) -> None:
    """The adjoint of `_local`: add `[B, H, M + W − 1, ...]` to `total` `[B, H, N, ...]`."""
    first, length = _first_of_windows(query_index, window), local.shape[2]
    if isinstance(first, int):
        held = local[:, :, max(-first, 0) :]
        total[:, :, max(first, 0) : max(first, 0) + held.shape[2]] += held
        return
    places = first[:, None] + torch.arange(length, device=total.device)
    inside = (places >= 0) & (places < total.shape[2])
    places = places.clamp(0, total.shape[2] - 1)[:, None, :, None].expand_as(local)
    total.scatter_add_(2, places, local * inside[:, None, :, None])


def _chunks(query, value, neighbors):
    """Slices of the queries."""
    batch, heads, length, _ = query.shape
    per_query = batch * heads * max(neighbors.shape[-1], 1) * value.shape[-1]
    step = max(64, ELEMENT_CHUNK // per_query)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _flat_ids(neighbors, key):
    """Rows of `key.view(-1, E)` that hold the neighbours; the first of the row where there is none."""
    batch, heads, num_keys, _ = key.shape
    row = torch.arange(batch * heads, device=key.device).view(batch, heads, 1, 1) * num_keys
    return neighbors.clamp(min=0) + row


def _block_length(window, length):
    return min(max(window, 16), length)


def _blocks(x, size):
    """Queries by blocks: `[B, H, M, F]` → `[B, H, blocks, S, F]`, zero after the last."""
    blocks = -(-x.shape[2] // size)
    return F.pad(x, (0, 0, 0, blocks * size - x.shape[2])).unflatten(2, (blocks, size))


def _windows(x, size, span):
    """The entities that the windows of each block hold: `[B, H, M + W − 1, F]` → `[B, H, blocks, F, S + W − 1]`."""
    return F.pad(x, (0, 0, 0, -(x.shape[2] - (span - size)) % size)).unfold(2, span, size)


def _overlapped(windows, size, length):
    """The adjoint of `_windows`: entities' sums over the windows, `[B, H, blocks, span, F]` → `[B, H, length, F]`."""
    blocks, span = windows.shape[2:4]
    if blocks == 1:
        return windows[:, :, 0, :length]
    # Of several blocks each is as long as the local window, so that its windows reach into one block more.
    windows = F.pad(windows, (0, 0, 0, 2 * size - span))
    sums = F.pad(windows[:, :, :, :size], (0, 0, 0, 0, 0, 1)) + F.pad(windows[:, :, :, size:], (0, 0, 0, 0, 1, 0))
    return sums.flatten(2, 3)[:, :, :length]


def _local_fade(size, window, like):
    """log(1 + i − j) within a block, `[S, S + W − 1]`, 0 for what is younger than the query."""
    return torch.log1p(_local_age(size, window, like.device).clamp(min=0).to(like.dtype))


def _local_age(size, window, device):
    span = size + window - 1
    return torch.arange(size, device=device)[:, None] + window - 1 - torch.arange(span, device=device)


def _far_fade(query_index, neighbors, like):
    """log(1 + i − j) of the neighbours, `[B, H, M, K]`."""
    return torch.log1p((query_index[:, None, :, None] - neighbors).to(like.dtype))


def _weights(query, local_key, far_logits, fading, reach, query_index, neighbors, window):
    """Weights of a chunk: of local entities by blocks `[B, H, blocks, S, S + W − 1]`, of neighbours `[B, H, M, K]`.

    Third, log Σ exp ℓ `[B, H, M]`.
    """
    batch, _, length, _ = query.shape
    size = _block_length(window, length)
    blocked_query = _blocks(query, size)
    padding = blocked_query.shape[2] * size - length

    logits = blocked_query @ _windows(local_key, size, size + window - 1)
    age = _local_age(size, window, query.device)
    visible = (age >= 0) & (age < window) & (age <= F.pad(reach, (0, padding)).view(batch, 1, -1, size, 1))
    logits = logits - fading.view(-1, 1, 1, 1) * _local_fade(size, window, logits)
    logits = logits.masked_fill(~visible, -math.inf).flatten(2, 3)[:, :, :length]

    far = far_logits - fading.view(-1, 1, 1) * _far_fade(query_index, neighbors, query)
    far = far.masked_fill(neighbors < 0, -math.inf)

    total = torch.cat([logits, far], dim=-1).logsumexp(dim=-1)
    local = F.pad((logits - total.unsqueeze(-1)).exp(), (0, 0, 0, padding))
    return local.unflatten(2, (-1, size)), (far - total.unsqueeze(-1)).exp(), total


def _dropped(local, far, dropout, seed, first):
    """Leave out weights with probability `dropout`; the same ones whenever seed and first query are the same."""
    if dropout == 0:
        return local, far
    generator = torch.Generator(local.device).manual_seed(int(seed) + first)

    def leave_out(weights):
        kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout
        return weights * kept / (1 - dropout)

    return leave_out(local), leave_out(far)


def _mix_local(weights, values, window):
    """Σ_j weight_ij v_j over blocks: values `[B, H, M + W − 1, D]` → `[B, H, M, D]`."""
    mixed = weights @ _windows(values, *weights.shape[-2:]).transpose(-1, -2)
    return mixed.flatten(2, 3)[:, :, : values.shape[2] - (window - 1)]


def _flat(x, dtype):
    """All rows' entities in one list, `[B H N, F]`."""
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _mix_at(weights, chosen, rows):
    """Σ_j weight_ij x_j of the chosen rows, none of which is copied: two of `[..., K]`, `[all, F]` → `[..., F]`."""
    if not chosen.numel():
        return rows.new_zeros(*chosen.shape[:-1], rows.shape[-1])
    weights = weights.flatten(0, -2)
    return F.embedding_bag(chosen.flatten(0, -2), rows, per_sample_weights=weights, mode="sum").view(
        *chosen.shape[:-1], -1
    )


def _products_at(chosen, rows, vectors):
    """x_j · g_i of the chosen rows, likewise: `[..., K]`, `[all, F]`, `[..., F]` → `[..., K]`."""
    if not chosen.numel():
        return rows.new_zeros(chosen.shape)
    places, num_chosen = torch.arange(chosen.numel(), device=chosen.device), chosen.shape[-1]
    bags = places.div(num_chosen, rounding_mode="floor")
    # A gradient of embedding_bag is what multiplies vectors with the rows of a list.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors.flatten(0, -2), rows, chosen.flatten(), places[::num_chosen], bags, EMBEDDING_BAG_SUM
    )
    return products.view(chosen.shape)


def flow_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    fading: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    ahead: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """The weights of `flow_attention` as a dense matrix `[B, H, M, N]`: O(M N) memory, to be looked at.

    `ahead` is to the entities after i what `reach` is to those before: 0 where only these were read.
    """
    index = torch.arange(key.shape[2], device=key.device)
    age = query_index[:, None, :, None] - index
    visible = (age.abs() < window) & (age <= reach[:, None, :, None]) & (-age <= ahead[:, None, :, None])
    visible = visible.expand(-1, query.shape[1], -1, -1)
    # One column more takes the writes of absent neighbours.
    found = F.pad(torch.zeros_like(visible), (0, 1))
    found = found.scatter(-1, torch.where(neighbors < 0, key.shape[2], neighbors), True)[..., :-1]
    logits = query @ key.transpose(-1, -2) - fading.view(-1, 1, 1) * torch.log1p(age.abs().to(query.dtype))
    return logits.masked_fill(~(visible | found), -math.inf).softmax(dim=-1)


def flow_attention_reference(query, key, value, fading, query_index, reach, neighbors, window):
    """`flow_attention` as a loop over the equation, one entity at a time."""
    batch, heads, length, _ = query.shape
    outputs, totals = [], []
    for row in range(batch):
        for head in range(heads):
            for a in range(length):
                i = int(query_index[row, a])
                oldest = i - min(window - 1, int(reach[row, a]))
                ids = list(range(oldest, i + 1)) + [j for j in neighbors[row, head, a].tolist() if j >= 0]
                age = torch.tensor([1.0 + i - j for j in ids], dtype=query.dtype)
                logits = key[row, head, ids] @ query[row, head, a] - fading[head] * age.log()
                outputs.append(logits.softmax(dim=0) @ value[row, head, ids].to(query.dtype))
                totals.append(logits.logsumexp(dim=0))
    y = torch.stack(outputs).view(batch, heads, length, -1)
    return y.to(value.dtype), torch.stack(totals).view(batch, heads, length)
