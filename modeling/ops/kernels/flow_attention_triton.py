"""Triton kernels of flow attention: `flow_attention.flow_attention` without dropout, forward and backward.

Each query makes one pass over its neighbours, one by one, and its local window, tile by tile, with an online softmax
(Milakov & Gimelshein 2018). The backward pass recomputes the weights from the log-sum-exp of the forward pass. All
arithmetic is in float32.

Shape letters: B batch, H heads, G = B * H rows, M queries of this call, N stored entities, E query/key features,
D value features, K neighbours, W local window, Q queries per program, T entities per tile. Kernel parameters in
capitals are compile-time constants.
"""

from typing import Any, NamedTuple

try:  # transformers requires every package imported outside a `try` on each machine that loads this file
    import triton
    import triton.language as tl
except ImportError:
    raise


class StridedRows(NamedTuple):
    """A tensor `[B, H, length, features]`: address and strides. The stride of features is 1.

    `features` and `padded` are compile-time constants. `padded` is `features` rounded up to a power of two, at least
    16, the smallest size of a matrix product.
    """

    start: Any
    batch: int
    head: int
    entity: int
    features: Any
    padded: Any


class Attention(NamedTuple):
    """Inputs of the kernels.

    Attributes:
        query: float32 `[B, H, M, E]`.
        key: float32 `[B, H, N, E]`.
        value: `[B, H, N, D]`.
        decay: float32 `[H]`.
        past: int64 `[B]`, position of the first query.
        reach: int64 `[B, M]`, see `flow_attention`.
        neighbors: int64 `[G, M, K]`.
        heads, length, stored: H, M, N.
        num_neighbors, window: K and W, compile-time constants.
    """

    query: StridedRows
    key: StridedRows
    value: StridedRows
    decay: Any
    past: Any
    reach: Any
    neighbors: Any
    heads: int
    length: int
    stored: int
    num_neighbors: Any
    window: Any


@triton.jit
def addresses(x, call, row, ids):
    """Addresses `[ids, padded]` of entities of a row."""
    start = x.start + row // call.heads * x.batch + row % call.heads * x.head
    return start + ids.to(tl.int64)[:, None] * x.entity + tl.arange(0, x.padded)[None, :]


@triton.jit
def within(x, exists):
    """Mask `[ids, padded]` of existing entities and features."""
    return exists[:, None] & (tl.arange(0, x.padded)[None, :] < x.features)


@triton.jit
def load_rows(x, call, row, ids, exists):
    """Load entities of a row as float32 `[ids, padded]`, 0 where `exists` is False."""
    return tl.load(addresses(x, call, row, ids), mask=within(x, exists), other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, call, row, ids, exists, rows):
    """Store entities of a row."""
    tl.store(addresses(x, call, row, ids), rows, mask=within(x, exists))


@triton.jit
def add_rows(x, call, row, ids, exists, rows):
    """Add to entities of a row atomically."""
    tl.atomic_add(addresses(x, call, row, ids), rows, mask=within(x, exists), sem="relaxed")


@triton.jit
def product(a, b):
    """Matrix product in full float32 precision."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def log_age(age):
    """log(1 + age); 0 for entities after the query."""
    return tl.log(1.0 + tl.maximum(age, 0).to(tl.float32))


@triton.jit
def load_queries(call, row, place):
    """Load (existence mask, position int32, reach int32) of the queries at `place` `[Q]`, and the head's decay."""
    inside = (place >= 0) & (place < call.length)
    batch = row // call.heads
    index = place + tl.load(call.past + batch).to(tl.int32)
    reach = tl.load(call.reach + batch * call.length + place, mask=inside, other=0).to(tl.int32)
    return inside, index, reach, tl.load(call.decay + row % call.heads)


@triton.jit
def far_logits(query, key, decay, age, neighbor):
    """ℓ `[Q]` of one neighbour per query, −inf for none."""
    return tl.where(neighbor >= 0, tl.sum(query * key, axis=1) - decay * log_age(age), float("-inf"))


@triton.jit
def local_logits(query, key, decay, age, reach, window):
    """ℓ `[Q, T]` of entities at distance `age`, −inf outside a query's local window."""
    visible = (age >= 0) & (age < window) & (age <= reach[:, None])
    return tl.where(visible, product(query, tl.trans(key)) - decay * log_age(age), float("-inf"))


@triton.jit
def forward_kernel(call, y, lse, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Compute y `[B, H, M, D]` and lse float32 `[G, M]`."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    place = start + tl.arange(0, BLOCK)
    inside, index, reach, decay = load_queries(call, row, place)
    query = load_rows(call.query, call, row, place, inside)
    top = tl.full([BLOCK], -1e38, tl.float32)  # finite, so that −inf − top is not NaN if all logits are −inf
    summed = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, call.value.padded], tl.float32)

    for k in range(call.num_neighbors):
        at = (row * call.length + place) * call.num_neighbors + k
        neighbor = tl.load(call.neighbors + at, mask=inside, other=-1).to(tl.int32)
        key = load_rows(call.key, call, row, neighbor, neighbor >= 0)
        value = load_rows(call.value, call, row, neighbor, neighbor >= 0)
        logits = far_logits(query, key, decay, index - neighbor, neighbor)
        new_top = tl.maximum(top, logits)
        scale, weights = tl.exp(top - new_top), tl.exp(logits - new_top)
        top, summed = new_top, summed * scale + weights
        mixed = mixed * scale[:, None] + weights[:, None] * value

    oldest = tl.load(call.past + row // call.heads).to(tl.int32) + start - (call.window - 1)
    for offset in range(0, BLOCK + call.window - 1, TILE):
        near = oldest + offset + tl.arange(0, TILE)
        exists = (near >= 0) & (near < call.stored)
        key = load_rows(call.key, call, row, near, exists)
        value = load_rows(call.value, call, row, near, exists)
        logits = local_logits(query, key, decay, index[:, None] - near[None, :], reach, call.window)
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        scale, weights = tl.exp(top - new_top), tl.exp(logits - new_top[:, None])
        top, summed = new_top, summed * scale + tl.sum(weights, axis=1)
        mixed = mixed * scale[:, None] + product(weights, value)

    store_rows(y, call, row, place, inside, mixed / summed[:, None])
    tl.store(lse + row * call.length + place, top + tl.log(summed), mask=inside)


# dℓ_j = p_j (dy · v_j − s), s = Σ_i p_i (dy · v_i) − d lse = dy · y − d lse.


@triton.jit
def backward_queries_kernel(
    call,
    lse,
    y,
    grad_y,
    grad_lse,
    sums,
    grad_query,
    grad_decay,
    far_grad_key,
    far_grad_value,
    blocks,
    ATOMIC: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute grad_query `[B, H, M, E]`, partial sums of grad_decay `[G, blocks]`, and s `[G, M]`, all float32.

    One kernel, because its outputs share the weights. If ATOMIC, add the gradients of the neighbours to far_grad_key
    `[B, H, N, E]` and far_grad_value `[B, H, N, D]`.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside, index, reach, decay = load_queries(call, row, place)
    query = load_rows(call.query, call, row, place, inside)
    grad_out = load_rows(grad_y, call, row, place, inside)
    at = row * call.length + place
    log_sum = tl.load(lse + at, mask=inside, other=float("inf"))  # inf gives missing queries weight 0
    summed = tl.sum(grad_out * load_rows(y, call, row, place, inside), axis=1)
    summed -= tl.load(grad_lse + at, mask=inside, other=0.0)
    tl.store(sums + at, summed, mask=inside)
    query_sum = tl.zeros([BLOCK, call.query.padded], tl.float32)
    decay_sum = tl.zeros([BLOCK], tl.float32)

    for k in range(call.num_neighbors):
        neighbor = tl.load(call.neighbors + at * call.num_neighbors + k, mask=inside, other=-1).to(tl.int32)
        key = load_rows(call.key, call, row, neighbor, neighbor >= 0)
        value = load_rows(call.value, call, row, neighbor, neighbor >= 0)
        age = index - neighbor
        weights = tl.exp(far_logits(query, key, decay, age, neighbor) - log_sum)
        grads = weights * (tl.sum(grad_out * value, axis=1) - summed)
        query_sum += grads[:, None] * key
        decay_sum += grads * log_age(age)
        if ATOMIC:
            add_rows(far_grad_key, call, row, neighbor, neighbor >= 0, grads[:, None] * query)
            add_rows(far_grad_value, call, row, neighbor, neighbor >= 0, weights[:, None] * grad_out)

    oldest = tl.load(call.past + row // call.heads).to(tl.int32) + block * BLOCK - (call.window - 1)
    for offset in range(0, BLOCK + call.window - 1, TILE):
        near = oldest + offset + tl.arange(0, TILE)
        exists = (near >= 0) & (near < call.stored)
        key = load_rows(call.key, call, row, near, exists)
        value = load_rows(call.value, call, row, near, exists)
        age = index[:, None] - near[None, :]
        weights = tl.exp(local_logits(query, key, decay, age, reach, call.window) - log_sum[:, None])
        grads = weights * (tl.trans(product(value, tl.trans(grad_out))) - summed[:, None])
        query_sum += product(grads, key)
        decay_sum += tl.sum(grads * log_age(age), axis=1)

    store_rows(grad_query, call, row, place, inside, query_sum)
    tl.store(grad_decay + row * blocks + block, -tl.sum(decay_sum, axis=0))


@triton.jit
def backward_neighbors_kernel(
    call, pairs, starts, lse, grad_y, sums, far_grad_key, far_grad_value, TILE: tl.constexpr
):
    """Sum the gradients of one entity over the queries whose neighbour it is, in a fixed order: reproducible.

    pairs int64 `[G, M K]`: indices into `neighbors`, sorted by neighbour. starts int64 `[G, N + 1]`: first pair of
    each entity.
    """
    row = (tl.program_id(0) // call.stored).to(tl.int64)
    entity = (tl.program_id(0) % call.stored) + tl.arange(0, 1)
    exists = entity >= 0
    key = load_rows(call.key, call, row, entity, exists)
    value = load_rows(call.value, call, row, entity, exists)
    key_sum, value_sum = tl.zeros_like(key), tl.zeros_like(value)
    run = starts + row * (call.stored + 1) + tl.program_id(0) % call.stored
    last = tl.load(run + 1)
    for start in range(tl.load(run), last, TILE):
        at = start + tl.arange(0, TILE)
        pair = tl.load(pairs + row * call.length * call.num_neighbors + at, mask=at < last, other=-1)
        place = tl.where(pair < 0, -1, pair // call.num_neighbors).to(tl.int32)
        inside, index, _, decay = load_queries(call, row, place)
        query = load_rows(call.query, call, row, place, inside)
        grad_out = load_rows(grad_y, call, row, place, inside)
        query_at = row * call.length + place
        log_sum = tl.load(lse + query_at, mask=inside, other=float("inf"))
        weights = tl.exp(far_logits(query, key, decay, index - entity, place) - log_sum)
        grads = weights * (tl.sum(grad_out * value, axis=1) - tl.load(sums + query_at, mask=inside, other=0.0))
        key_sum += tl.sum(grads[:, None] * query, axis=0)[None, :]
        value_sum += tl.sum(weights[:, None] * grad_out, axis=0)[None, :]
    store_rows(far_grad_key, call, row, entity, exists, key_sum)
    store_rows(far_grad_value, call, row, entity, exists, value_sum)


@triton.jit
def backward_keys_kernel(
    call,
    lse,
    grad_y,
    sums,
    far_grad_key,
    far_grad_value,
    grad_key,
    grad_value,
    blocks,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute grad_key `[B, H, N, E]` and grad_value `[B, H, N, D]`.

    They are the gradients as neighbours, from the other kernels, plus those from the local windows.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    entity = start + tl.arange(0, BLOCK)
    exists = entity < call.stored
    key = load_rows(call.key, call, row, entity, exists)
    value = load_rows(call.value, call, row, entity, exists)
    key_sum, value_sum = tl.zeros_like(key), tl.zeros_like(value)
    if call.num_neighbors > 0:
        key_sum = load_rows(far_grad_key, call, row, entity, exists)
        value_sum = load_rows(far_grad_value, call, row, entity, exists)
    first = start - tl.load(call.past + row // call.heads).to(tl.int32)
    for offset in range(0, BLOCK + call.window - 1, TILE):
        place = first + offset + tl.arange(0, TILE)
        inside, index, reach, decay = load_queries(call, row, place)
        query = load_rows(call.query, call, row, place, inside)
        grad_out = load_rows(grad_y, call, row, place, inside)
        at = row * call.length + place
        log_sum = tl.load(lse + at, mask=inside, other=float("inf"))
        summed = tl.load(sums + at, mask=inside, other=0.0)
        age = index[:, None] - entity[None, :]
        weights = tl.exp(local_logits(query, key, decay, age, reach, call.window) - log_sum[:, None])
        grads = weights * (product(grad_out, tl.trans(value)) - summed[:, None])
        key_sum += product(tl.trans(grads), query)
        value_sum += product(tl.trans(weights), grad_out)
    store_rows(grad_key, call, row, entity, exists, key_sum)
    store_rows(grad_value, call, row, entity, exists, value_sum)
