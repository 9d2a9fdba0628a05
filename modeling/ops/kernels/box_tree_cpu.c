/* Searches the causal box tree: finds the leaves nearest to a query, and the nearest of their members and of the recent
   entities. */
#include "box_tree_leaves.h"
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define RINGS ((RECENT + BLOCK) / LEAF + 1)
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
typedef int16_t Shorts __attribute__((vector_size(WIDTH), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(WIDTH), may_alias));

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

/* Bits of the entries with distance <= bound. */
static inline uint32_t at_most(const Ints *distances, int32_t bound) {
    uint32_t near = 0;
    for (int v = 0; v < FAN / LANES; v++) {
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

/* Adds a code to an ascending list of `room` codes, a multiple of 8; the largest leaves it. `ids` go along. */
static inline void insert(int64_t *codes, int64_t *ids, int64_t room, int64_t code, int64_t id) {
#if WIDTH == 64
    __m512i all = _mm512_set1_epi64(code), all_ids = _mm512_set1_epi64(id);
    __m512i before = _mm512_set1_epi64(-1), before_ids = all_ids;
    for (int64_t i = 0; i < room; i += 8) {
        __m512i here = _mm512_load_si512(codes + i);
        __mmask8 later = _mm512_cmpgt_epi64_mask(here, all);
        __m512i moved = _mm512_alignr_epi64(here, before, 7);
        __mmask8 moves = _mm512_mask_cmpgt_epi64_mask(later, moved, all);
        _mm512_store_si512(codes + i, _mm512_mask_mov_epi64(_mm512_mask_mov_epi64(here, later, all), moves, moved));
        if (ids) {
            __m512i here_ids = _mm512_load_si512(ids + i);
            __m512i moved_ids = _mm512_alignr_epi64(here_ids, before_ids, 7);
            __m512i with_id = _mm512_mask_mov_epi64(here_ids, later, all_ids);
            _mm512_store_si512(ids + i, _mm512_mask_mov_epi64(with_id, moves, moved_ids));
            before_ids = here_ids;
        }
        before = here;
    }
#else
    int64_t place = room - 1;
    for (; place > 0 && codes[place - 1] > code; place--) {
        codes[place] = codes[place - 1];
        if (ids) ids[place] = ids[place - 1];
    }
    codes[place] = code;
    if (ids) ids[place] = id;
#endif
}

typedef struct {
    const int32_t *pairs;  /* the query's position, two axes each */
    int64_t *best;         /* [room] codes distance << 32 | age of the nearest entities */
    int64_t *near, *leaves; /* [leaf_room] codes distance << 32 | (LARGEST - newest) and numbers of the nearest leaves */
    int64_t *pending;       /* the same codes of pages to visit, and their numbers */
    int32_t *pages;
    int64_t index;
    int32_t waiting, next;
} Query;

static inline Ints splat(int32_t x) { return x - (Ints){0}; }

/* Squared distances to 16 positions, [pairs][16][2]. */
static inline void distances_to(const int16_t *group, const int32_t *pairs, int64_t num_pairs, Ints *out) {
    for (int v = 0; v < FAN / LANES; v++) out[v] = (Ints){0};
    for (int64_t p = 0; p < num_pairs; p++) {
        Shorts q = (Shorts)splat(pairs[p]);
        for (int v = 0; v < FAN / LANES; v++) out[v] += squares(((const Shorts *)(group + 32 * p))[v] - q);
    }
}

/* Squared distances to the 16 boxes of a page. */
static inline void distances_to_boxes(const int16_t *boxes, const int32_t *pairs, int64_t num_pairs, Ints *out) {
    for (int v = 0; v < FAN / LANES; v++) out[v] = (Ints){0};
    for (int64_t p = 0; p < num_pairs; p++) {
        Shorts q = (Shorts)splat(pairs[p]);
        const Shorts *low = (const Shorts *)(boxes + 64 * p), *high = (const Shorts *)(boxes + 64 * p + 32);
        for (int v = 0; v < FAN / LANES; v++) out[v] += squares(positive(low[v] - q) + positive(q - high[v]));
    }
}

/* Adds the codes of `chosen` entries to `best`, an ascending list of `room` codes; the largest leave it. */
static inline void insert_all(int64_t *best, int64_t room, const int64_t *codes, uint32_t chosen) {
#if WIDTH == 64
    if (room == 16) {
        __m512i low = _mm512_load_si512(best), high = _mm512_load_si512(best + 8);
        for (; chosen; chosen &= chosen - 1) { /* an entry becomes the median of the one before, itself and the code */
            __m512i all = _mm512_set1_epi64(codes[__builtin_ctz(chosen)]);
            __m512i moved = _mm512_alignr_epi64(low, _mm512_set1_epi64(-1), 7), next = _mm512_alignr_epi64(high, low, 7);
            low = _mm512_min_epi64(low, _mm512_max_epi64(moved, all));
            high = _mm512_min_epi64(high, _mm512_max_epi64(next, all));
        }
        _mm512_store_si512(best, low);
        _mm512_store_si512(best + 8, high);
        return;
    }
#endif
    for (; chosen; chosen &= chosen - 1) {
        int64_t code = codes[__builtin_ctz(chosen)];
        if (code < best[room - 1]) insert(best, NULL, room, code, 0);
    }
}

/* Codes distance << 32 | tie of 16 entries; returns the bits of those below `bound`. */
static inline uint32_t join_codes(const Ints *distances, const int32_t *ties, int64_t bound, int64_t *codes) {
#if WIDTH == 64
    __m512i far = (__m512i)distances[0], near = _mm512_loadu_si512(ties), end = _mm512_set1_epi64(bound);
    __m512i low = _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(far)), 32),
                                  _mm512_cvtepu32_epi64(_mm512_castsi512_si256(near)));
    __m512i high = _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(far, 1)), 32),
                                   _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(near, 1)));
    _mm512_store_si512(codes, low);
    _mm512_store_si512(codes + 8, high);
    return _mm512_cmplt_epi64_mask(low, end) | (uint32_t)_mm512_cmplt_epi64_mask(high, end) << 8;
#else
    uint32_t below = 0;
    for (int f = 0; f < FAN; f++) {
        codes[f] = (int64_t)((int32_t *)distances)[f] << 32 | (uint32_t)ties[f];
        below |= (uint32_t)(codes[f] < bound) << f;
    }
    return below;
#endif
}

/* Takes entities: 16 positions, of which those in `real` exist, and their ages. */
static inline void read_group(Query *s, const int16_t *group, const int32_t *ages, uint32_t real, int64_t num_pairs,
                              int64_t room, int64_t wanted) {
    _Alignas(64) int64_t codes[FAN];
    Ints distances[FAN / LANES];
    distances_to(group, s->pairs, num_pairs, distances);
    if (!(at_most(distances, s->best[wanted - 1] >> 32) & real)) return;
    uint32_t near = join_codes(distances, ages, s->best[wanted - 1], codes) & real;
    insert_all(s->best, room, codes, near);
}

static inline void read_leaf(Query *s, const int32_t *leaf, int64_t num_pairs, int64_t room, int64_t wanted) {
    int32_t ages[LEAF];
    uint32_t real = 0;
    for (int i = 0; i < LEAF; i++) {
        ages[i] = s->index + 1 - leaf[i];
        real |= (uint32_t)(leaf[i] != 0) << i;
    }
    read_group(s, (const int16_t *)(leaf + LEAF), ages, real, num_pairs, room, wanted);
}

/* Takes the least pending code below `bound` out and returns it, and its page; drops codes from `bound` on. Returns NONE
   if no code is left. The code `other` competes: if it is less, no page is taken out, and it is returned. */
static inline int64_t take_least(Query *s, int64_t bound, int64_t other, int32_t *number) {
    int32_t waiting = 0, at = 0;
    int64_t least = NONE;
#if WIDTH == 64
    __m512i all = _mm512_set1_epi64(NONE), end = _mm512_set1_epi64(bound), places = _mm512_setzero_si512();
    __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    for (int32_t i = 0; i < s->waiting; i += 8) {
        __mmask8 real = s->waiting - i < 8 ? (1 << (s->waiting - i)) - 1 : 0xFF;
        __m512i codes = _mm512_loadu_si512(s->pending + i);
        __mmask8 kept = _mm512_mask_cmplt_epi64_mask(real, codes, end);
        int count = __builtin_popcount(kept);
        __m512i pages = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(s->pages + i)));
        codes = _mm512_maskz_compress_epi64(kept, codes);
        pages = _mm512_maskz_compress_epi32(kept, pages);
        _mm512_storeu_si512(s->pending + waiting, codes);
        _mm256_storeu_si256((__m256i *)(s->pages + waiting), _mm512_castsi512_si256(pages));
        __mmask8 less = _mm512_mask_cmplt_epi64_mask((1 << count) - 1, codes, all);
        all = _mm512_mask_mov_epi64(all, less, codes);
        places = _mm512_mask_add_epi64(places, less, lanes, _mm512_set1_epi64(waiting));
        waiting += count;
    }
    if (waiting) {
        least = _mm512_reduce_min_epi64(all);
        __mmask8 found = _mm512_cmpeq_epi64_mask(all, _mm512_set1_epi64(least));
        at = _mm512_cvtsi512_si32(_mm512_maskz_compress_epi64(found, places));
    }
#else
    for (int32_t i = 0; i < s->waiting; i++) {
        s->pending[waiting] = s->pending[i];
        s->pages[waiting] = s->pages[i];
        if (s->pending[waiting] < s->pending[at]) at = waiting;
        waiting += s->pending[waiting] < bound;
    }
    if (waiting) least = s->pending[at];
#endif
    if (other < least) {
        s->waiting = waiting;
        return other;
    }
    if (waiting) {
        *number = s->pages[at];
        s->waiting = waiting - 1;
        s->pending[at] = s->pending[waiting - 1];
        s->pages[at] = s->pages[waiting - 1];
    }
    return least;
}

/* Visits the page `s->next` and chooses the next one. Returns 0 when the nearest leaves are known. */
static inline int visit(const Tree *t, Query *s, int64_t pairs, int64_t leaf_room, int64_t leaves_read) {
    _Alignas(64) int64_t codes[FAN];
    int64_t bound = s->near[leaves_read - 1], least = NONE;
    Ints distances[FAN / LANES];
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
    int16_t *recents;           /* [RINGS] groups of 16 */
    Query flight[FLIGHT];
} Memory;

/* Searches queries first .. last - 1 of a row, which belong to one sequence that starts at position `start`. */
static inline __attribute__((always_inline)) void search_sequence(const Search *s, Tree *t, Memory *m, int64_t g,
                                                                  int64_t first, int64_t last, int64_t start,
                                                                  int64_t num_pairs) {
    int64_t room = (s->wanted + 7) / 8 * 8, leaf_room = (s->leaves_read + 7) / 8 * 8, group = 32 * num_pairs;
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
            for (int64_t k = 0; k < room; k++) query->best[k] = NONE;
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
        /* Turns over queries: what one of them waits for is independent of the others. */
        for (int64_t k = 0; base && k < s->leaves_read; k++)
            for (Query *query = m->flight; query < m->flight + (end - a); query++)
                if (query->near[k] != NONE && query->near[k] >> 32 <= query->best[s->wanted - 1] >> 32)
                    read_leaf(query, leaf_of(t, (int32_t)query->leaves[k]), num_pairs, room, s->wanted);
        /* The newest first: they win ties. */
        for (int64_t j = (past + end - 1 - s->window) / LEAF * LEAF; j >= base; j -= LEAF) {
            const int16_t *positions = m->recents + j / LEAF % RINGS * group;
            for (Query *query = m->flight; query < m->flight + (end - a); query++) {
                int64_t until = query->index - s->window + 1;
                if (until <= j) continue;
                int32_t ages[LEAF];
                for (int i = 0; i < LEAF; i++) ages[i] = query->index - j - i;
                uint32_t real = until - j < LEAF ? (1u << (until - j)) - 1 : 0xFFFF;
                read_group(query, positions, ages, real, num_pairs, room, s->wanted);
            }
        }
        for (int64_t b = a; b < end; b++) {
            Query *query = m->flight + (b - a);
            int64_t to = (g * s->length + b) * s->wanted;
            for (int64_t k = 0; k < s->wanted; k++) {
                int found = query->best[k] != NONE;
                s->indices[to + k] = found ? start + query->index - (int64_t)(uint32_t)query->best[k] : -1;
            }
            if (s->distances)
                for (int64_t k = 0; k < s->wanted; k++) s->distances[to + k] = query->best[k] >> 32;
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
    int64_t pairs = (s->dims + 1) / 2, room = (s->wanted + 7) / 8 * 8, leaf_room = (s->leaves_read + 7) / 8 * 8;
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
    int64_t group_bytes = 64 * pairs, per_query = (room + 2 * leaf_room + pending) * 8 + pending * 4;
    int64_t entry_bytes = (WORK * t.entry_size + 63) / 64 * 64, box_bytes = ((4 + 2 * BLOCK) * s->dims + 63) / 64 * 64;
    per_query = (per_query + 63) / 64 * 64;
    char *memory = allocate(RINGS * group_bytes + FLIGHT * per_query + 2 * entry_bytes + box_bytes), *free_memory = memory;
    if (!memory) {
        free(own);
        return 1;
    }
    Memory m = {.recents = (int16_t *)memory};
    memset(memory, 0, RINGS * group_bytes);
    free_memory += RINGS * group_bytes;
    for (int b = 0; b < FLIGHT; b++, free_memory += per_query) {
        Query *query = m.flight + b;
        query->best = (int64_t *)free_memory;
        query->near = query->best + room;
        query->leaves = query->near + leaf_room;
        query->pending = query->leaves + leaf_room;
        query->pages = (int32_t *)(query->pending + pending);
    }
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
