/* Searches the causal box tree: finds the leaves nearest to a query, and the nearest of their members and of the recent
   entities. */
#include "box_tree_leaves.h"
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define RINGS ((RECENT + BLOCK) / LEAF + 1) /* groups of recent entities */
#define FLIGHT 8 /* queries searched in turns: while one waits for memory the others go on */
#define NONE INT64_MAX
#define LARGEST INT32_MAX

/* A group of 16 entries and two axes is 64 bytes, read in vectors of WIDTH bytes. */
#if defined(__AVX512BW__)
#define WIDTH 64
#elif defined(__AVX2__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define LANES (WIDTH / 4)
#define VECTORS (FAN / LANES)
typedef int16_t Shorts __attribute__((vector_size(WIDTH), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(WIDTH), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(WIDTH), aligned(4), may_alias));
typedef int32_t Quad __attribute__((vector_size(16), may_alias));
typedef int64_t Longs __attribute__((vector_size(32), aligned(8), may_alias));

static inline Shorts positive(Shorts x) {
#if WIDTH == 64
    return (Shorts)_mm512_max_epi16((__m512i)x, _mm512_setzero_si512());
#elif WIDTH == 32
    return (Shorts)_mm256_max_epi16((__m256i)x, _mm256_setzero_si256());
#elif defined(__SSE2__)
    return (Shorts)_mm_max_epi16((__m128i)x, _mm_setzero_si128());
#else
    return x & ~(x >> 15);
#endif
}

/* Squares, summed over the two axes of each entry. */
static inline Ints squares(Shorts x) {
#if WIDTH == 64
    return (Ints)_mm512_madd_epi16((__m512i)x, (__m512i)x);
#elif WIDTH == 32
    return (Ints)_mm256_madd_epi16((__m256i)x, (__m256i)x);
#elif defined(__SSE2__)
    return (Ints)_mm_madd_epi16((__m128i)x, (__m128i)x);
#elif defined(__ARM_NEON)
    int16x8_t y = (int16x8_t)x;
    return (Ints)vpaddq_s32(vmull_s16(vget_low_s16(y), vget_low_s16(y)), vmull_high_s16(y, y));
#else
    Ints low = ((Ints)x << 16) >> 16, high = (Ints)x >> 16;
    return low * low + high * high;
#endif
}

static inline Ints lesser(Ints a, Ints b) {
#if WIDTH == 64
    return (Ints)_mm512_min_epi32((__m512i)a, (__m512i)b);
#elif WIDTH == 32
    return (Ints)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
    Ints less = a < b;
    return (a & less) | (b & ~less);
#endif
}

static inline Quad lesser_quad(Quad a, Quad b) {
    Quad less = a < b;
    return (a & less) | (b & ~less);
}

static inline Quad greater_quad(Quad a, Quad b) {
    Quad less = a < b;
    return (b & less) | (a & ~less);
}

/* Bits of the entries with distance <= bound. */
static inline uint32_t at_most(const Ints *distances, int32_t bound) {
    uint32_t near = 0;
    for (int v = 0; v < VECTORS; v++) {
#if WIDTH == 64
        near |= _mm512_cmple_epi32_mask((__m512i)distances[v], _mm512_set1_epi32(bound));
#elif WIDTH == 32
        __m256i far = _mm256_cmpgt_epi32((__m256i)distances[v], _mm256_set1_epi32(bound));
        near |= (uint32_t)(~_mm256_movemask_ps((__m256)far) & 0xFF) << LANES * v;
#elif defined(__SSE2__)
        __m128i far = _mm_cmpgt_epi32((__m128i)distances[v], _mm_set1_epi32(bound));
        near |= (uint32_t)(~_mm_movemask_ps((__m128)far) & 0xF) << LANES * v;
#else
        for (int l = 0; l < LANES; l++) near |= (uint32_t)(distances[v][l] <= bound) << (LANES * v + l);
#endif
    }
    return near;
}

typedef struct {
    int64_t length, dims, wanted, window, leaves_read, stored;
    int64_t leaf_capacity, page_capacity; /* of each row's index; 0 without an index */
    const int16_t *queries, *keys;        /* [G, M, P], [G, N, P] */
    const int64_t *query_index, *reach;   /* [G, M]; reach may be NULL */
    const int64_t *counts;                /* [G] or NULL */
    int32_t *counters, *leaves, *leaf_pages, *cuts, *pages; /* see box_tree.index_shapes; NULL without an index */
    int64_t *indices;                     /* [G, M, K] */
    int32_t *distances;                   /* [G, M, K] or NULL */
} Search;

/* Adds a code and what it belongs to, `id`, to an ascending list of `room` codes, a multiple of 8; the largest leaves it. */
static inline void insert(int64_t *codes, int64_t *ids, int64_t room, int64_t code, int64_t id) {
#if WIDTH >= 32
    __m256i all = _mm256_set1_epi64x(code), all_ids = _mm256_set1_epi64x(id);
    __m256i before = _mm256_set1_epi64x(-1), before_ids = all_ids;
    for (int64_t i = 0; i < room; i += 4) {
        __m256i here = _mm256_load_si256((__m256i *)(codes + i)), here_ids = _mm256_load_si256((__m256i *)(ids + i));
        __m256i moved = _mm256_permute4x64_epi64(_mm256_blend_epi32(here, before, 0xC0), 0x93);
        __m256i moved_ids = _mm256_permute4x64_epi64(_mm256_blend_epi32(here_ids, before_ids, 0xC0), 0x93);
        __m256i later = _mm256_cmpgt_epi64(here, all), moves = _mm256_cmpgt_epi64(moved, all);
        before = here;
        before_ids = here_ids;
        here = _mm256_blendv_epi8(_mm256_blendv_epi8(here, all, later), moved, moves);
        here_ids = _mm256_blendv_epi8(_mm256_blendv_epi8(here_ids, all_ids, later), moved_ids, moves);
        _mm256_store_si256((__m256i *)(codes + i), here);
        _mm256_store_si256((__m256i *)(ids + i), here_ids);
    }
#else
    int64_t place = room - 1;
    for (; place > 0 && codes[place - 1] > code; place--) {
        codes[place] = codes[place - 1];
        ids[place] = ids[place - 1];
    }
    codes[place] = code;
    ids[place] = id;
#endif
}

typedef struct {
    const int32_t *pairs;   /* the query's position, two axes each */
    int64_t *near, *leaves; /* [leaf_room] codes distance << 32 | (LARGEST - newest) and numbers of the nearest leaves */
    int64_t *pending;       /* the same codes of pages to visit, and their numbers */
    int32_t *pages;
    int64_t index;
    int32_t waiting, next;
} Query;

/* What the nearest entities of a query are chosen from, in groups of 16. */
typedef struct {
    Ints *distances;           /* [groups][VECTORS] */
    Ints minima[4 * VECTORS];  /* the least distances of groups g, g + 4, g + 8, ... */
    const int32_t **ids;       /* [groups] ids + 1 of the members of leaves; NULL: entities that follow each other */
    int64_t *ages;             /* [groups] to subtract ids + 1, or the place in the group, from */
    int64_t *codes, *sorted;   /* [room] */
    int64_t room;
} Candidates;

static inline Ints splat(int32_t x) { return x - (Ints){0}; }

/* Squared distances to 16 positions, [pairs][16][2]. */
static inline void distances_to(const int16_t *group, const int32_t *pairs, int64_t num_pairs, Ints *out) {
    for (int v = 0; v < VECTORS; v++) out[v] = (Ints){0};
    for (int64_t p = 0; p < num_pairs; p++) {
        Shorts q = (Shorts)splat(pairs[p]);
        for (int v = 0; v < VECTORS; v++) out[v] += squares(((const Shorts *)(group + 32 * p))[v] - q);
    }
}

/* Squared distances to the 16 boxes of a page. */
static inline void distances_to_boxes(const int16_t *boxes, const int32_t *pairs, int64_t num_pairs, Ints *out) {
    for (int v = 0; v < VECTORS; v++) out[v] = (Ints){0};
    for (int64_t p = 0; p < num_pairs; p++) {
        Shorts q = (Shorts)splat(pairs[p]);
        const Shorts *low = (const Shorts *)(boxes + 64 * p), *high = (const Shorts *)(boxes + 64 * p + 32);
        for (int v = 0; v < VECTORS; v++) out[v] += squares(positive(low[v] - q) + positive(q - high[v]));
    }
}

/* Codes distance << 32 | tie of 16 entries; returns the bits of those below `bound`. */
static inline uint32_t join_codes(const Ints *distances, const int32_t *ties, int64_t bound, int64_t *codes) {
#if WIDTH >= 32
    uint32_t below = 0;
    for (int f = 0; f < FAN; f += 4) {
        __m256i far = _mm256_cvtepu32_epi64(_mm_loadu_si128((__m128i *)((int32_t *)distances + f)));
        __m256i tie = _mm256_cvtepu32_epi64(_mm_loadu_si128((__m128i *)(ties + f)));
        __m256i code = _mm256_or_si256(_mm256_slli_epi64(far, 32), tie);
        _mm256_store_si256((__m256i *)(codes + f), code);
        __m256i less = _mm256_cmpgt_epi64(_mm256_set1_epi64x(bound), code);
        below |= (uint32_t)_mm256_movemask_pd((__m256d)less) << f;
    }
    return below;
#else
    uint32_t below = 0;
    for (int f = 0; f < FAN; f++) {
        codes[f] = (int64_t)((int32_t *)distances)[f] << 32 | (uint32_t)ties[f];
        below |= (uint32_t)(codes[f] < bound) << f;
    }
    return below;
#endif
}

/* Measures the distances from a query to the candidates in group `g`, of which those with a nonzero `real` exist. */
static inline void measure(Candidates *c, int64_t g, const int16_t *group, const int32_t *real, const int32_t *pairs,
                           int64_t num_pairs) {
    Ints *distances = c->distances + g * VECTORS, *minima = c->minima + g % 4 * VECTORS;
    distances_to(group, pairs, num_pairs, distances);
    for (int v = 0; v < VECTORS; v++) {
        if (real) distances[v] |= (((const LooseInts *)real)[v] == 0) & LARGEST;
        minima[v] = lesser(minima[v], distances[v]);
    }
}

/* Returns an upper bound of the 16th least of all distances: the largest of the 4th least minima of 4 columns. */
static inline int32_t bound_of(Candidates *c) {
#define ORDER(i, j) { Quad less = lesser_quad(q[i], q[j]); q[j] = greater_quad(q[i], q[j]); q[i] = less; }
    Quad *minima = (Quad *)c->minima;
    for (Quad *q = minima; q < minima + 16; q += 4) {
        ORDER(0, 1) ORDER(2, 3) ORDER(0, 2) ORDER(1, 3) ORDER(1, 2)
    }
    for (Quad *q = minima; q < minima + 16; q += 8) {
        for (int i = 0; i < 4; i++) q[i] = lesser_quad(q[i], q[7 - i]);
        ORDER(0, 2) ORDER(1, 3) ORDER(0, 1) ORDER(2, 3)
    }
#undef ORDER
    int32_t bound = 0;
    for (int i = 0; i < 4; i++) {
        Quad q = lesser_quad(minima[i], minima[11 - i]);
        for (int l = 0; l < 4; l++) bound = q[l] > bound ? q[l] : bound;
    }
    return bound;
}

/* Writes the least `wanted` of `count` different codes to `best`, ascending; NONE if there are fewer. */
static inline void sort_least(Candidates *c, int64_t count, int64_t *best, int64_t wanted) {
    for (int64_t i = count; i < (count + 3) / 4 * 4; i++) c->codes[i] = NONE;
    for (int64_t i = 0; i < count; i += 4) {
        Longs here = *(Longs *)(c->codes + i), rank = {0};
        for (int64_t j = 0; j < count; j++) rank -= (c->codes[j] - (Longs){0}) < here;
        for (int l = 0; l < 4; l++) c->sorted[rank[l]] = here[l];
    }
    for (int64_t k = 0; k < wanted; k++) best[k] = k < count ? c->sorted[k] : NONE;
}

/* Writes the codes distance << 32 | age of the nearest candidates to `best`, ascending. Few candidates are at most the bound
   away, so that little is left to sort. */
static inline void choose(Candidates *c, int64_t groups, int64_t *best, int64_t wanted) {
    int32_t bound = wanted <= 16 ? bound_of(c) : LARGEST;
    int64_t limit = NONE, count = 0;
    bound -= bound == LARGEST;
    for (int64_t word = 0; word < groups; word += 4) {
        uint64_t near = 0;
        for (int64_t g = word; g < word + 4 && g < groups; g++)
            near |= (uint64_t)at_most(c->distances + g * VECTORS, bound) << 16 * (g - word);
        for (; near; near &= near - 1) {
            int64_t at = 16 * word + __builtin_ctzll(near);
            const int32_t *ids = c->ids[at / 16];
            int64_t age = c->ages[at / 16] - (ids ? ids[at % 16] : at % 16);
            int64_t code = (int64_t)((int32_t *)c->distances)[at] << 32 | age;
            if (code >= limit) continue;
            c->codes[count++] = code;
            if (count < c->room) continue;
            sort_least(c, count, best, wanted);
            memcpy(c->codes, best, wanted * sizeof *best);
            count = wanted;
            limit = best[wanted - 1];
            bound = limit >> 32;
        }
    }
    sort_least(c, count, best, wanted);
}

/* Takes the least pending code out, if it is below `bound` and `other`, and writes its page to `number`. Returns the lesser
   of it and `other`; NONE if no code is below `bound`. */
static inline int64_t take_least(Query *s, int64_t bound, int64_t other, int32_t *number) {
    int32_t waiting = s->waiting, at = 0;
    int64_t least = NONE;
#if WIDTH >= 32
    Longs all = NONE - (Longs){0}, places = {0}, here = {0, 1, 2, 3};
    for (int32_t i = 0; i < waiting; i += 4, here += 4) {
        Longs codes = *(Longs *)(s->pending + i);
        __m256i less = (__m256i)((codes < all) & (here < waiting));
        all = (Longs)_mm256_blendv_epi8((__m256i)all, (__m256i)codes, less);
        places = (Longs)_mm256_blendv_epi8((__m256i)places, (__m256i)here, less);
    }
    for (int l = 0; l < 4; l++) {
        at = all[l] < least ? places[l] : at;
        least = all[l] < least ? all[l] : least;
    }
#else
    for (int32_t i = 0; i < waiting; i++) {
        at = s->pending[i] < least ? i : at;
        least = s->pending[i] < least ? s->pending[i] : least;
    }
#endif
    if (least >= bound) {
        s->waiting = 0;
        return other;
    }
    if (other < least) return other;
    *number = s->pages[at];
    s->waiting = waiting - 1;
    s->pending[at] = s->pending[waiting - 1];
    s->pages[at] = s->pages[waiting - 1];
    return least;
}

/* Visits the page `s->next` and chooses the next one. Returns 0 when the nearest leaves are known. */
static inline int visit(const Tree *t, Query *s, int64_t pairs, int64_t leaf_room, int64_t leaves_read) {
    _Alignas(64) int64_t codes[FAN];
    int64_t bound = s->near[leaves_read - 1], least = NONE;
    Ints distances[VECTORS];
    distances_to_boxes(boxes_of(t, s->next), s->pairs, pairs, distances);
    const Page *page = page_of(t, s->next);
    int32_t ties[FAN];
    for (int f = 0; f < FAN; f++) ties[f] = LARGEST - page->newest[f];
    uint32_t near = join_codes(distances, ties, bound, codes) & ((1u << page->count) - 1);
    if (page->level)
        for (uint32_t left = near; left; left &= left - 1) {
            int64_t code = codes[__builtin_ctz(left)];
            least = code < least ? code : least;
        }
    else
        for (; near; near &= near - 1) {
            int slot = __builtin_ctz(near);
            if (codes[slot] >= bound) continue;
            insert(s->near, s->leaves, leaf_room, codes[slot], page->child[slot]);
            bound = s->near[leaves_read - 1];
        }
    int64_t chosen = take_least(s, bound, least, &s->next);
    if (chosen == NONE) return 0;
    for (; near; near &= near - 1) {
        int slot = __builtin_ctz(near);
        if (codes[slot] == chosen) s->next = page->child[slot];
        s->pending[s->waiting] = codes[slot];
        s->pages[s->waiting] = page->child[slot];
        s->waiting += codes[slot] != chosen;
    }
    const char *next = (const char *)boxes_of(t, s->next);
    for (int64_t line = 0; line < 2 * pairs + 3 && line < 16; line++) __builtin_prefetch(next + 64 * line);
    return 1;
}

typedef struct {
    int16_t *recents; /* [RINGS] groups of 16 */
    int64_t *best;    /* [wanted] codes distance << 32 | age of the nearest entities */
    Candidates candidates;
    Query flight[FLIGHT];
} Memory;

/* Finds the nearest of the recent entities from `base` on and of the members of the leaves that were chosen. */
static inline void read_candidates(const Search *s, const Tree *t, Memory *m, const Query *query, int64_t base,
                                   int64_t num_pairs) {
    Candidates *c = &m->candidates;
    static const int32_t places[2 * LEAF] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    int64_t seen = query->index - s->window + 1, groups = 0;
    seen = seen > 0 ? seen : 0;
    int64_t newest = seen ? (seen - 1) / LEAF : 0, ring = newest % RINGS;
    const int32_t *real = places + LEAF - (seen - LEAF * newest);
    for (int v = 0; v < 4 * VECTORS; v++) c->minima[v] = splat(LARGEST);
    for (int64_t j = LEAF * newest; j >= base; j -= LEAF, groups++) {
        c->ids[groups] = NULL;
        c->ages[groups] = query->index - j;
        measure(c, groups, m->recents + ring * 32 * num_pairs, groups ? NULL : real, query->pairs, num_pairs);
        ring = ring ? ring - 1 : RINGS - 1;
    }
    for (int64_t k = 0; base && k < s->leaves_read && query->near[k] != NONE; k++, groups++) {
        const int32_t *leaf = leaf_of(t, (int32_t)query->leaves[k]);
        c->ids[groups] = leaf;
        c->ages[groups] = query->index + 1;
        measure(c, groups, (const int16_t *)(leaf + LEAF), leaf, query->pairs, num_pairs);
    }
    choose(c, groups, m->best, s->wanted);
}

/* Searches queries first .. last - 1 of a row, which belong to one sequence that starts at position `start`. */
static inline __attribute__((always_inline)) void search_sequence(const Search *s, Tree *t, Memory *m, int64_t g,
                                                                  int64_t first, int64_t last, int64_t start,
                                                                  int64_t num_pairs) {
    int64_t leaf_room = (s->leaves_read + 7) / 8 * 8, group = 32 * num_pairs;
    int64_t filled = -1, past = s->query_index[g * s->length] - start; /* index in the sequence of query 0 */
    for (int64_t a = first, end; a < last; a = end) {
        int64_t seen = past + a - s->window + 1;
        seen = seen > 0 ? seen : 0;
        int64_t base = seen > RECENT ? (seen - RECENT) / BLOCK * BLOCK : 0;
        end = a + FLIGHT < last ? a + FLIGHT : last;
        int64_t change = base + BLOCK + RECENT + s->window - 1 - past; /* first query of the next block */
        if (end > change) end = change;
        while (t->ENTERED < base) enter(t);
        if (filled < base) filled = base;
        for (; filled <= past + end - 1 - s->window; filled++)
            put(t, m->recents + filled / LEAF % RINGS * group, filled % LEAF, t->keys + filled * t->dims);
        int32_t pairs[FLIGHT][num_pairs];
        uint32_t searching = 0;
        for (int64_t b = a; b < end; b++) {
            Query *query = m->flight + (b - a);
            const int16_t *x = s->queries + (g * s->length + b) * t->dims;
            for (int64_t p = 0; p < num_pairs; p++) {
                int32_t odd = 2 * p + 1 < t->dims ? x[2 * p + 1] : 0;
                pairs[b - a][p] = (int32_t)((uint32_t)odd << 16 | (uint16_t)x[2 * p]);
            }
            query->pairs = pairs[b - a];
            query->index = past + b;
            if (base) {
                for (int64_t k = 0; k < leaf_room; k++) query->near[k] = NONE;
                query->next = t->ROOT;
                query->waiting = 0;
                searching |= 1u << (b - a);
            }
        }
        while (searching)
            for (uint32_t left = searching; left; left &= left - 1) {
                int b = __builtin_ctz(left);
                Query *query = m->flight + b;
                if (visit(t, query, num_pairs, leaf_room, s->leaves_read)) continue;
                searching &= ~(1u << b);
                for (int64_t k = 0; k < s->leaves_read && query->near[k] != NONE; k++) {
                    const char *leaf = (const char *)leaf_of(t, (int32_t)query->leaves[k]);
                    for (int64_t line = 0; line <= num_pairs && line < 8; line++) __builtin_prefetch(leaf + 64 * line);
                }
            }
        for (int64_t b = a; b < end; b++) {
            const Query *query = m->flight + (b - a);
            int64_t to = (g * s->length + b) * s->wanted;
            read_candidates(s, t, m, query, base, num_pairs);
            for (int64_t k = 0; k < s->wanted; k++) {
                int found = m->best[k] != NONE;
                s->indices[to + k] = found ? start + query->index - (int64_t)(uint32_t)m->best[k] : -1;
            }
            if (s->distances)
                for (int64_t k = 0; k < s->wanted; k++) s->distances[to + k] = m->best[k] >> 32;
        }
    }
}

/* Makes `t` the tree of a row of the index. */
static void set_row(Tree *t, const Search *s, int64_t g) {
    t->counters = s->counters + 4 * g;
    t->leaves = s->leaves + g * s->leaf_capacity * t->leaf_size;
    t->leaf_pages = s->leaf_pages + g * s->leaf_capacity;
    t->cuts = (Cut *)s->cuts + g * s->leaf_capacity;
    t->pages = s->pages + g * s->page_capacity * t->page_size;
}

static void *allocate(int64_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* Searches rows first .. last - 1. Returns 1 if out of memory. */
int search_tree(int64_t first, int64_t last, const Search *s) {
    int64_t pairs = (s->dims + 1) / 2, leaf_room = (s->leaves_read + 7) / 8 * 8;
    int64_t groups = RINGS + s->leaves_read, room = 2 * s->wanted > 64 ? (2 * s->wanted + 7) / 8 * 8 : 64;
    Tree t = {0};
    set_sizes(&t, s->dims);
    int64_t leaf_capacity = s->leaf_capacity, page_capacity = s->page_capacity;
    int32_t own_counters[4] = {0}, *own = NULL;
    if (!s->counters) {
        leaf_capacity = BUDGET(s->length) + 2 * BLOCK;
        page_capacity = leaf_capacity / 5 + 16;
        int64_t leaf_words = leaf_capacity * t.leaf_size, page_words = page_capacity * t.page_size;
        if (s->length >= RECENT + BLOCK) {
            own = allocate((leaf_words + page_words + 4 * leaf_capacity) * sizeof(int32_t));
            if (!own) return 1;
            t.leaves = own;
            t.pages = own + leaf_words;
            t.leaf_pages = own + leaf_words + page_words;
            t.cuts = (Cut *)(t.leaf_pages + leaf_capacity);
        }
        t.counters = own_counters;
    }
    int64_t pending = (page_capacity + 8) / 8 * 8 + 8; /* vectors of 8 are written at the end */
    int64_t group_bytes = 64 * pairs, per_query = (2 * leaf_room + pending) * 8 + pending * 4;
    int64_t candidate_bytes = (groups * (64 + 8 + 8) + (2 * room + 8 + s->wanted) * 8 + 63) / 64 * 64;
    int64_t entry_bytes = (WORK * t.entry_size + 63) / 64 * 64, box_bytes = ((4 + 2 * BLOCK) * s->dims + 63) / 64 * 64;
    per_query = (per_query + 63) / 64 * 64;
    char *memory = allocate(RINGS * group_bytes + FLIGHT * per_query + candidate_bytes + 2 * entry_bytes + box_bytes);
    if (!memory) {
        free(own);
        return 1;
    }
    Memory m = {.recents = (int16_t *)memory};
    memset(memory, 0, RINGS * group_bytes);
    char *free_memory = memory + RINGS * group_bytes;
    for (int b = 0; b < FLIGHT; b++, free_memory += per_query) {
        Query *query = m.flight + b;
        query->near = (int64_t *)free_memory;
        query->leaves = query->near + leaf_room;
        query->pending = query->leaves + leaf_room;
        query->pages = (int32_t *)(query->pending + pending);
    }
    Candidates *c = &m.candidates;
    c->distances = (Ints *)free_memory;
    c->codes = (int64_t *)(free_memory + 64 * groups);
    c->sorted = c->codes + room;
    c->room = room;
    m.best = c->sorted + room + 8;
    c->ages = m.best + s->wanted;
    c->ids = (const int32_t **)(c->ages + groups);
    free_memory += candidate_bytes;
    for (int list = 0; list < 2; list++, free_memory += entry_bytes) t.entries[list] = free_memory;
    t.box = (int16_t *)free_memory;
    t.block = t.box + 2 * s->dims;

    for (int64_t g = first; g < last; g++) {
        if (s->counters) set_row(&t, s, g);
        const int16_t *keys = s->keys + g * s->stored * s->dims;
        const int64_t *index = s->query_index + g * s->length, *reach = s->reach ? s->reach + g * s->length : NULL;
        int64_t length = s->counts && s->counts[g] < s->length ? s->counts[g] : s->length;
        for (int64_t a = 0, end; a < length; a = end) {
            int64_t start = reach ? index[a] - reach[a] : 0;
            for (end = a + 1; end < length && (!reach || index[end] - reach[end] == start);) end++;
            t.keys = keys + start * s->dims;
            if (!s->counters) memset(own_counters, 0, sizeof own_counters);
            if (pairs == 2) search_sequence(s, &t, &m, g, a, end, start, 2);
            else if (pairs == 4) search_sequence(s, &t, &m, g, a, end, start, 4);
            else search_sequence(s, &t, &m, g, a, end, start, pairs);
        }
        for (int64_t k = length * s->wanted; k < s->length * s->wanted; k++) {
            s->indices[g * s->length * s->wanted + k] = -1;
            if (s->distances) s->distances[g * s->length * s->wanted + k] = LARGEST;
        }
    }
    free(memory);
    free(own);
    return 0;
}

/* Crops the trees of rows first .. last - 1 to `bases` [G] entities. A tree that cannot be cropped becomes empty. Returns
   1 if out of memory. */
int crop_tree(int64_t first, int64_t last, const Search *s, const int64_t *bases) {
    Tree t = {0};
    set_sizes(&t, s->dims);
    int16_t box[2 * s->dims];
    int32_t *parents = malloc(s->leaf_capacity * sizeof *parents);
    if (!parents) return 1;
    t.box = box;
    for (int64_t g = first; g < last; g++) {
        set_row(&t, s, g);
        if (t.ENTERED > bases[g] && (bases[g] == 0 || !crop(&t, bases[g], parents))) memset(t.counters, 0, 16);
    }
    free(parents);
    return 0;
}
