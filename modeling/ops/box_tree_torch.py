"""The box tree in torch operations: the reference of the kernels, and the search where none of them runs.

A query looks at the boxes of all leaves, so a search of N entities takes O(N²) time and O(N) memory. Entities enter
the trees of all rows together, block by block, and between two blocks the queries that see the same tree are answered.

Shape letters: G rows, M queries of this call, N stored entities, P position_dim, K neighbours, B leaves read, L leaves
of storage; T rows, m queries and n leaves of one step; E members of the leaves that a block enters, S segments.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .box_tree import BLOCK, LEAF_SIZE, RECENT, TreeIndex, empty_tree_index, leaf_budget, tree_base
from .neighbor_ranking import NO_CODE, NO_DISTANCE, rank_nearest, squared_distances, sum_of_squares

QUERY_CHUNK = 2**19  # candidates and leaves whose distances are computed together
LOWEST, HIGHEST = -(2**15), 2**15 - 1  # coordinates of the cell that contains all of space
FAR = 2**16  # larger than every coordinate


def search_tree_torch(
    query: torch.Tensor,
    query_index: torch.Tensor,
    key: torch.Tensor,
    num_neighbors: int,
    window: int,
    num_leaves: int,
    reach: torch.Tensor | None,
    counts: torch.Tensor | None,
    index: TreeIndex | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`neighbor_search.search_tree` in torch operations; `index` is flat or None."""
    rows, length, _ = query.shape
    if counts is None:
        counts = query_index.new_full((rows,), length)
    if index is not None or reach is None:
        past = query_index[:, 0]
        return _search_rows(query, past, key, num_neighbors, window, num_leaves, counts, index)
    return search_segments(_search_rows, query, key[:, :length], num_neighbors, window, num_leaves, reach, counts)


def search_segments(
    search_rows: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    num_neighbors: int,
    window: int,
    num_leaves: int,
    reach: torch.Tensor,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search each segment as a row of its own. Segments of similar length share a call, which bounds the padding.

    `search_rows` has the arguments and results of `_search_rows`; `counts` is int64 `[G]`.
    """
    rows, length, position_dim = query.shape
    is_start = (reach == 0) & (torch.arange(length, device=query.device) < counts[:, None])
    row, first = is_start.nonzero().unbind(dim=-1)
    start = row * length + first
    end = torch.minimum(torch.cat([start[1:], start.new_tensor([rows * length])]), row * length + counts[row])

    indices = reach.new_full((rows * length, num_neighbors), -1)
    squared = query.new_full((rows * length, num_neighbors), NO_DISTANCE, dtype=torch.int32)
    query, key = query.reshape(-1, position_dim), key.reshape(-1, position_dim)
    group = ((end - start).float().log2()).long()
    for number in group.unique().tolist():
        members = group == number
        lengths = (end - start)[members]
        offsets = torch.arange(int(lengths.max()), device=query.device)
        is_real = offsets < lengths[:, None]
        place = start[members, None] + offsets * is_real
        found, distances = search_rows(
            query[place], torch.zeros_like(lengths), key[place], num_neighbors, window, num_leaves, lengths, None
        )
        found = torch.where(found < 0, -1, found + first[members, None, None])
        indices[place[is_real]], squared[place[is_real]] = found[is_real], distances[is_real]
    return indices.view(rows, length, -1), squared.view(rows, length, -1)


def _search_rows(
    query: torch.Tensor,
    past: torch.Tensor,
    key: torch.Tensor,
    num_neighbors: int,
    window: int,
    num_leaves: int,
    counts: torch.Tensor,
    index: TreeIndex | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search rows that are one sequence each. `past` `[G]` is the position of the first query."""
    rows, length, position_dim = query.shape
    if index is None:
        last_seen = int((past + counts).max()) - window
        index = empty_tree_index("flat", rows, tree_base(last_seen), position_dim, query.device)
    search = _RowSearch(query, past, key, num_neighbors, window, num_leaves, index)
    indices = past.new_full((rows, length, num_neighbors), -1)
    squared = past.new_full((rows, length, num_neighbors), NO_DISTANCE, dtype=torch.int32)
    done = torch.zeros_like(counts)
    while True:
        # The queries up to here see the entities that are in the tree now.
        end = torch.minimum(index.counters[:, 0] + RECENT + BLOCK + window - 1 - past, counts)
        search.answer(done, end, indices, squared)
        done = torch.maximum(done, end)
        behind = (done < counts).nonzero()[:, 0]
        if len(behind) == 0:
            return indices, squared
        enter_block(index, key, behind)


@dataclass
class _RowSearch:
    """The arguments of `_search_rows` that stay the same while blocks enter."""

    query: torch.Tensor
    past: torch.Tensor
    key: torch.Tensor
    num_neighbors: int
    window: int
    num_leaves: int
    index: TreeIndex

    def answer(self, first: torch.Tensor, end: torch.Tensor, indices: torch.Tensor, squared: torch.Tensor) -> None:
        """Write the neighbours of the queries first ≤ a < end of each row; `first` and `end` are int64 `[G]`."""
        rows = (first < end).nonzero()[:, 0]
        if len(rows) == 0:
            return
        width = int((end - first).max())
        leaves = int(self.index.counters[:, 1].max())
        candidates = min(RECENT + BLOCK, self.key.shape[1]) + leaves + LEAF_SIZE * min(self.num_leaves, leaves)
        step = min(width, max(1, QUERY_CHUNK // candidates))
        for part in rows.split(max(1, QUERY_CHUNK // candidates // width)):
            for start in range(0, width, step):
                query_number = first[part, None] + start + torch.arange(step, device=part.device)
                is_real = query_number < end[part, None]
                query_number = query_number.clamp(max=self.query.shape[1] - 1)
                results = self._nearest(part, query_number)
                place = part[:, None].expand_as(query_number)[is_real], query_number[is_real]
                indices[place], squared[place] = (result[is_real] for result in results)

    def _nearest(self, rows: torch.Tensor, query_number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the neighbours and squared distances `[T, m, K]` of queries `[T, m]` that see the present trees."""
        query = self.query[rows[:, None], query_number]
        query_index = (self.past[rows, None] + query_number)[..., None]
        seen, base = query_index - self.window + 1, self.index.counters[rows, 0].long()
        members = self._members_of_nearest_leaves(rows, query)
        keys = self.key[rows[:, None, None], members.clamp(min=0)]
        member_distances = squared_distances(query[:, :, None], keys)

        width = int((seen - base[:, None, None]).clamp(0, RECENT + BLOCK - 1).max())
        recents = base[:, None] + torch.arange(width, device=base.device)
        keys = self.key[rows[:, None], recents.clamp(max=self.key.shape[1] - 1)]
        recent_distances = squared_distances(query[:, :, None], keys[:, None])
        recents = recents[:, None].expand_as(recent_distances)

        ids = torch.cat([members, recents], dim=-1)
        squared = torch.cat([member_distances, recent_distances], dim=-1)
        visible = (ids >= 0) & (ids < seen)
        ages, squared = rank_nearest(squared, query_index - ids, visible, self.num_neighbors)
        return torch.where(ages < 0, -1, query_index - ages), squared

    def _members_of_nearest_leaves(self, rows: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the members of the B nearest leaves of each query, int64 `[T, m, B * LEAF_SIZE]`; −1 for none."""
        count = self.index.counters[rows, 1]
        stored = int(count.max())
        leaf_ids, boxes = self.index.leaf_ids[rows, :stored], self.index.leaf_boxes[rows, :stored, :2]
        newest = leaf_ids.amax(dim=-1).long() - 1
        codes = _box_distances(query, boxes).long() << 32 | (NO_DISTANCE - newest[:, None])
        codes.masked_fill_((torch.arange(stored, device=rows.device) >= count[:, None])[:, None], NO_CODE)
        codes, leaves = codes.topk(min(self.num_leaves, stored), dim=-1, largest=False)
        members = leaf_ids[torch.arange(len(rows), device=rows.device)[:, None, None], leaves].long() - 1
        return members.masked_fill_((codes == NO_CODE)[..., None], -1).flatten(2)


def _box_distances(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Return the squared distances of points `[T, m, P]` to boxes `[T, n, 2, P]`, int32 `[T, m, n]`."""
    low, high = boxes.int().transpose(1, 3).contiguous().unbind(dim=2)  # [T, P, n]
    axes = zip(points.int().unbind(dim=-1), low.unbind(dim=1), high.unbind(dim=1), strict=True)
    return sum_of_squares(
        torch.maximum(low[:, None] - point[..., None], point[..., None] - high[:, None]).clamp_(min=0)
        for point, low, high in axes
    )


def enter_block(index: TreeIndex, key: torch.Tensor, rows: torch.Tensor) -> None:
    """Let the next block of entities enter the trees of the rows, int64 `[T]`."""
    _start_trees(index, rows)
    entered, count = index.counters[rows, 0].long(), index.counters[rows, 1].long()
    ids = entered[:, None] + torch.arange(BLOCK, device=rows.device)
    leaves = _containing_leaves(index, key, rows, ids, count)

    # The members of the entered leaves, old and new, as lists of `group` (number of the leaf in this step) and id.
    stored = index.leaf_ids.shape[1]
    code = torch.arange(len(rows), device=rows.device)[:, None] * stored + leaves
    touched, group = code.unique(return_inverse=True)
    tree, leaf = touched // stored, touched % stored
    held = index.leaf_ids[rows[tree], leaf].long() - 1
    held_group, _ = (held >= 0).nonzero().unbind(dim=-1)
    group = torch.cat([held_group, group.flatten()])
    ids = torch.cat([held[held >= 0], ids.flatten()])
    order = (group << 32 | ids).argsort()
    group, ids = group[order], ids[order]
    position = key[rows[tree[group]], ids].int()

    group, parent, cells = _cut_leaves(
        group, position, index.leaf_boxes[rows[tree], leaf, 2:].int(), may_cut=(count <= leaf_budget(entered))[tree]
    )
    tree, is_new = tree[parent], torch.arange(len(parent), device=rows.device) >= len(leaf)
    number = torch.cat([leaf, count[tree[is_new]] + _rank_in_group(tree[is_new])])
    _write_leaves(index, rows[tree], number, group, ids, position, cells)
    index.counters[rows, 0] += BLOCK
    index.counters[rows, 1] += torch.bincount(tree[is_new], minlength=len(rows)).int()


def _start_trees(index: TreeIndex, rows: torch.Tensor) -> None:
    """Give empty trees their first leaf, without members."""
    rows = rows[index.counters[rows, 1] == 0]
    index.leaf_ids[rows, 0] = 0
    index.leaf_boxes[rows, 0, 2], index.leaf_boxes[rows, 0, 3] = LOWEST, HIGHEST
    index.counters[rows, 1] = 1


def _containing_leaves(
    index: TreeIndex, key: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """Return the leaf whose cell contains each entity of `ids` `[T, BLOCK]`, int64 `[T, BLOCK]`."""
    stored = int(count.max())
    leaves = []
    for part in torch.arange(len(rows), device=rows.device).split(max(1, QUERY_CHUNK // (stored * ids.shape[1]))):
        position = key[rows[part, None], ids[part]]
        outside = _box_distances(position, index.leaf_boxes[rows[part], :stored, 2:]) > 0
        outside |= (torch.arange(stored, device=rows.device) >= count[part, None])[:, None]
        leaves.append(outside.int().argmin(dim=-1))
    return torch.cat(leaves)


def _cut_leaves(
    group: torch.Tensor, position: torch.Tensor, cells: torch.Tensor, may_cut: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut leaves until each has `LEAF_SIZE` members, or all members in one place, or may not be cut.

    The lower part keeps the leaf's number, the upper part becomes a new leaf behind the present ones.

    Args:
        group: leaf of each member, int64 `[E]`.
        position: int32 `[E, P]`.
        cells: lowest and highest coordinates of each leaf's cell, int32 `[leaves, 2, P]`.
        may_cut: whether the sequence is within its budget, bool `[leaves]`.

    Returns:
        (leaf of each member, the given leaf that each leaf is a part of, cells).
    """
    parent = torch.arange(len(cells), device=cells.device)
    while True:
        low, high = _bounds(group, position, len(cells))
        side, axis = (high - low).max(dim=-1)
        cut = may_cut[parent] & (group.bincount(minlength=len(cells)) > LEAF_SIZE) & (side > 0)
        (parts,) = cut.nonzero(as_tuple=True)
        if len(parts) == 0:
            return group, parent, cells
        threshold = low.gather(1, axis[:, None])[:, 0] + (side - 1) // 2
        upper = torch.empty_like(parent)
        upper[parts] = torch.arange(len(cells), len(cells) + len(parts), device=cells.device)
        is_upper = cut[group] & (position.gather(1, axis[group, None])[:, 0] > threshold[group])
        group = torch.where(is_upper, upper[group], group)

        new_cells = cells[parts]
        new_cells[torch.arange(len(parts), device=cells.device), 0, axis[parts]] = threshold[parts] + 1
        cells[parts, 1, axis[parts]] = threshold[parts]
        cells, parent = torch.cat([cells, new_cells]), torch.cat([parent, parent[parts]])


def _bounds(group: torch.Tensor, position: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and highest coordinates of each group's positions, `[groups, P]`."""
    places = group[:, None].expand_as(position)
    low, high = (position.new_full((num_groups, position.shape[1]), far) for far in (FAR, -FAR))
    return low.scatter_reduce_(0, places, position, "amin"), high.scatter_reduce_(0, places, position, "amax")


def _rank_in_group(group: torch.Tensor) -> torch.Tensor:
    """Return how many earlier entries have the same value, int64 `[E]`."""
    ordered, order = group.sort(stable=True)
    rank = torch.arange(len(group), device=group.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter_(0, order, rank)


def _write_leaves(
    index: TreeIndex,
    rows: torch.Tensor,
    leaves: torch.Tensor,
    group: torch.Tensor,
    ids: torch.Tensor,
    position: torch.Tensor,
    cells: torch.Tensor,
) -> None:
    """Write leaves `[leaves]` with their latest `LEAF_SIZE` members; `ids` `[E]` ascend within a group."""
    size = group.bincount(minlength=len(leaves))
    slot = _rank_in_group(group) - (size - LEAF_SIZE).clamp(min=0)[group]
    stays = slot >= 0
    group = group[stays]
    members = torch.zeros(len(leaves), LEAF_SIZE, dtype=torch.int32, device=ids.device)
    members[group, slot[stays]] = (ids[stays] + 1).int()
    index.leaf_ids[rows, leaves] = members
    box = torch.stack(_bounds(group, position[stays], len(leaves)), dim=1)
    index.leaf_boxes[rows, leaves] = torch.cat([box, cells], dim=1).to(torch.int16)
