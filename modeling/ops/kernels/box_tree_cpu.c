/* The causal box tree of box_tree.py, "paged" layout: leaves, the cuts of space, and pages over the leaves.

   The cuts are a binary tree, which leads an entity to the leaf whose cell contains it. They can be as deep as the
   entities' order makes them. A block of entities goes down together, so a deep cut is shared by the block.

   A page has up to 16 entries with their boxes and newest entities, in the order of the cells: leaves at level 0, pages
   above. All leaves have the same level, as in a B-tree, so the depth of pages is logarithmic for any entities. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define LEAF 16
#define FAN 16                   /* entries of a page */
#define LEAST 6                  /* entries of a page after it was split */
/* As in box_tree.py; tests compile other sizes. */
#ifndef BLOCK
#define BLOCK 128
#define RECENT 896
#define SPARE_LEAVES 256
#endif
#define BUDGET(entered) ((entered) / 8 + SPARE_LEAVES)
#define RINGS ((RECENT + BLOCK) / LEAF + 1)
#define FLIGHT 8                 /* queries searched in turns: while one waits for memory the others go on */
#define NONE INT64_MAX
#define LARGEST INT32_MAX
#define WORK (LEAF + BLOCK + FAN) /* most members of an overfull leaf, and most entries of an overfull page */

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

_Static_assert(BLOCK % LEAF == 0 && BLOCK <= 256, "recent entities are read in groups, and counted in uint8_t");

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

/* A cut of a cell: entities with x[axis] <= thr are below. `below` and `above` are cuts, or ~leaf. Cut k was made with
   leaf k + 1, so the first cut is 0. */
typedef struct { int32_t below, above; int16_t axis, thr; } Cut;

/* A page starts with boxes: for each pair of axes the 16 lower, then the 16 upper bounds, each two int16. */
#define BOXES(pairs) (32 * (pairs)) /* in int32 */
typedef struct {
    int32_t child[FAN], newest[FAN];
    int32_t depth[FAN]; /* of the cut between entries f and f + 1 */
    int32_t count, level, parent, unused[13];
} Page;
typedef struct { int32_t child, newest, depth; int16_t box[]; } Entry; /* box: lower, then upper bounds of each axis */

typedef struct {
    int64_t dims, pairs, leaf_size, page_size, entry_size; /* sizes in int32; entry_size in bytes */
    int32_t *counters, *leaves, *leaf_pages, *pages;
    Cut *cuts;
    const int16_t *keys;
    /* working memory */
    int16_t *box, *block;
    char *entries[2];
    int32_t members[WORK], spare[WORK];
} Tree;

#define ENTERED counters[0]
#define LEAVES counters[1]
#define PAGES counters[2]
#define ROOT counters[3]

static inline int16_t *boxes_of(const Tree *t, int32_t page) { return (int16_t *)(t->pages + page * t->page_size); }
static inline Page *page_of(const Tree *t, int32_t page) {
    return (Page *)(t->pages + page * t->page_size + BOXES(t->pairs));
}
static inline int32_t *leaf_of(const Tree *t, int32_t leaf) { return t->leaves + leaf * t->leaf_size; }
static inline Entry *entry_at(const Tree *t, int list, int64_t i) {
    return (Entry *)(t->entries[list] + i * t->entry_size);
}
static inline int held_in(const int32_t *leaf) {
    int held = 0;
    for (int i = 0; i < LEAF; i++) held += leaf[i] != 0;
    return held;
}

/* Stores a position as entry `slot` of a group of 16. */
static inline void put(const Tree *t, int16_t *group, int slot, const int16_t *x) {
    for (int64_t p = 0; p < t->dims; p++) group[(p >> 1) * 32 + 2 * slot + (p & 1)] = x[p];
}

static inline void put_bounds(const Tree *t, int32_t page, int slot, const int16_t *box) {
    int16_t *to = boxes_of(t, page) + 2 * slot;
    for (int64_t p = 0; p < t->dims; p++) {
        to[(p >> 1) * 64 + (p & 1)] = box[p];
        to[(p >> 1) * 64 + 32 + (p & 1)] = box[t->dims + p];
    }
}

static inline void get_bounds(const Tree *t, int32_t page, int slot, int16_t *box) {
    const int16_t *from = boxes_of(t, page) + 2 * slot;
    for (int64_t p = 0; p < t->dims; p++) {
        box[p] = from[(p >> 1) * 64 + (p & 1)];
        box[t->dims + p] = from[(p >> 1) * 64 + 32 + (p & 1)];
    }
}

static inline void widen(int64_t dims, int16_t *box, const int16_t *other_low, const int16_t *other_high) {
    for (int64_t p = 0; p < dims; p++) {
        box[p] = box[p] < other_low[p] ? box[p] : other_low[p];
        box[dims + p] = box[dims + p] > other_high[p] ? box[dims + p] : other_high[p];
    }
}

/* The box of some entities, by id. */
static void box_of(const Tree *t, const int32_t *ids, int count, int16_t *box) {
    const int16_t *x = t->keys + ids[0] * t->dims;
    memcpy(box, x, t->dims * sizeof *x);
    memcpy(box + t->dims, x, t->dims * sizeof *x);
    for (int i = 1; i < count; i++) {
        x = t->keys + ids[i] * t->dims;
        widen(t->dims, box, x, x);
    }
}

static inline int slot_of(const Page *page, int32_t child) {
    int slot = 0;
    while (page->child[slot] != child) slot++;
    return slot;
}

/* Fills a page with entries first .. last - 1 of a list. */
static void write_page(Tree *t, int32_t number, int list, int first, int last) {
    Page *page = page_of(t, number);
    page->count = last - first;
    for (int f = 0; f < page->count; f++) {
        const Entry *entry = entry_at(t, list, first + f);
        page->child[f] = entry->child;
        page->newest[f] = entry->newest;
        put_bounds(t, number, f, entry->box);
        if (page->level) page_of(t, entry->child)->parent = number;
        else t->leaf_pages[entry->child] = number;
        page->depth[f] = entry->depth;
    }
}

static int32_t new_page(Tree *t, int32_t level) {
    int32_t number = t->PAGES++;
    Page *page = page_of(t, number);
    memset(t->pages + number * t->page_size, 0, t->page_size * sizeof(int32_t));
    page->level = level;
    page->parent = -1;
    return number;
}

/* Distributes entries first .. last - 1 of list 0 to pages, the first of them `number`; adds the pages to list 1. */
static int distribute(Tree *t, int32_t number, int first, int last, int pieces) {
    if (last - first > FAN) {
        int cut = first + LEAST - 1;
        for (int i = cut; i < last - LEAST; i++) if (entry_at(t, 0, i)->depth < entry_at(t, 0, cut)->depth) cut = i;
        pieces = distribute(t, number, first, cut + 1, pieces);
        return distribute(t, new_page(t, page_of(t, number)->level), cut + 1, last, pieces);
    }
    write_page(t, number, 0, first, last);
    Entry *piece = entry_at(t, 1, pieces);
    memcpy(piece, entry_at(t, 0, first), t->entry_size);
    for (int i = first + 1; i < last; i++) {
        const Entry *entry = entry_at(t, 0, i);
        widen(t->dims, piece->box, entry->box, entry->box + t->dims);
        if (entry->newest > piece->newest) piece->newest = entry->newest;
        piece->depth = entry->depth;
    }
    piece->child = number;
    return pieces + 1;
}

/* Replaces entry `slot` of a page by the `count` entries of list 1; pages that overflow are split, up to the root. */
static void replace(Tree *t, int32_t number, int slot, int count) {
    for (;;) {
        Page *page = page_of(t, number);
        int total = 0, old = page->count;
        for (int f = 0; f < old; f++) {
            if (f == slot)
                for (int i = 0; i < count; i++) memcpy(entry_at(t, 0, total++), entry_at(t, 1, i), t->entry_size);
            else {
                Entry *entry = entry_at(t, 0, total++);
                entry->child = page->child[f];
                entry->newest = page->newest[f];
                get_bounds(t, number, f, entry->box);
            }
            entry_at(t, 0, total - 1)->depth = page->depth[f];
        }
        if (total <= FAN) {
            write_page(t, number, 0, 0, total);
            return;
        }
        int32_t parent = page->parent;
        count = distribute(t, number, 0, total, 0);
        while (parent < 0) { /* a new root above */
            t->ROOT = new_page(t, page_of(t, number)->level + 1);
            number = t->ROOT;
            memcpy(t->entries[0], t->entries[1], count * t->entry_size);
            if (count <= FAN) {
                write_page(t, number, 0, 0, count);
                return;
            }
            count = distribute(t, number, 0, count, 0);
        }
        slot = slot_of(page_of(t, parent), number);
        number = parent;
    }
}

/* Depth in the tree of cuts of the cell of an entry: one more than the deeper of the cuts beside it. */
static int32_t depth_of(const Tree *t, int32_t number, int slot) {
    int32_t depth = -1;
    for (int side = 0; side < 2; side++)
        for (int32_t at = number, f = slot;;) {
            const Page *page = page_of(t, at);
            if (side ? f + 1 < page->count : f > 0) {
                int32_t cut = page->depth[side ? f : f - 1];
                depth = cut > depth ? cut : depth;
                break;
            }
            if (page->parent < 0) break;
            f = slot_of(page_of(t, page->parent), at);
            at = page->parent;
        }
    return depth + 1;
}

static void write_leaf(Tree *t, int32_t leaf, const int32_t *ids, int count) {
    int32_t *to = leaf_of(t, leaf);
    memset(to, 0, t->leaf_size * sizeof *to);
    for (int i = 0; i < count; i++) {
        to[i] = ids[i] + 1;
        put(t, (int16_t *)(to + LEAF), i, t->keys + ids[i] * t->dims);
    }
}

/* Cuts members first .. first + count - 1 into leaves, the first of them `leaf`, which `*from` leads to. Adds the leaves
   to list 1 and returns its length. */
static int split(Tree *t, int32_t *from, int32_t leaf, int first, int count, int32_t depth, int over_budget,
                 int pieces) {
    Entry *piece = entry_at(t, 1, pieces);
    int32_t *ids = t->members + first;
    box_of(t, ids, count, piece->box);
    if (count > LEAF) {
        int axis = 0, widest = 0;
        for (int p = 0; p < t->dims; p++) {
            int width = piece->box[t->dims + p] - piece->box[p];
            if (width > widest) widest = width, axis = p;
        }
        if (widest && !over_budget) {
            int16_t thr = piece->box[axis] + (widest - 1) / 2;
            int below = 0, above = 0;
            for (int i = 0; i < count; i++) {
                if (t->keys[ids[i] * t->dims + axis] <= thr) ids[below++] = ids[i];
                else t->spare[above++] = ids[i];
            }
            memcpy(ids + below, t->spare, above * sizeof *ids);
            int32_t other = t->LEAVES++;
            Cut *cut = t->cuts + other - 1;
            *from = other - 1;
            *cut = (Cut){~leaf, ~other, axis, thr};
            pieces = split(t, &cut->below, leaf, first, below, depth + 1, 0, pieces);
            entry_at(t, 1, pieces - 1)->depth = depth;
            return split(t, &cut->above, other, first + below, above, depth + 1, 0, pieces);
        }
        ids += count - LEAF;
        count = LEAF;
        if (over_budget) box_of(t, ids, count, piece->box);
    }
    write_leaf(t, leaf, ids, count);
    piece->child = leaf;
    piece->newest = ids[count - 1];
    return pieces + 1;
}

/* Adds `count` entities, `arrived`, to the leaf that `*from` leads to. */
static void add(Tree *t, int32_t *from, const int32_t *arrived, int count, int over_budget) {
    int32_t leaf = ~*from, number = t->leaf_pages[leaf], *ids = leaf_of(t, leaf), newest = arrived[count - 1];
    int held = held_in(ids), slot = slot_of(page_of(t, number), leaf);
    int16_t *box = t->box;
    box_of(t, arrived, count, box);
    /* The pages above contain the new entities. */
    for (int32_t at = number, parent; (parent = page_of(t, at)->parent) >= 0; at = parent) {
        Page *page = page_of(t, parent);
        int f = slot_of(page, at);
        if (page->newest[f] < newest) page->newest[f] = newest;
        int16_t whole[2 * t->dims];
        get_bounds(t, parent, f, whole);
        widen(t->dims, whole, box, box + t->dims);
        put_bounds(t, parent, f, whole);
    }
    if (held + count <= LEAF) {
        for (int i = 0; i < count; i++) {
            ids[held + i] = arrived[i] + 1;
            put(t, (int16_t *)(ids + LEAF), held + i, t->keys + arrived[i] * t->dims);
        }
        if (held) {
            int16_t whole[2 * t->dims];
            get_bounds(t, number, slot, whole);
            widen(t->dims, box, whole, whole + t->dims);
        }
        put_bounds(t, number, slot, box);
        page_of(t, number)->newest[slot] = newest;
        return;
    }
    for (int i = 0; i < held; i++) t->members[i] = ids[i] - 1;
    memcpy(t->members + held, arrived, count * sizeof *arrived);
    int pieces = split(t, from, leaf, 0, held + count, depth_of(t, number, slot), over_budget, 0);
    replace(t, number, slot, pieces);
}

/* Finds what leads each of the next BLOCK entities to its leaf. Large groups go down together, small ones in turns. */
static void locate(Tree *t, int32_t *root, int32_t **from) {
    int32_t first = t->ENTERED;
    for (int64_t p = 0; p < t->dims; p++)
        for (int k = 0; k < BLOCK; k++) t->block[p * BLOCK + k] = t->keys[(first + k) * t->dims + p];
    struct { int32_t *from; int first, count; } groups[BLOCK];
    uint8_t order[BLOCK], spare[BLOCK], single[BLOCK];
    for (int k = 0; k < BLOCK; k++) order[k] = k;
    int waiting = 1, singles = 0;
    groups[0].from = root, groups[0].first = 0, groups[0].count = BLOCK;
    while (waiting) {
        int32_t *at = groups[--waiting].from;
        int begin = groups[waiting].first, count = groups[waiting].count;
        while (*at >= 0 && count > 4) {
            Cut *cut = t->cuts + *at;
            const int16_t *x = t->block + cut->axis * BLOCK;
            int below = 0, above = 0;
            for (int i = begin; i < begin + count; i++) {
                uint8_t k = order[i];
                int is_above = x[k] > cut->thr;
                spare[above] = k;
                order[begin + below] = k;
                above += is_above;
                below += !is_above;
            }
            memcpy(order + begin + below, spare, above);
            if (below && above) {
                groups[waiting].from = &cut->above;
                groups[waiting].first = begin + below;
                groups[waiting++].count = above;
            }
            at = below ? &cut->below : &cut->above;
            count = below ? below : above;
        }
        for (int i = begin; i < begin + count; i++) {
            from[order[i]] = at;
            if (*at >= 0) single[singles++] = order[i];
        }
    }
    while (singles) {
        int left = 0;
        for (int i = 0; i < singles; i++) {
            uint8_t k = single[i];
            Cut *cut = t->cuts + *from[k];
            from[k] = t->block[cut->axis * BLOCK + k] > cut->thr ? &cut->above : &cut->below;
            single[left] = k;
            left += *from[k] >= 0;
        }
        singles = left;
    }
}

/* Enters the next BLOCK entities. */
static void enter(Tree *t) {
    int32_t first = t->ENTERED;
    if (!t->LEAVES) {
        t->LEAVES = 1;
        t->ROOT = new_page(t, 0);
        page_of(t, t->ROOT)->count = 1;
        memset(leaf_of(t, 0), 0, t->leaf_size * sizeof(int32_t));
        t->leaf_pages[0] = t->ROOT;
    }
    int over_budget = t->LEAVES > BUDGET(first);
    int32_t root = t->LEAVES > 1 ? 0 : ~0, *from[BLOCK];
    locate(t, &root, from);
    /* The entities of each leaf as a list, found by a small hash table. */
    int16_t next[BLOCK], head[2 * BLOCK], tail[2 * BLOCK], order[BLOCK];
    int32_t leaf[BLOCK];
    memset(head, -1, sizeof head);
    int groups = 0;
    for (int k = 0; k < BLOCK; k++) {
        leaf[k] = ~*from[k];
        __builtin_prefetch(leaf_of(t, leaf[k]));
        unsigned place = (unsigned)leaf[k] % (2 * BLOCK);
        while (head[place] >= 0 && leaf[head[place]] != leaf[k]) place = (place + 1) % (2 * BLOCK);
        next[k] = -1;
        if (head[place] < 0) head[place] = k, order[groups++] = place;
        else next[tail[place]] = k;
        tail[place] = k;
    }
    for (int group = 0; group < groups; group++) {
        int32_t arrived[BLOCK];
        int count = 0;
        for (int k = head[order[group]]; k >= 0; k = next[k]) arrived[count++] = first + k;
        add(t, from[head[order[group]]], arrived, count, over_budget);
    }
    t->ENTERED += BLOCK;
}

static inline void get_position(const Tree *t, const int32_t *leaf, int slot, int16_t *x) {
    const int16_t *group = (const int16_t *)(leaf + LEAF);
    for (int64_t p = 0; p < t->dims; p++) x[p] = group[(p >> 1) * 32 + 2 * slot + (p & 1)];
}

/* Removes entry `slot` from a page. */
static void remove_entry(Tree *t, int32_t number, int slot) {
    Page *page = page_of(t, number);
    if (slot > 0) page->depth[slot - 1] = page->depth[slot];
    for (int f = slot; f + 1 < page->count; f++) {
        page->child[f] = page->child[f + 1];
        page->newest[f] = page->newest[f + 1];
        page->depth[f] = page->depth[f + 1];
        get_bounds(t, number, f + 1, t->box);
        put_bounds(t, number, f, t->box);
    }
    page->count--;
}

/* Writes the box and the newest member of a leaf to its page. */
static void renew_leaf(Tree *t, int32_t leaf) {
    const int32_t *ids = leaf_of(t, leaf);
    int32_t number = t->leaf_pages[leaf];
    int held = held_in(ids), slot = slot_of(page_of(t, number), leaf);
    int16_t x[t->dims];
    for (int i = 0; i < held; i++) {
        get_position(t, ids, i, x);
        if (i == 0) {
            memcpy(t->box, x, sizeof x);
            memcpy(t->box + t->dims, x, sizeof x);
        } else widen(t->dims, t->box, x, x);
    }
    put_bounds(t, number, slot, t->box);
    page_of(t, number)->newest[slot] = ids[held - 1] - 1;
}

/* Writes the boxes and newest members of the pages below a page to it. */
static void renew_page(Tree *t, int32_t number) {
    Page *page = page_of(t, number);
    if (page->level == 0) return;
    int16_t box[2 * t->dims];
    for (int f = 0; f < page->count; f++) {
        int32_t child = page->child[f];
        renew_page(t, child);
        const Page *below = page_of(t, child);
        get_bounds(t, child, 0, t->box);
        page->newest[f] = below->newest[0];
        for (int i = 1; i < below->count; i++) {
            get_bounds(t, child, i, box);
            widen(t->dims, t->box, box, box + t->dims);
            if (below->newest[i] > page->newest[f]) page->newest[f] = below->newest[i];
        }
        put_bounds(t, number, f, t->box);
    }
}

/* Adds the members of the leaf `from` to those of `to`; both together have at most LEAF. */
static void merge(Tree *t, int32_t to, int32_t from) {
    int32_t *ids = leaf_of(t, to), *others = leaf_of(t, from);
    int held = held_in(ids), more = held_in(others);
    int16_t x[t->dims];
    for (int i = held + more; more > 0;) { /* from the newest on */
        int moves = held == 0 || others[more - 1] > ids[held - 1];
        int32_t *source = moves ? others : ids;
        int slot = moves ? --more : --held;
        ids[--i] = source[slot];
        get_position(t, source, slot, x);
        put(t, (int16_t *)(ids + LEAF), i, x);
    }
}

/* Takes the entities from `base` on out of the tree again. Returns 0 if the tree does not tell what it was: entities
   have left it, or its pages are sparse. */
static int crop(Tree *t, int32_t base, int32_t *parents) {
    if (t->LEAVES > BUDGET(base) || t->PAGES > t->LEAVES / 5 + 16) return 0;
    for (int32_t leaf = 0; leaf < t->LEAVES; leaf++) {
        int32_t *ids = leaf_of(t, leaf);
        int held = held_in(ids), kept = held;
        while (kept && ids[kept - 1] > base) kept--;
        if (kept == held) continue;
        int32_t number = t->leaf_pages[leaf];
        get_bounds(t, number, slot_of(page_of(t, number), leaf), t->box);
        if (held == LEAF && !memcmp(t->box, t->box + t->dims, t->dims * sizeof(int16_t))) return 0;
        memset(ids + kept, 0, (LEAF - kept) * sizeof *ids);
    }
    for (int32_t k = 0; k < t->LEAVES - 1; k++) { /* parents: 2 (cut + 1), and 1 more if above */
        if (t->cuts[k].below >= 0) parents[t->cuts[k].below] = 2 * k + 2;
        if (t->cuts[k].above >= 0) parents[t->cuts[k].above] = 2 * k + 3;
    }
    /* The cuts since then were the last ones. A cut is made where more than LEAF entities are. */
    while (t->LEAVES > 1) {
        int32_t k = t->LEAVES - 2, last = k + 1, leaf = ~t->cuts[k].below;
        if (leaf < 0 || ~t->cuts[k].above != last) break;
        if (held_in(leaf_of(t, leaf)) + held_in(leaf_of(t, last)) > LEAF) break;
        merge(t, leaf, last);
        for (int32_t child = last, number = t->leaf_pages[last];;) { /* and the pages that become empty */
            remove_entry(t, number, slot_of(page_of(t, number), child));
            if (page_of(t, number)->count) break;
            child = number;
            number = page_of(t, number)->parent;
        }
        if (k > 0) *(parents[k] & 1 ? &t->cuts[parents[k] / 2 - 1].above : &t->cuts[parents[k] / 2 - 1].below) = ~leaf;
        t->LEAVES--;
    }
    for (int32_t leaf = 0; leaf < t->LEAVES; leaf++) renew_leaf(t, leaf);
    renew_page(t, t->ROOT);
    t->ENTERED = base;
    return 1;
}

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

static void set_sizes(Tree *t, int64_t dims) {
    t->dims = dims;
    t->pairs = (dims + 1) / 2;
    t->leaf_size = LEAF + LEAF * t->pairs;
    t->page_size = BOXES(t->pairs) + sizeof(Page) / sizeof(int32_t);
    t->entry_size = (sizeof(Entry) + 2 * dims * sizeof(int16_t) + 7) / 8 * 8;
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
