"""Flow attention as Triton kernels: `flow_attention.flow_attention` without dropout, forward and backward.

One pass over what a query reads, its neighbours one by one and its local window tile by tile, with a running maximum
(Milakov & Gimelshein 2018); the backward pass computes the weights again from the log-sum that was kept. All
arithmetic is in float32.

Shape letters: B batch, H heads, G = B * H rows, M queries of this call, N stored entities, E query/key features,
D value features, K neighbours, W local window, Q queries of one program, T entities of a tile. Capitals of a kernel
are constants that it is compiled for.
"""

from typing import Any, NamedTuple

try:  # what is imported outside a `try` transformers demands of every machine that loads this file
    import triton
    import triton.language as tl
except ImportError:
    raise


class StridedRows(NamedTuple):
    """A tensor `[B, H, length, features]`: where it starts, and its steps but for the last, which is 1.

    `features` and `padded`, a power of two and at least the 16 of a matrix product, are constants of the kernels.
    """

    start: Any
    batch: int
    head: int
    entity: int
    features: Any
    padded: Any


class Attention(NamedTuple):
    """What the attention reads.

    Attributes:
        query `[B, H, M, E]`, key `[B, H, N, E]`: float32; value `[B, H, N, D]`.
        fading: float32 `[H]`.
        past: int64 `[B]`, index of the first query.
        reach: int64 `[B, M]`.
        neighbors: int64 `[G, M, K]`.
        num_neighbors, window: constants of the kernels.
    """

    query: StridedRows
    key: StridedRows
    value: StridedRows
    fading: Any
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
    start = x.start + row // call.heads * x.batch + row % call.heads * x.head
    return start + ids.to(tl.int64)[:, None] * x.entity + tl.arange(0, x.padded)[None, :]


@triton.jit
def within(x, held):
    return held[:, None] & (tl.arange(0, x.padded)[None, :] < x.features)


@triton.jit
def load_rows(x, call, row, ids, held):
    """Float32 `[ids, padded]`, 0 where not held."""
    return tl.load(addresses(x, call, row, ids), mask=within(x, held), other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, call, row, ids, held, rows):
    tl.store(addresses(x, call, row, ids), rows, mask=within(x, held))


@triton.jit
def add_rows(x, call, row, ids, held, rows):
    tl.atomic_add(addresses(x, call, row, ids), rows, mask=within(x, held), sem="relaxed")


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def log_age(age):
    """log(1 + age), 0 for what is younger than the query."""
    return tl.log(1.0 + tl.maximum(age, 0).to(tl.float32))


@triton.jit
def load_asked(call, row, place):
    """Of the queries at `place` `[Q]`: (which there are, their index, their reach, all int32; the fading)."""
    inside = (place >= 0) & (place < call.length)
    batch = row // call.heads
    index = place + tl.load(call.past + batch).to(tl.int32)
    reach = tl.load(call.reach + batch * call.length + place, mask=inside, other=0).to(tl.int32)
    return inside, index, reach, tl.load(call.fading + row % call.heads)


@triton.jit
def far_logits(query, key, fading, age, found):
    """ℓ `[Q]` of one neighbour each, −inf for none."""
    return tl.where(found >= 0, tl.sum(query * key, axis=1) - fading * log_age(age), float("-inf"))


@triton.jit
def local_logits(query, key, fading, age, reach, window):
    """ℓ `[Q, T]` of entities of this `age`, −inf where the local window of a query does not hold them."""
    visible = (age >= 0) & (age < window) & (age <= reach[:, None])
    return tl.where(visible, product(query, tl.trans(key)) - fading * log_age(age), float("-inf"))


@triton.jit
def forward_kernel(call, y, total, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """y `[B, H, M, D]` and total float32 `[G, M]`."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    place = start + tl.arange(0, BLOCK)
    inside, index, reach, fading = load_asked(call, row, place)
    query = load_rows(call.query, call, row, place, inside)
    top = tl.full([BLOCK], -1e38, tl.float32)  # finite, so that where all is −inf nothing is NaN
    summed = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, call.value.padded], tl.float32)

    for k in range(call.num_neighbors):
        at = (row * call.length + place) * call.num_neighbors + k
        found = tl.load(call.neighbors + at, mask=inside, other=-1).to(tl.int32)
        key = load_rows(call.key, call, row, found, found >= 0)
        value = load_rows(call.value, call, row, found, found >= 0)
        logits = far_logits(query, key, fading, index - found, found)
        new_top = tl.maximum(top, logits)
        scale, weights = tl.exp(top - new_top), tl.exp(logits - new_top)
        top, summed = new_top, summed * scale + weights
        mixed = mixed * scale[:, None] + weights[:, None] * value

    oldest = tl.load(call.past + row // call.heads).to(tl.int32) + start - (call.window - 1)
    for offset in range(0, BLOCK + call.window - 1, TILE):
        near = oldest + offset + tl.arange(0, TILE)
        held = (near >= 0) & (near < call.stored)
        key = load_rows(call.key, call, row, near, held)
        value = load_rows(call.value, call, row, near, held)
        logits = local_logits(query, key, fading, index[:, None] - near[None, :], reach, call.window)
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        scale, weights = tl.exp(top - new_top), tl.exp(logits - new_top[:, None])
        top, summed = new_top, summed * scale + tl.sum(weights, axis=1)
        mixed = mixed * scale[:, None] + product(weights, value)

    store_rows(y, call, row, place, inside, mixed / summed[:, None])
    tl.store(total + row * call.length + place, top + tl.log(summed), mask=inside)


# dℓ_j = p_j (dy · v_j − s), s = Σ_i p_i (dy · v_i) − d total = dy · y − d total.


@triton.jit
def backward_queries_kernel(
    call,
    total,
    y,
    grad_y,
    grad_total,
    sums,
    grad_query,
    grad_fading,
    far_grad_key,
    far_grad_value,
    blocks,
    ATOMIC: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """grad_query `[B, H, M, E]`, each program's share of grad_fading `[G, blocks]`, and s `[G, M]`, float32.

    If ATOMIC, what the neighbours get is added to far_grad_key `[B, H, N, E]` and far_grad_value `[B, H, N, D]`.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside, index, reach, fading = load_asked(call, row, place)
    query = load_rows(call.query, call, row, place, inside)
    given = load_rows(grad_y, call, row, place, inside)
    at = row * call.length + place
    log_sum = tl.load(total + at, mask=inside, other=float("inf"))  # weighs 0 what is not there
    summed = tl.sum(given * load_rows(y, call, row, place, inside), axis=1)
    summed -= tl.load(grad_total + at, mask=inside, other=0.0)
    tl.store(sums + at, summed, mask=inside)
    turned = tl.zeros([BLOCK, call.query.padded], tl.float32)
    faded = tl.zeros([BLOCK], tl.float32)

    for k in range(call.num_neighbors):
        found = tl.load(call.neighbors + at * call.num_neighbors + k, mask=inside, other=-1).to(tl.int32)
        key = load_rows(call.key, call, row, found, found >= 0)
        value = load_rows(call.value, call, row, found, found >= 0)
        age = index - found
        weights = tl.exp(far_logits(query, key, fading, age, found) - log_sum)
        grads = weights * (tl.sum(given * value, axis=1) - summed)
        turned += grads[:, None] * key
        faded += grads * log_age(age)
        if ATOMIC:
            add_rows(far_grad_key, call, row, found, found >= 0, grads[:, None] * query)
            add_rows(far_grad_value, call, row, found, found >= 0, weights[:, None] * given)

    oldest = tl.load(call.past + row // call.heads).to(tl.int32) + block * BLOCK - (call.window - 1)
    for offset in range(0, BLOCK + call.window - 1, TILE):
        near = oldest + offset + tl.arange(0, TILE)
        held = (near >= 0) & (near < call.stored)
        key = load_rows(call.key, call, row, near, held)
        value = load_rows(call.value, call, row, near, held)
        age = index[:, None] - near[None, :]
        weights = tl.exp(local_logits(query, key, fading, age, reach, call.window) - log_sum[:, None])
        grads = weights * (tl.trans(product(value, tl.trans(given))) - summed[:, None])
        turned += product(grads, key)
        faded += tl.sum(grads * log_age(age), axis=1)

    store_rows(grad_query, call, row, place, inside, turned)
    tl.store(grad_fading + row * blocks + block, -tl.sum(faded, axis=0))


@triton.jit
def backward_neighbors_kernel(
    call, pairs, starts, total, grad_y, sums, far_grad_key, far_grad_value, TILE: tl.constexpr
):
    """What one entity gets from the queries that have found it, summed in one order: no atomic additions.

    pairs int64 `[G, M * K]`, places in neighbors sorted by neighbour; starts int64 `[G, N + 1]`, each one's first.
    """
    row = (tl.program_id(0) // call.stored).to(tl.int64)
    entity = (tl.program_id(0) % call.stored) + tl.arange(0, 1)
    there = entity >= 0
    key = load_rows(call.key, call, row, entity, there)
    value = load_rows(call.value, call, row, entity, there)
    key_sum, value_sum = tl.zeros_like(key), tl.zeros_like(value)
    run = starts + row * (call.stored + 1) + tl.program_id(0) % call.stored
    last = tl.load(run + 1)
    for start in range(tl.load(run), last, TILE):
        at = start + tl.arange(0, TILE)
        pair = tl.load(pairs + row * call.length * call.num_neighbors + at, mask=at < last, other=-1)
        place = tl.where(pair < 0, -1, pair // call.num_neighbors).to(tl.int32)
        inside, index, _, fading = load_asked(call, row, place)
        query = load_rows(call.query, call, row, place, inside)
        given = load_rows(grad_y, call, row, place, inside)
        asked = row * call.length + place
        log_sum = tl.load(total + asked, mask=inside, other=float("inf"))
        weights = tl.exp(far_logits(query, key, fading, index - entity, place) - log_sum)
        grads = weights * (tl.sum(given * value, axis=1) - tl.load(sums + asked, mask=inside, other=0.0))
        key_sum += tl.sum(grads[:, None] * query, axis=0)[None, :]
        value_sum += tl.sum(weights[:, None] * given, axis=0)[None, :]
    store_rows(far_grad_key, call, row, entity, there, key_sum)
    store_rows(far_grad_value, call, row, entity, there, value_sum)


@triton.jit
def backward_keys_kernel(
    call,
    total,
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
    """grad_key `[B, H, N, E]` and grad_value `[B, H, N, D]`: what entities got as neighbours, if any, and what the
    queries get from their local windows that they lie in."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    entity = start + tl.arange(0, BLOCK)
    held = entity < call.stored
    key = load_rows(call.key, call, row, entity, held)
    value = load_rows(call.value, call, row, entity, held)
    key_sum, value_sum = tl.zeros_like(key), tl.zeros_like(value)
    if call.num_neighbors > 0:
        key_sum = load_rows(far_grad_key, call, row, entity, held)
        value_sum = load_rows(far_grad_value, call, row, entity, held)
    first = start - tl.load(call.past + row // call.heads).to(tl.int32)
    for offset in range(0, BLOCK + call.window - 1, TILE):
        place = first + offset + tl.arange(0, TILE)
        inside, index, reach, fading = load_asked(call, row, place)
        query = load_rows(call.query, call, row, place, inside)
        given = load_rows(grad_y, call, row, place, inside)
        at = row * call.length + place
        log_sum = tl.load(total + at, mask=inside, other=float("inf"))
        summed = tl.load(sums + at, mask=inside, other=0.0)
        age = index[:, None] - entity[None, :]
        weights = tl.exp(local_logits(query, key, fading, age, reach, call.window) - log_sum[:, None])
        grads = weights * (product(given, tl.trans(value)) - summed[:, None])
        key_sum += product(tl.trans(grads), query)
        value_sum += product(tl.trans(weights), given)
    store_rows(grad_key, call, row, entity, held, key_sum)
    store_rows(grad_value, call, row, entity, held, value_sum)
