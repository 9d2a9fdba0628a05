/* Leaves of the box tree: blocks of entities enter them, and crops take entities out again. */
#include "box_tree_pages.h"

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
