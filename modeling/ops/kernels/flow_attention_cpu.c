#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define BLOCK (4 * LANES) /* features summed in registers */
#define QUERIES 256       /* queries whose local keys are transposed together */
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* exp(x) for x <= 0, accurate to 2 ulp; compilers vectorise this form */
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

/* log(x) for x >= 1, likewise: x = 2^whole (1 + r) with sqrt(1/2) <= 1 + r < sqrt(2) */
static inline float log_of(float x) {
    union { float f; int32_t i; } bits = {.f = x};
    int32_t whole = (bits.i - 0x3f3504f3) >> 23;
    bits.i -= whole * (1 << 23);
    float r = bits.f - 1.0f, y = 7.0376836292e-2f;
    y = y * r - 1.1514610310e-1f;
    y = y * r + 1.1676998740e-1f;
    y = y * r - 1.2420140846e-1f;
    y = y * r + 1.4249322787e-1f;
    y = y * r - 1.6668057665e-1f;
    y = y * r + 2.0000714765e-1f;
    y = y * r - 2.4999993993e-1f;
    y = y * r + 3.3333331174e-1f;
    y = y * r * r * r - 2.12194440e-4f * whole - 0.5f * r * r + r;
    return y + 0.693359375f * whole;
}

static inline float sum_of(Floats x) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int l = 0; l < LANES; l++) sum += x[l];
    return sum;
}

/* A tensor [B, H, length, features]: address and strides in floats. The stride of features is 1. */
typedef struct { float *start; int64_t batch, head, entity; } Tensor;

typedef struct {
    int64_t heads, length, features, value_features, num_neighbors, window;
    Tensor query, key, value, y, lse, grad_query, grad_key, grad_value, grad_y, grad_lse;
    const float *decay; /* [H] */
    const int64_t *index, *reach; /* [B, M] */
    const int64_t *neighbors; /* [B, H, M, K] */
    float *grad_decay; /* [B, H] */
} Call;

static inline float *row(Tensor x, int64_t b, int64_t h) { return x.start + b * x.batch + h * x.head; }

/* Scratch memory of one thread, for one query at a time. Vectors have LANES extra elements at the end. */
typedef struct {
    int64_t b, h;
    int64_t count;                     /* entities read: the local window, oldest first, then the neighbours */
    int64_t *ids;                      /* [count] */
    float *log_ages, *weights, *grads; /* [count]; log(1 + age); weights holds the logits first */
    float *near_log_ages;              /* [window]; log(1 + age), oldest first */
    float *transposed;                 /* [features, transposed_step]; local keys from `transposed_first` on */
    int64_t transposed_step, transposed_first;
} Scratch;

/* Allocates scratch memory; ids is NULL if that fails. Free ids, which owns the whole block. */
static Scratch make_scratch(const Call *c) {
    int64_t most = c->window + c->num_neighbors + LANES, step = QUERIES + c->window + LANES;
    Scratch r = {.ids = calloc(1, most * (sizeof(int64_t) + 4 * sizeof(float)) + c->features * step * sizeof(float))};
    if (!r.ids) return r;
    r.log_ages = (float *)(r.ids + most), r.weights = r.log_ages + most, r.grads = r.weights + most;
    r.near_log_ages = r.grads + most, r.transposed = r.near_log_ages + most, r.transposed_step = step;
    for (int64_t n = 0; n < c->window; n++) r.near_log_ages[n] = log_of(c->window - n);
    return r;
}

/* Transposes the keys in the local windows of QUERIES queries from m on, so that a feature is contiguous. */
static void transpose_keys(const Call *c, Scratch *r, int64_t m) {
    const float *keys = row(c->key, r->b, r->h);
    int64_t begin = c->index[r->b * c->length], first = begin + m - (c->window - 1), last = begin + m + QUERIES;
    if (last > begin + c->length) last = begin + c->length;
    for (int64_t j = first < 0 ? 0 : first; j < last; j++)
        for (int64_t e = 0; e < c->features; e++)
            r->transposed[e * r->transposed_step + j - first] = keys[j * c->key.entity + e];
    r->transposed_first = first;
}

/* Lists the entities that query m reads, and computes their logits. */
static inline void read_logits(const Call *c, Scratch *r, int64_t m) {
    if (m % QUERIES == 0) transpose_keys(c, r, m);
    const float *query = row(c->query, r->b, r->h) + m * c->query.entity, *keys = row(c->key, r->b, r->h);
    int64_t i = c->index[r->b * c->length + m], reach = c->reach[r->b * c->length + m];
    int64_t near = (reach < c->window - 1 ? reach : c->window - 1) + 1, oldest = i - near + 1, count = near;
    float decay = c->decay[r->h];
    const float *transposed = r->transposed + oldest - r->transposed_first;
    const float *log_ages = r->near_log_ages + c->window - near;
    for (int64_t n = 0; n < near; n += LANES) {
        Floats log_age = *(Floats *)(log_ages + n), logits = -decay * log_age;
        for (int64_t e = 0; e < c->features; e++)
            logits += query[e] * *(Floats *)(transposed + e * r->transposed_step + n);
        *(Floats *)(r->weights + n) = logits;
        *(Floats *)(r->log_ages + n) = log_age;
    }
    for (int64_t n = 0; n < near; n++) r->ids[n] = oldest + n;
    const int64_t *far = c->neighbors + ((r->b * c->heads + r->h) * c->length + m) * c->num_neighbors;
    for (int64_t k = 0; k < c->num_neighbors; k++) {
        if (far[k] < 0) continue;
        const float *key = keys + far[k] * c->key.entity;
        float sum = 0;
        for (int64_t e = 0; e < c->features; e++) sum += query[e] * key[e];
        r->ids[count] = far[k];
        r->log_ages[count] = 1 + i - far[k];
        r->weights[count++] = sum;
    }
    for (int64_t n = near; n < count; n++) {
        r->log_ages[n] = log_of(r->log_ages[n]);
        r->weights[n] -= decay * r->log_ages[n];
    }
    r->count = count;
}

/* Prefetches the neighbours' features of query m while the previous query is processed. */
static inline void fetch(const Call *c, const Scratch *r, int64_t m, Tensor x, int64_t features, int write) {
    if (m >= c->length) return;
    const int64_t *far = c->neighbors + ((r->b * c->heads + r->h) * c->length + m) * c->num_neighbors;
    const float *rows = row(x, r->b, r->h);
    for (int64_t k = 0; k < c->num_neighbors; k++)
        for (int64_t d = 0; d < features && far[k] >= 0; d += 16)
            if (write) __builtin_prefetch(rows + far[k] * x.entity + d, 1);
            else __builtin_prefetch(rows + far[k] * x.entity + d, 0);
}

/* y = sum_n weights[n] values[ids[n]] */
static inline void mix(const Scratch *r, float *restrict y, int64_t features, const float *values, int64_t step) {
    int64_t d = 0;
    for (; d + BLOCK <= features; d += BLOCK) {
        Floats sums[8] = {0}; /* even and odd entities have separate sums, for parallel execution */
        for (int64_t n = 0; n < r->count; n += 2) {
            const float *even = values + r->ids[n] * step + d;
            for (int v = 0; v < 4; v++) sums[v] += r->weights[n] * *(Floats *)(even + v * LANES);
            if (n + 1 == r->count) break;
            const float *odd = values + r->ids[n + 1] * step + d;
            for (int v = 0; v < 4; v++) sums[4 + v] += r->weights[n + 1] * *(Floats *)(odd + v * LANES);
        }
        for (int v = 0; v < 4; v++) *(Floats *)(y + d + v * LANES) = sums[v] + sums[4 + v];
    }
    for (int64_t f = d; f < features; f++) y[f] = 0;
    for (int64_t n = 0; n < r->count && d < features; n++)
        for (int64_t f = d; f < features; f++) y[f] += r->weights[n] * values[r->ids[n] * step + f];
}

/* grads[n] = grad_y . values[ids[n]], and grad_values[ids[n]] += weights[n] grad_y */
static inline void mix_backward(const Scratch *r, const float *grad_y, int64_t features, const float *values,
                                int64_t step, float *grad_values, int64_t grad_step) {
    float *grads = r->grads;
    for (int64_t n = 0; n < r->count; n++) grads[n] = 0;
    int64_t d = 0;
    for (; d + BLOCK <= features; d += BLOCK) {
        Floats grad_block[4];
        for (int v = 0; v < 4; v++) grad_block[v] = *(Floats *)(grad_y + d + v * LANES);
        for (int64_t n = 0; n < r->count; n++) {
            const float *value = values + r->ids[n] * step + d;
            float *grad_value = grad_values + r->ids[n] * grad_step + d;
            Floats sums = {0};
            for (int v = 0; v < 4; v++) {
                sums += grad_block[v] * *(Floats *)(value + v * LANES);
                *(Floats *)(grad_value + v * LANES) += r->weights[n] * grad_block[v];
            }
            grads[n] += sum_of(sums);
        }
    }
    for (int64_t n = 0; n < r->count && d < features; n++) {
        const float *value = values + r->ids[n] * step;
        float *restrict grad_value = grad_values + r->ids[n] * grad_step, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t f = d; f < features; f++) {
            sum += grad_y[f] * value[f];
            grad_value[f] += r->weights[n] * grad_y[f];
        }
        grads[n] += sum;
    }
}

/* Processes (row, head) pairs first .. last - 1. Returns 1 if memory cannot be allocated, as `backward` does. */
int forward(int64_t first, int64_t last, const Call *c) {
    Scratch r = make_scratch(c);
    if (!r.ids) return 1;
    for (int64_t g = first; g < last; g++) {
        r.b = g / c->heads, r.h = g % c->heads;
        const float *values = row(c->value, r.b, r.h);
        for (int64_t m = 0; m < c->length; m++) {
            fetch(c, &r, m + 1, c->key, 1, 0);
            fetch(c, &r, m + 1, c->value, c->value_features, 0);
            read_logits(c, &r, m);
            float *weights = r.weights, largest = weights[0], sum = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t n = 1; n < r.count; n++) largest = weights[n] > largest ? weights[n] : largest;
            for (int64_t n = 0; n < r.count; n++) weights[n] = exp_of(weights[n] - largest);
#pragma omp simd reduction(+ : sum)
            for (int64_t n = 0; n < r.count; n++) sum += weights[n];
            row(c->lse, r.b, r.h)[m * c->lse.entity] = largest + logf(sum);
            for (int64_t n = 0; n < r.count; n++) weights[n] /= sum;
            mix(&r, row(c->y, r.b, r.h) + m * c->y.entity, c->value_features, values, c->value.entity);
        }
    }
    free(r.ids);
    return 0;
}

/* dl_j = p_j (dy . v_j - sum_i p_i (dy . v_i) + d lse) */
int backward(int64_t first, int64_t last, const Call *c) {
    Scratch r = make_scratch(c);
    if (!r.ids) return 1;
    for (int64_t g = first; g < last; g++) {
        r.b = g / c->heads, r.h = g % c->heads;
        const float *values = row(c->value, r.b, r.h), *keys = row(c->key, r.b, r.h);
        const float *weights = r.weights, *grads = r.grads;
        float *grad_values = row(c->grad_value, r.b, r.h), *grad_keys = row(c->grad_key, r.b, r.h);
        double grad_decay = 0;
        for (int64_t m = 0; m < c->length; m++) {
            fetch(c, &r, m + 1, c->key, 1, 0);
            fetch(c, &r, m + 1, c->grad_key, 1, 1);
            fetch(c, &r, m + 1, c->value, c->value_features, 0);
            fetch(c, &r, m + 1, c->grad_value, c->value_features, 1);
            read_logits(c, &r, m);
            float lse = row(c->lse, r.b, r.h)[m * c->lse.entity];
            for (int64_t n = 0; n < r.count; n++) r.weights[n] = exp_of(r.weights[n] - lse);
            const float *query = row(c->query, r.b, r.h) + m * c->query.entity;
            const float *grad_y = row(c->grad_y, r.b, r.h) + m * c->grad_y.entity;
            mix_backward(&r, grad_y, c->value_features, values, c->value.entity, grad_values, c->grad_value.entity);
            float mean = -row(c->grad_lse, r.b, r.h)[m * c->grad_lse.entity], decay_sum = 0;
            for (int64_t n = 0; n < r.count; n++) mean += weights[n] * grads[n];
            float *restrict grad_query = row(c->grad_query, r.b, r.h) + m * c->grad_query.entity;
            for (int64_t n = 0; n < r.count; n++) {
                float grad = weights[n] * (grads[n] - mean);
                const float *key = keys + r.ids[n] * c->key.entity;
                float *restrict grad_key = grad_keys + r.ids[n] * c->grad_key.entity;
                for (int64_t e = 0; e < c->features; e++) {
                    grad_query[e] += grad * key[e];
                    grad_key[e] += grad * query[e];
                }
                decay_sum += grad * r.log_ages[n];
            }
            grad_decay -= decay_sum;
        }
        c->grad_decay[g] = grad_decay;
    }
    free(r.ids);
    return 0;
}
