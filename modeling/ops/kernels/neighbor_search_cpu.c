#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8 /* tables and codes per vector operation */
#ifndef SHORT
#define SHORT 64 /* a call with a past and fewer queries reads chains instead of rings */
#endif
#define NONE INT64_MAX

typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef int64_t Longs __attribute__((vector_size(8 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

/* Computes cells [n, L] of positions [n, P] on the grid, see CellGrids.cells. A vector holds LANES tables. The
   dividend is an integer, so adding one half never changes the cell. */
void cells(int64_t first, int64_t last, int64_t tables, int64_t axes, int64_t dims, const float *positions,
           double grid, int64_t scale, const int32_t *rotation, const int32_t *shift, const int64_t *edges,
           const int64_t *counts, int32_t *out) {
    int64_t groups = (tables + LANES - 1) / LANES;
    Doubles rotations[groups * axes * dims], shifts[groups * axes], per_edge[groups], most[groups];
    Ints count[groups];
    for (int64_t t = 0; t < groups * LANES; t++) {
        int64_t from = t < tables ? t : 0, group = t / LANES, l = t % LANES;
        per_edge[group][l] = 1.0 / edges[from];
        most[group][l] = counts[from] - 1;
        count[group][l] = counts[from];
        for (int64_t a = 0; a < axes; a++) {
            shifts[group * axes + a][l] = shift[from * axes + a] * edges[from] / scale + 0.5;
            for (int64_t p = 0; p < dims; p++)
                rotations[(group * axes + a) * dims + p][l] = rotation[(from * axes + a) * dims + p];
        }
    }
    for (int64_t n = first; n < last; n++)
        for (int64_t group = 0; group < groups; group++) {
            Ints cell = {0};
            for (int64_t a = group * axes; a < (group + 1) * axes; a++) {
                Doubles along = shifts[a];
                for (int64_t p = 0; p < dims; p++) along += rotations[a * dims + p] * (positions[n * dims + p] * grid);
                Doubles place = along * per_edge[group] + most[group] / 2; /* truncated below */
                Longs below = place < 0, beyond = place > most[group];
                Longs bits = ((Longs)place & ~(below | beyond)) | ((Longs)most[group] & beyond);
                cell = cell * count[group] + __builtin_convertvector((Doubles)bits, Ints);
            }
            for (int64_t l = 0; l < LANES && group * LANES + l < tables; l++)
                out[n * tables + group * LANES + l] = cell[l];
        }
}

/* The bits of a float >= 0 sort like its value. */
static inline int64_t code_of(float squared, int64_t age) {
    uint32_t bits;
    memcpy(&bits, &squared, sizeof bits);
    return (int64_t)bits << 32 | age;
}

static inline float distance_bound(const int64_t *best, int64_t wanted) {
    uint32_t bits = best[wanted - 1] >> 32;
    float bound;
    if (best[wanted - 1] == NONE) return INFINITY;
    memcpy(&bound, &bits, sizeof bound);
    return bound;
}

typedef struct {
    int64_t length, tables, dims, wanted, window, candidates, stored, cells_stored, slots, link_capacity;
    const float *queries, *keys;              /* [G, M, P], [G, N, P] */
    const int32_t *query_cells, *key_cells;   /* [G, M, L], [G, N, L] */
    const int64_t *query_index, *reach;       /* [G, M]; reach may be NULL */
    const int64_t *counts, *offsets;          /* [G] or NULL; [L] */
    int32_t *newest, *links;                   /* [G, slots], [G, link_capacity, L]; both NULL without a cache */
    int64_t *indices;                         /* [G, M, K] */
    float *distances;
} Search;

/* Ring buffer of a cell's most recent `candidates` entities: ids, then each axis of their positions. Unlike a
   chain it is contiguous in memory. `next` is the entry to overwrite next. */
typedef struct { int32_t ring, next; } Slot;

typedef struct {
    Slot *slots;
    int32_t *pool;
    int64_t used, size;
} Rings;

static inline int32_t *ids_of(const Rings *rings, int32_t ring) { return rings->pool + ring * rings->size; }

static inline void push(const Search *s, const Rings *rings, Slot *slot, const float *row_keys, int32_t id) {
    int32_t *ids = ids_of(rings, slot->ring);
    float *places = (float *)(ids + s->candidates);
    ids[slot->next] = id;
    for (int64_t p = 0; p < s->dims; p++) places[p * s->candidates + slot->next] = row_keys[id * s->dims + p];
    slot->next = slot->next + 1 == s->candidates ? 0 : slot->next + 1;
}

/* Creates the ring of a cell, filled from the chain of earlier calls that starts at `id`. */
static void open_ring(const Search *s, Rings *rings, Slot *slot, const float *row_keys, const int32_t *links,
                      int64_t table, int32_t id) {
    slot->ring = rings->used++;
    slot->next = 0;
    int32_t *ids = ids_of(rings, slot->ring), chain[s->candidates];
    int64_t count = 0;
    for (; id >= 0 && count < s->candidates; id = links[(int64_t)id * s->tables + table]) chain[count++] = id;
    for (int64_t i = 0; i < s->candidates; i++) ids[i] = -1;
    while (count--) push(s, rings, slot, row_keys, chain[count]);
}

/* `insert` adds a code to the nearest so far (ascending, distinct, then NONE; `room` is a multiple of LANES).
   `read_ring` inserts all entities of a ring that are not older than `oldest`. Both exist with and without AVX-512. */
#ifdef __AVX512F__
#include <immintrin.h>
static inline void insert(int64_t *best, int64_t room, int64_t code) {
    __m512i all = _mm512_set1_epi64(code), before = _mm512_set1_epi64(-1);
    int known = 0;
    for (int64_t i = 0; i < room; i += LANES) known |= _mm512_cmpeq_epi64_mask(_mm512_load_si512(best + i), all);
    if (known) all = _mm512_set1_epi64(NONE);
    for (int64_t i = 0; i < room; i += LANES) { /* entry = median of previous entry, itself and code */
        __m512i here = _mm512_load_si512(best + i);
        __m512i later = _mm512_max_epi64(_mm512_alignr_epi64(here, before, LANES - 1), all);
        _mm512_store_si512(best + i, _mm512_min_epi64(later, here));
        before = here;
    }
}

static inline __m512i codes_of(__m256i bits, __m256i ages) {
    return _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(bits), 32), _mm512_cvtepu32_epi64(ages));
}

static inline void read_ring(const Search *s, const int32_t *ids, const float *query, int64_t index, int64_t oldest,
                             int64_t *best, int64_t room) {
    const float *places = (const float *)(ids + s->candidates);
    __m512 bound = _mm512_set1_ps(distance_bound(best, s->wanted));
    for (int64_t i = 0; i < s->candidates; i += 16) {
        __mmask16 there = i + 16 <= s->candidates ? 0xFFFF : (1 << (s->candidates - i)) - 1;
        __m512 squared = _mm512_setzero_ps();
        for (int64_t p = 0; p < s->dims; p++) {
            __m512 place = _mm512_maskz_loadu_ps(there, places + p * s->candidates + i);
            __m512 difference = _mm512_sub_ps(_mm512_set1_ps(query[p]), place);
            squared = _mm512_add_ps(squared, _mm512_mul_ps(difference, difference));
        }
        __m512i id = _mm512_maskz_loadu_epi32(there, ids + i);
        __mmask16 near = _mm512_mask_cmple_ps_mask(there, squared, bound);
        near = _mm512_mask_cmpge_epi32_mask(near, id, _mm512_set1_epi32(oldest));
        __m512i bits = _mm512_maskz_compress_epi32(near, _mm512_castps_si512(squared));
        __m512i ages = _mm512_maskz_compress_epi32(near, _mm512_sub_epi32(_mm512_set1_epi32(index), id));
        __m256i high_bits = _mm512_extracti64x4_epi64(bits, 1), high_ages = _mm512_extracti64x4_epi64(ages, 1);
        int64_t codes[16];
        _mm512_storeu_si512(codes, codes_of(_mm512_castsi512_si256(bits), _mm512_castsi512_si256(ages)));
        _mm512_storeu_si512(codes + 8, codes_of(high_bits, high_ages));
        for (int n = 0; n < __builtin_popcount(near); n++) insert(best, room, codes[n]);
    }
}
#else
static inline void insert(int64_t *best, int64_t room, int64_t code) {
    int64_t place = room;
    while (place > 0 && best[place - 1] > code) place--;
    if (place == room || (place > 0 && best[place - 1] == code)) return;
    memmove(best + place + 1, best + place, (room - 1 - place) * sizeof(int64_t));
    best[place] = code;
}

static inline void read_ring(const Search *s, const int32_t *restrict ids, const float *restrict query, int64_t index,
                             int64_t oldest, int64_t *restrict best, int64_t room) {
    int64_t candidates = s->candidates, count = 0;
    const float *restrict places = (const float *)(ids + candidates);
    float squared[candidates], bound = distance_bound(best, s->wanted);
    int32_t near[candidates];
    for (int64_t i = 0; i < candidates; i++) squared[i] = 0;
    for (int64_t p = 0; p < s->dims; p++)
        for (int64_t i = 0; i < candidates; i++) {
            float difference = query[p] - places[p * candidates + i];
            squared[i] += difference * difference;
        }
    for (int64_t i = 0; i < candidates; i++) {
        near[count] = i;
        count += (squared[i] <= bound) & (ids[i] >= oldest);
    }
    for (int64_t n = 0; n < count; n++) insert(best, room, code_of(squared[near[n]], index - ids[near[n]]));
}
#endif

static inline void read_chain(const Search *s, const float *row_keys, const int32_t *links, int64_t table, int32_t id,
                              const float *query, int64_t index, int64_t oldest, int64_t *best, int64_t room) {
    for (int64_t step = 0; step < s->candidates && id >= oldest; step++) {
        float squared = 0;
        for (int64_t p = 0; p < s->dims; p++) {
            float difference = query[p] - row_keys[id * s->dims + p];
            squared += difference * difference;
        }
        insert(best, room, code_of(squared, index - id));
        id = links[(int64_t)id * s->tables + table];
    }
}

static void search_row(const Search *s, int64_t g, Rings *rings) {
    int32_t *newest = s->newest ? s->newest + g * s->slots : NULL;
    int32_t *links = s->links ? s->links + g * s->link_capacity * s->tables : NULL;
    const float *row_keys = s->keys + g * s->stored * s->dims;
    const int32_t *row_cells = s->key_cells + g * s->cells_stored * s->tables;
    int64_t room = (s->wanted + LANES - 1) / LANES * LANES;
    _Alignas(64) int64_t best[room];
    if (rings) {
        rings->used = 0;
        memset(rings->slots, -1, s->slots * sizeof(Slot));
    }
    for (int64_t m = 0; m < s->length; m++) {
        int64_t at = g * s->length + m;
        for (int64_t k = 0; k < room; k++) best[k] = NONE;
        if (!s->counts || m < s->counts[g]) {
            int64_t index = s->query_index[at], entering = index - s->window;
            if (entering >= 0)
                for (int64_t t = 0; t < s->tables; t++) {
                    int64_t slot = s->offsets[t] + row_cells[entering * s->tables + t];
                    if (rings) {
                        Slot *cell = rings->slots + slot;
                        if (cell->ring < 0) open_ring(s, rings, cell, row_keys, links, t, newest ? newest[slot] : -1);
                        push(s, rings, cell, row_keys, (int32_t)entering);
                    }
                    if (newest) {
                        links[entering * s->tables + t] = newest[slot];
                        newest[slot] = (int32_t)entering;
                    }
                }
            int64_t oldest = s->reach && index - s->reach[at] > 0 ? index - s->reach[at] : 0;
            const float *query = s->queries + at * s->dims;
            /* Finest cells first: they hold the nearest entities, so later insertions move few codes. */
            for (int64_t t = s->tables - 1; t >= 0; t--) {
                int64_t slot = s->offsets[t] + s->query_cells[at * s->tables + t];
                if (!rings) {
                    read_chain(s, row_keys, links, t, newest[slot], query, index, oldest, best, room);
                    continue;
                }
                Slot *cell = rings->slots + slot;
                if (cell->ring < 0 && newest && newest[slot] >= 0)
                    open_ring(s, rings, cell, row_keys, links, t, newest[slot]);
                if (cell->ring >= 0) read_ring(s, ids_of(rings, cell->ring), query, index, oldest, best, room);
            }
        }
        for (int64_t k = 0; k < s->wanted; k++) {
            int found = best[k] != NONE;
            s->distances[at * s->wanted + k] = found ? distance_bound(best, k + 1) : INFINITY;
            s->indices[at * s->wanted + k] = found ? s->query_index[at] - (int64_t)(best[k] & 0xFFFFFFFF) : -1;
        }
    }
}

/* Searches rows first .. last - 1; a short call with a past reads the chains. Returns 1 if out of memory. */
int search(int64_t first, int64_t last, const Search *s) {
    Rings rings = {0};
    int in_rings = !s->newest || s->length >= SHORT;
    if (in_rings) {
        int64_t most = s->slots < 2 * s->length * s->tables ? s->slots : 2 * s->length * s->tables;
        rings.size = (s->candidates * (1 + s->dims) + 15) / 16 * 16; /* whole cache lines */
        rings.slots = malloc(s->slots * sizeof(Slot));
        rings.pool = aligned_alloc(64, most * rings.size * sizeof(int32_t));
    }
    int failed = in_rings && (!rings.slots || !rings.pool);
    for (int64_t g = first; g < last && !failed; g++) search_row(s, g, in_rings ? &rings : NULL);
    free(rings.slots);
    free(rings.pool);
    return failed;
}
