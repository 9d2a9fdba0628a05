"""Flow attention in torch operations: `flow_attention.flow_attention` for any device, dtype and dropout.

The forward pass processes the queries in chunks and keeps none of their logits; the backward pass recomputes them
chunk by chunk, so memory is linear in the length. Entities of the local window are read as blocks, by matrix products;
neighbours are read by embedding bags, without a copy per query.

Shape letters: B batch, H heads, M queries of this call, N stored entities, E query/key features, D value features,
K neighbours, W local window, S queries per block, F features of either kind.
"""

import math

import torch
from torch.nn import functional as F

EMBEDDING_BAG_SUM = 0  # torch's number for mode="sum"
ELEMENT_CHUNK = 2**21  # neighbours' value features of the queries in one chunk


def empty_y(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Allocate y `[B, H, M, D]` with the heads of an entity contiguous in memory, for the output projection."""
    batch, heads, length, _ = query.shape
    return value.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


def flow_attention_forward_torch(query, key, value, decay, query_index, reach, neighbors, window, dropout, seed):
    """`flow_attention.flow_attention_forward` in torch operations."""
    batch, heads, length, _ = query.shape
    y = empty_y(query, value)
    lse = query.new_empty(batch, heads, length)
    local_key, local_value = (_local(x, query_index, window) for x in (key, value))
    flat_key, flat_value = (_flat(x, query.dtype) for x in (key, value))
    for part in _chunks(query, value, neighbors):
        near = slice(part.start, part.stop + window - 1)
        flat_ids = _flat_ids(neighbors[:, :, part], key)
        local, far, lse[:, :, part] = _weights(
            query[:, :, part],
            local_key[:, :, near],
            gather_dot(flat_ids, flat_key, query[:, :, part]),
            decay,
            reach[:, part],
            query_index[:, part],
            neighbors[:, :, part],
            window,
        )
        local, far = _apply_dropout(local, far, dropout, seed, part.start)
        mixed = _mix_local(local, local_value[:, :, near].to(local.dtype), window)
        y[:, :, part] = (mixed + gather_weighted_sum(far, flat_ids, flat_value)).to(y.dtype)
    return y, lse


def flow_attention_backward_torch(
    grad_y, grad_lse, query, key, value, decay, query_index, reach, neighbors, window, dropout, seed
):
    """`flow_attention.flow_attention_backward` in torch operations, with weights recomputed from query and key."""
    accumulate = torch.promote_types(torch.float32, query.dtype)
    inputs = (query, key, value, decay)
    grad_query, grad_key, grad_value, grad_decay = grads = [
        torch.zeros(x.shape, dtype=accumulate, device=x.device) for x in inputs
    ]
    local_key, local_value = (_local(x, query_index, window) for x in (key, value))
    grad_local_key, grad_local_value = (torch.zeros_like(x, dtype=accumulate) for x in (local_key, local_value))
    flat_key, flat_value = (_flat(x, accumulate) for x in (key, value))
    far_weights, far_grads = (torch.empty(neighbors.shape, dtype=accumulate, device=query.device) for _ in range(2))
    for part in _chunks(query, value, neighbors):
        near = slice(part.start, part.stop + window - 1)
        flat_ids, length = _flat_ids(neighbors[:, :, part], key), part.stop - part.start
        near_key, near_value = local_key[:, :, near], local_value[:, :, near].to(accumulate)
        part_query, index, part_neighbors = query[:, :, part], query_index[:, part], neighbors[:, :, part]
        part_grad_y = grad_y[:, :, part].to(accumulate)
        far_logits = gather_dot(flat_ids, flat_key, part_query)
        local, far, _ = _weights(
            part_query, near_key, far_logits, decay, reach[:, part], index, part_neighbors, window
        )
        kept_local, kept_far = _apply_dropout(local, far, dropout, seed, part.start)

        # dℓ_j = kept_j (dy · v_j) − p_j (Σ_i kept_i (dy · v_i) − d lse)
        size, span = local.shape[-2:]
        blocked_query, blocked_grad = _blocks(part_query, size), _blocks(part_grad_y, size)
        dlocal = kept_local * (blocked_grad @ _windows(near_value, size, span))
        dfar = kept_far * gather_dot(flat_ids, flat_value, part_grad_y)
        sums = F.pad(dfar.sum(dim=-1) - grad_lse[:, :, part], (0, local.shape[2] * size - length))
        sums = dlocal.sum(dim=-1) + sums.view(dlocal.shape[:-1])
        dlocal -= local * sums.unsqueeze(-1)
        dfar -= far * sums.flatten(2)[:, :, :length, None]

        from_local = dlocal @ _windows(near_key, size, span).transpose(-1, -2)
        grad_query[:, :, part] = from_local.flatten(2, 3)[:, :, :length] + gather_weighted_sum(
            dfar, flat_ids, flat_key
        )
        grad_local_key[:, :, near] += _overlapped(dlocal.transpose(-1, -2) @ blocked_query, size, near_key.shape[2])
        grad_local_value[:, :, near] += _overlapped(
            kept_local.transpose(-1, -2) @ blocked_grad, size, near_value.shape[2]
        )
        grad_decay -= (dlocal * _local_log_age(size, window, dlocal)).sum(dim=(0, 2, 3, 4))
        grad_decay -= (dfar * _far_log_age(index, part_neighbors, dfar)).sum(dim=(0, 2, 3))
        far_weights[:, :, part], far_grads[:, :, part] = kept_far, dfar
    _add_local(grad_key, grad_local_key, query_index, window)
    _add_local(grad_value, grad_local_value, query_index, window)
    _add_far(grad_key, grad_value, neighbors, far_grads, far_weights, query, grad_y)
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))


def _add_far(grad_key, grad_value, neighbors, far_grads, far_weights, query, grad_y):
    """Add the gradients that entities receive as neighbours to grad_key `[B, H, N, E]` and grad_value `[B, H, N, D]`.

    One (row, head) at a time, so the inverted neighbour lists take O(M K) memory.
    """
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            at = row, head
            inverted = invert_neighbors(neighbors[at], grad_key.shape[2])
            grad_key[at] += _sum_by_entity(inverted, far_grads[at], query[at].to(grad_key.dtype))
            grad_value[at] += _sum_by_entity(inverted, far_weights[at], grad_y[at].to(grad_value.dtype))


def invert_neighbors(neighbors: torch.Tensor, num_entities: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Group the entries of a neighbour list by the entity that they name.

    An entry of −1 is grouped with entity 0; its weight is 0. The order within a group is fixed, so sums over it are
    reproducible.

    Args:
        neighbors: int64 `[M, K]`.
        num_entities: N.

    Returns:
        (indices of the entries in flattened `neighbors`, int64 `[M K]`; start of each entity's group, int64 `[N]`).
    """
    codes = neighbors.clamp(min=0).flatten() << 32 | torch.arange(neighbors.numel(), device=neighbors.device)
    if codes.device.type == "cpu":
        codes.numpy().sort()  # several times faster than torch's sort of int64
    else:
        codes = codes.sort().values
    counts = (codes >> 32).bincount(minlength=num_entities)
    return codes & 0xFFFFFFFF, counts.cumsum(dim=0) - counts


def _sum_by_entity(
    inverted: tuple[torch.Tensor, torch.Tensor], weights: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """Return Σ_i weight_ij g_i for each entity j, `[N, F]`; weights `[M, K]`, vectors g `[M, F]`."""
    entries, starts = inverted
    queries = entries.div(max(weights.shape[-1], 1), rounding_mode="floor")
    weights = weights.flatten().index_select(0, entries)
    return F.embedding_bag(queries, vectors, offsets=starts, per_sample_weights=weights, mode="sum")


def _first_of_windows(query_index: torch.Tensor, window: int) -> int | torch.Tensor:
    """Return the oldest position in the window of each row's first query.

    An int if it is the same in all rows, else int64 `[B]`.
    """
    first = query_index[:, 0] - (window - 1)
    if torch.compiler.is_exporting() or bool((first != (start := int(first[0]))).any()):
        return first
    return start


def _local(x: torch.Tensor, query_index: torch.Tensor, window: int) -> torch.Tensor:
    """Return the entities in any local window, oldest first, zero before the row's start: `[B, H, M + W − 1, ...]`."""
    first, length = _first_of_windows(query_index, window), query_index.shape[1] + window - 1
    if isinstance(first, int):
        stored = x[:, :, max(first, 0) : first + length]
        return F.pad(stored, (0, 0, -first, 0)) if first < 0 else stored
    positions = first[:, None] + torch.arange(length, device=x.device)
    rows = x.gather(2, positions.clamp(0, x.shape[2] - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return rows.masked_fill((positions < 0)[:, None, :, None], 0)


def _add_local(grad: torch.Tensor, grad_local: torch.Tensor, query_index: torch.Tensor, window: int) -> None:
    """Adjoint of `_local`: add `grad_local` `[B, H, M + W − 1, ...]` to `grad` `[B, H, N, ...]` in place."""
    first, length = _first_of_windows(query_index, window), grad_local.shape[2]
    if isinstance(first, int):
        grad_local = grad_local[:, :, max(-first, 0) :]
        grad[:, :, max(first, 0) : max(first, 0) + grad_local.shape[2]] += grad_local
        return
    positions = first[:, None] + torch.arange(length, device=grad.device)
    inside = (positions >= 0) & (positions < grad.shape[2])
    positions = positions.clamp(0, grad.shape[2] - 1)[:, None, :, None].expand_as(grad_local)
    grad.scatter_add_(2, positions, grad_local * inside[:, None, :, None])


def _chunks(query, value, neighbors):
    """Return slices of the queries, at least 64 per chunk."""
    batch, heads, length, _ = query.shape
    per_query = batch * heads * max(neighbors.shape[-1], 1) * value.shape[-1]
    step = max(64, ELEMENT_CHUNK // per_query)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _flat_ids(neighbors, key):
    """Return the row of `key.view(-1, E)` of each neighbour; entity 0 of its row for −1."""
    batch, heads, num_keys, _ = key.shape
    row = torch.arange(batch * heads, device=key.device).view(batch, heads, 1, 1) * num_keys
    return neighbors.clamp(min=0) + row


def _block_length(window, length):
    """Return S: the window, but at least 16 and at most the length."""
    return min(max(window, 16), length)


def _blocks(x, size):
    """Split queries `[B, H, M, F]` into blocks `[B, H, blocks, S, F]`, padded with zeros at the end."""
    blocks = -(-x.shape[2] // size)
    return F.pad(x, (0, 0, 0, blocks * size - x.shape[2])).unflatten(2, (blocks, size))


def _windows(x, size, span):
    """Return the entities in the windows of each block: `[B, H, M + W − 1, F]` → `[B, H, blocks, F, S + W − 1]`."""
    return F.pad(x, (0, 0, 0, -(x.shape[2] - (span - size)) % size)).unfold(2, span, size)


def _overlapped(windows, size, length):
    """Adjoint of `_windows`: sum `[B, H, blocks, S + W − 1, F]` over the blocks per entity, → `[B, H, length, F]`."""
    blocks, span = windows.shape[2:4]
    if blocks == 1:
        return windows[:, :, 0, :length]
    # With several blocks S ≥ W, so the windows of a block overlap only the next block.
    windows = F.pad(windows, (0, 0, 0, 2 * size - span))
    sums = F.pad(windows[:, :, :, :size], (0, 0, 0, 0, 0, 1)) + F.pad(windows[:, :, :, size:], (0, 0, 0, 0, 1, 0))
    return sums.flatten(2, 3)[:, :, :length]


def _local_log_age(size, window, like):
    """Return log(1 + i − j) within a block, `[S, S + W − 1]`; 0 for entities after the query."""
    return torch.log1p(_local_age(size, window, like.device).clamp(min=0).to(like.dtype))


def _local_age(size, window, device):
    """Return i − j within a block, `[S, S + W − 1]`."""
    span = size + window - 1
    return torch.arange(size, device=device)[:, None] + window - 1 - torch.arange(span, device=device)


def _far_log_age(query_index, neighbors, like):
    """Return log(1 + i − j) of the neighbours, `[B, H, M, K]`."""
    return torch.log1p((query_index[:, None, :, None] - neighbors).to(like.dtype))


def _weights(query, local_key, far_logits, decay, reach, query_index, neighbors, window):
    """Compute the attention weights of one chunk of queries.

    Returns:
        (weights of the local window by block `[B, H, blocks, S, S + W − 1]`, weights of the neighbours `[B, H, M, K]`,
        log Σ exp ℓ `[B, H, M]`).
    """
    batch, _, length, _ = query.shape
    size = _block_length(window, length)
    blocked_query = _blocks(query, size)
    padding = blocked_query.shape[2] * size - length

    logits = blocked_query @ _windows(local_key, size, size + window - 1)
    age = _local_age(size, window, query.device)
    visible = (age >= 0) & (age < window) & (age <= F.pad(reach, (0, padding)).view(batch, 1, -1, size, 1))
    logits = logits - decay.view(-1, 1, 1, 1) * _local_log_age(size, window, logits)
    logits = logits.masked_fill(~visible, -math.inf).flatten(2, 3)[:, :, :length]

    far = far_logits - decay.view(-1, 1, 1) * _far_log_age(query_index, neighbors, query)
    far = far.masked_fill(neighbors < 0, -math.inf)

    lse = torch.cat([logits, far], dim=-1).logsumexp(dim=-1)
    local = F.pad((logits - lse.unsqueeze(-1)).exp(), (0, 0, 0, padding))
    return local.unflatten(2, (-1, size)), (far - lse.unsqueeze(-1)).exp(), lse


def _apply_dropout(local, far, dropout, seed, first):
    """Drop weights with probability `dropout`.

    Equal `seed` and index of the `first` query drop the same weights: the backward pass repeats the forward pass's.
    """
    if dropout == 0:
        return local, far
    generator = torch.Generator(local.device).manual_seed(int(seed) + first)

    def drop(weights):
        kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout
        return weights * kept / (1 - dropout)

    return drop(local), drop(far)


def _mix_local(weights, values, window):
    """Return Σ_j weight_ij v_j over the local windows, `[B, H, M, D]`; values `[B, H, M + W − 1, D]`."""
    mixed = weights @ _windows(values, *weights.shape[-2:]).transpose(-1, -2)
    return mixed.flatten(2, 3)[:, :, : values.shape[2] - (window - 1)]


def _flat(x, dtype):
    """Flatten the entities of all rows and heads to one list, `[B H N, F]`."""
    return x.reshape(-1, x.shape[-1]).to(dtype)


def gather_weighted_sum(weights, flat_ids, rows):
    """Return Σ_j weight_ij x_j over gathered rows x, `[..., F]`, without a copy of them.

    Args:
        weights: `[..., K]`.
        flat_ids: int64 `[..., K]`, indices into `rows`.
        rows: `[B H N, F]`.
    """
    if not flat_ids.numel():
        return rows.new_zeros(*flat_ids.shape[:-1], rows.shape[-1])
    weights = weights.flatten(0, -2)
    return F.embedding_bag(flat_ids.flatten(0, -2), rows, per_sample_weights=weights, mode="sum").view(
        *flat_ids.shape[:-1], -1
    )


def gather_dot(flat_ids, rows, vectors):
    """Return x_j · g_i of gathered rows x with vectors g, `[..., K]`, without a copy of the rows.

    Args:
        flat_ids: int64 `[..., K]`, indices into `rows`.
        rows: `[B H N, F]`.
        vectors: `[..., F]`.
    """
    if not flat_ids.numel():
        return rows.new_zeros(flat_ids.shape)
    entries, num_neighbors = torch.arange(flat_ids.numel(), device=flat_ids.device), flat_ids.shape[-1]
    bags = entries.div(num_neighbors, rounding_mode="floor")
    # The gradient of embedding_bag with respect to its weights is this dot product.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors.flatten(0, -2), rows, flat_ids.flatten(), entries[::num_neighbors], bags, EMBEDDING_BAG_SUM
    )
    return products.view(flat_ids.shape)
