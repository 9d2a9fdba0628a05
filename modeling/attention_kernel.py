"""Flow attention in C, entity by entity, forward and backward: `flow_attention.flow_attention` in float32 on the CPU.

The backward pass computes the weights again from the log-sum that the forward pass kept. Each (row, head) is summed in
one order, whatever the number of threads.
"""

import ctypes
from functools import cache

import torch

from .native_library import in_threads, native_library, switched_on

MOST_READ = 2**14  # entities of a query: the code holds their logits on the stack
# Only the sums that say so are reassociated to run in vector registers.
FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd")
SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

/* exp for x <= 0 to 2 units in the last place, in a form that compilers vectorise */
static inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    float whole = floorf(x * 1.44269504088896341f + 0.5f);
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    union { int32_t i; float f; } scale = {.i = ((int32_t)whole + 127) << 23};
    return y * scale.f;
}

/* A tensor [B, H, length, features]: where it starts, and its steps in floats but for the last, which is 1. */
typedef struct { float *start; int64_t batch, head, entity; } Tensor;

typedef struct {
    int64_t heads, length, features, value_features, num_neighbors, window;
    Tensor query, key, value, y, total, grad_query, grad_key, grad_value, grad_y, grad_total;
    const float *fading, *fade; /* [H]; log(1 + age) for every age */
    const int64_t *index, *reach; /* [B, M] */
    const int64_t *neighbors; /* [B, H, M, K] */
    float *grad_fading; /* [B, H] */
} Call;

static inline float *row(Tensor x, int64_t b, int64_t h) { return x.start + b * x.batch + h * x.head; }

/* The entities that query m reads, and their logits. Returns how many there are. */
static inline int64_t logits_of(const Call *c, int64_t b, int64_t h, int64_t m, int64_t *ids, int64_t *ages,
                                float *out) {
    const float *query = row(c->query, b, h) + m * c->query.entity, *keys = row(c->key, b, h);
    int64_t i = c->index[b * c->length + m], reach = c->reach[b * c->length + m], count = 0;
    int64_t near = reach < c->window - 1 ? reach : c->window - 1;
    for (int64_t age = near; age >= 0; age--) ages[count] = age, ids[count++] = i - age;
    const int64_t *far = c->neighbors + ((b * c->heads + h) * c->length + m) * c->num_neighbors;
    for (int64_t k = 0; k < c->num_neighbors; k++)
        if (far[k] >= 0) ages[count] = i - far[k], ids[count++] = far[k];
    for (int64_t n = 0; n < count; n++) {
        const float *key = keys + ids[n] * c->key.entity;
        float sum = 0;
        for (int64_t e = 0; e < c->features; e++) sum += query[e] * key[e];
        out[n] = sum - c->fading[h] * c->fade[ages[n]];
    }
    return count;
}

/* Rows of features that query m reads far away, asked for while the query before it is worked on. */
static inline void fetch(const Call *c, int64_t b, int64_t h, int64_t m, Tensor x, int64_t features, int write) {
    if (m >= c->length) return;
    const int64_t *far = c->neighbors + ((b * c->heads + h) * c->length + m) * c->num_neighbors;
    const float *rows = row(x, b, h);
    for (int64_t k = 0; k < c->num_neighbors; k++)
        for (int64_t d = 0; d < features && far[k] >= 0; d += 16)
            if (write) __builtin_prefetch(rows + far[k] * x.entity + d, 1);
            else __builtin_prefetch(rows + far[k] * x.entity + d, 0);
}

/* y = sum_n weights[n] values[ids[n]], four at a time so that y is loaded and stored a quarter as often */
static inline void mix(float *restrict y, int64_t features, int64_t count, const float *weights, const int64_t *ids,
                       const float *values, int64_t step) {
    int64_t n = 0;
    memset(y, 0, features * sizeof(float));
    for (; n + 4 <= count; n += 4) {
        const float *v0 = values + ids[n] * step, *v1 = values + ids[n + 1] * step;
        const float *v2 = values + ids[n + 2] * step, *v3 = values + ids[n + 3] * step;
        float w0 = weights[n], w1 = weights[n + 1], w2 = weights[n + 2], w3 = weights[n + 3];
        for (int64_t d = 0; d < features; d++) y[d] += (w0 * v0[d] + w1 * v1[d]) + (w2 * v2[d] + w3 * v3[d]);
    }
    for (; n < count; n++)
        for (int64_t d = 0; d < features; d++) y[d] += weights[n] * values[ids[n] * step + d];
}

void forward(int64_t first, int64_t last, const Call *c) {
    int64_t most = c->window + c->num_neighbors, ids[most], ages[most];
    float weights[most];
    for (int64_t g = first; g < last; g++) {
        int64_t b = g / c->heads, h = g % c->heads;
        const float *values = row(c->value, b, h);
        for (int64_t m = 0; m < c->length; m++) {
            fetch(c, b, h, m + 1, c->key, 1, 0);
            fetch(c, b, h, m + 1, c->value, c->value_features, 0);
            int64_t count = logits_of(c, b, h, m, ids, ages, weights);
            float largest = weights[0], sum = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t n = 1; n < count; n++) largest = weights[n] > largest ? weights[n] : largest;
            for (int64_t n = 0; n < count; n++) weights[n] = exp_of(weights[n] - largest);
#pragma omp simd reduction(+ : sum)
            for (int64_t n = 0; n < count; n++) sum += weights[n];
            row(c->total, b, h)[m * c->total.entity] = largest + logf(sum);
            for (int64_t n = 0; n < count; n++) weights[n] /= sum;
            float *y = row(c->y, b, h) + m * c->y.entity;
            mix(y, c->value_features, count, weights, ids, values, c->value.entity);
        }
    }
}

/* dl_j = p_j (dy . v_j - sum_i p_i (dy . v_i) + d total) */
void backward(int64_t first, int64_t last, const Call *c) {
    int64_t most = c->window + c->num_neighbors, ids[most], ages[most];
    float weights[most], grads[most];
    for (int64_t g = first; g < last; g++) {
        int64_t b = g / c->heads, h = g % c->heads;
        const float *values = row(c->value, b, h), *keys = row(c->key, b, h);
        float *grad_values = row(c->grad_value, b, h), *grad_keys = row(c->grad_key, b, h);
        double grad_fading = 0;
        for (int64_t m = 0; m < c->length; m++) {
            fetch(c, b, h, m + 1, c->key, 1, 0);
            fetch(c, b, h, m + 1, c->grad_key, 1, 1);
            fetch(c, b, h, m + 1, c->value, c->value_features, 0);
            fetch(c, b, h, m + 1, c->grad_value, c->value_features, 1);
            int64_t count = logits_of(c, b, h, m, ids, ages, weights);
            float total = row(c->total, b, h)[m * c->total.entity];
            const float *query = row(c->query, b, h) + m * c->query.entity;
            const float *grad_y = row(c->grad_y, b, h) + m * c->grad_y.entity;
            float mean = -row(c->grad_total, b, h)[m * c->grad_total.entity], faded = 0;
            for (int64_t n = 0; n < count; n++) weights[n] = exp_of(weights[n] - total);
            for (int64_t n = 0; n < count; n++) {
                const float *value = values + ids[n] * c->value.entity;
                float *restrict grad_value = grad_values + ids[n] * c->grad_value.entity;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t d = 0; d < c->value_features; d++) {
                    sum += grad_y[d] * value[d];
                    grad_value[d] += weights[n] * grad_y[d];
                }
                grads[n] = sum;
                mean += weights[n] * sum;
            }
            float *restrict grad_query = row(c->grad_query, b, h) + m * c->grad_query.entity;
            for (int64_t n = 0; n < count; n++) {
                float grad = weights[n] * (grads[n] - mean);
                const float *key = keys + ids[n] * c->key.entity;
                float *restrict grad_key = grad_keys + ids[n] * c->grad_key.entity;
                for (int64_t e = 0; e < c->features; e++) {
                    grad_query[e] += grad * key[e];
                    grad_key[e] += grad * query[e];
                }
                faded += grad * c->fade[ages[n]];
            }
            grad_fading -= faded;
        }
        c->grad_fading[g] = grad_fading;
    }
}
"""


class _Tensor(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), *((step, ctypes.c_int64) for step in ("batch", "head", "entity"))]


SIZES = ("heads", "length", "features", "value_features", "num_neighbors", "window")
TENSORS = ("query", "key", "value", "y", "total", "grad_query", "grad_key", "grad_value", "grad_y", "grad_total")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, _Tensor) for name in TENSORS),
        *((name, ctypes.c_void_p) for name in ("fading", "fade", "index", "reach", "neighbors", "grad_fading")),
    ]


def attention_library(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """The library if it can be used for these tensors: all float32 on the CPU."""
    fit = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return native_library(SOURCE, *FLAGS) if fit and switched_on() else None


def read_natively(
    library: ctypes.CDLL,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    fading: torch.Tensor,
    index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flow_attention.read` without dropout."""
    query, key, value = (_with_dense_features(x) for x in (query, key, value))
    batch, heads, length, _ = query.shape
    y = value.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    total = query.new_empty(batch, heads, length)
    tensors = {"query": query, "key": key, "value": value, "y": y, "total": total.unsqueeze(-1)}
    _run(library.forward, tensors, window, fading=fading, index=index, reach=reach, neighbors=neighbors)
    return y, total


def read_gradients_natively(
    library: ctypes.CDLL,
    grad_y: torch.Tensor,
    grad_total: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    fading: torch.Tensor,
    index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    total: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`flow_attention.read_gradients` without dropout."""
    query, key, value, grad_y = (_with_dense_features(x) for x in (query, key, value, grad_y))
    grads = [x.new_zeros(x.shape) for x in (query, key, value)]
    grad_fading = fading.new_zeros(query.shape[:2])
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "total": total.unsqueeze(-1),
        "grad_y": grad_y,
        "grad_total": grad_total.contiguous().unsqueeze(-1),
        **dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True)),
    }
    plain = {"fading": fading, "index": index, "reach": reach, "neighbors": neighbors, "grad_fading": grad_fading}
    _run(library.backward, tensors, window, **plain)
    return *grads, grad_fading.sum(dim=0)


@cache
def _fades(bits: int) -> torch.Tensor:
    """log(1 + age) of every age below 2^bits, float32; kept, so that a step costs the same at every length."""
    with torch.inference_mode(False):
        return torch.arange(2**bits, dtype=torch.float64, device="cpu").log1p_().float()


def _with_dense_features(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def _run(function, tensors: dict[str, torch.Tensor], window: int, **plain: torch.Tensor) -> None:
    """Call `function` on all rows; every tensor is held until it returns."""
    query, neighbors = tensors["query"], plain["neighbors"]
    batch, heads, length, features = query.shape
    call = _Call(heads, length, features, tensors["value"].shape[-1], neighbors.shape[-1], window)
    plain = {name: tensor.contiguous() for name, tensor in plain.items()}
    for name, tensor in tensors.items():
        setattr(call, name, _Tensor(tensor.data_ptr(), *tensor.stride()[:3]))
    plain["fade"] = _fades(int(plain["index"].max()).bit_length())
    for name, tensor in plain.items():
        setattr(call, name, tensor.data_ptr())

    def work(first: int, last: int) -> None:
        function(ctypes.c_int64(first), ctypes.c_int64(last), ctypes.byref(call))

    in_threads(work, batch * heads, length)
