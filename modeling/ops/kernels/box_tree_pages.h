/* The causal box tree of box_tree.py, "paged" layout: leaves, the cuts of space, and pages over the leaves.

   The cuts are a binary tree, which leads an entity to the leaf whose cell contains it. They can be as deep as the
   entities' order makes them. A block of entities goes down together, so a deep cut is shared by the block.

   A page has up to 16 entries with their boxes and newest entities, in the order of the cells: leaves at level 0, pages
   above. All leaves have the same level, as in a B-tree, so the depth of pages is logarithmic for any entities. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LEAF 16
#define FAN 16  /* entries of a page */
#define LEAST 6 /* entries of a page after it was split */
/* As in box_tree.py; tests compile other sizes. */
#ifndef BLOCK
#define BLOCK 128
#define RECENT 896
#define SPARE_LEAVES 256
#endif
#define BUDGET(entered) ((entered) / 8 + SPARE_LEAVES)
#define WORK (LEAF + BLOCK + FAN) /* most members of an overfull leaf, and most entries of an overfull page */

_Static_assert(BLOCK % LEAF == 0 && BLOCK <= 256, "recent entities are read in groups, and counted in uint8_t");

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

static void set_sizes(Tree *t, int64_t dims) {
    t->dims = dims;
    t->pairs = (dims + 1) / 2;
    t->leaf_size = LEAF + LEAF * t->pairs;
    t->page_size = BOXES(t->pairs) + sizeof(Page) / sizeof(int32_t);
    t->entry_size = (sizeof(Entry) + 2 * dims * sizeof(int16_t) + 7) / 8 * 8;
}

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
