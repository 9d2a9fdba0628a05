"""The neighbour search as loops over Python integers: the definition of what every implementation finds.

It is slow and shares only the constants of `box_tree` with the implementations. A sequence is a list of positions on
the grid, and a position a list of integers, one per axis.
"""

from dataclasses import dataclass

from .box_tree import BLOCK, ENTITIES_PER_LEAF, LEAF_SIZE, RECENT, SPARE_LEAVES

Position = list[int]
Neighbor = tuple[int, int]  # (squared distance, id)


@dataclass
class Leaf:
    """A leaf of the box tree.

    Attributes:
        cell: lowest and highest coordinate of the cell along each axis; None where space has no bound.
        members: ids of the entities, ascending.
        box: lowest and highest coordinate of the members along each axis.
    """

    cell: list[tuple[int | None, int | None]]
    members: list[int]
    box: list[tuple[int, int]]

    def contains(self, position: Position) -> bool:
        """Return whether the position lies in the cell."""
        return all(
            (low is None or low <= x) and (high is None or x <= high)
            for x, (low, high) in zip(position, self.cell, strict=True)
        )


def search_exact_loop(
    queries: list[Position], keys: list[Position], num_neighbors: int, window: int
) -> list[list[Neighbor]]:
    """Return the K nearest predecessors of each query of a sequence, fewer where there are fewer."""
    return [_nearest(query, keys, list(range(i - window + 1)), num_neighbors) for i, query in enumerate(queries)]


def search_tree_loop(
    queries: list[Position], keys: list[Position], num_neighbors: int, window: int, num_leaves: int
) -> list[list[Neighbor]]:
    """Return the neighbours that the box tree finds for each query of a sequence, fewer where there are fewer."""
    found = []
    leaves, entered = first_leaves(len(keys[0]) if keys else 0), 0
    for i, query in enumerate(queries):
        seen = max(i - window + 1, 0)
        base = max(seen - RECENT, 0) // BLOCK * BLOCK
        while entered < base:
            leaves = enter(leaves, keys, entered)
            entered += BLOCK
        nearest = sorted((leaf for leaf in leaves if leaf.members), key=lambda leaf: _leaf_order(leaf, query))
        candidates = list(range(base, seen))
        for leaf in nearest[:num_leaves]:
            candidates.extend(leaf.members)
        found.append(_nearest(query, keys, candidates, num_neighbors))
    return found


def first_leaves(position_dim: int) -> list[Leaf]:
    """Return the leaves of a tree without entities: one, with all of space as its cell."""
    return [Leaf([(None, None)] * position_dim, [], [])]


def enter(leaves: list[Leaf], keys: list[Position], entered: int) -> list[Leaf]:
    """Return the leaves after the block of entities that begins at `entered` has entered."""
    may_cut = len(leaves) <= entered // ENTITIES_PER_LEAF + SPARE_LEAVES
    result = []
    arrived: list[list[int]] = [[] for _ in leaves]
    for j in range(entered, entered + BLOCK):
        (number,) = (number for number, leaf in enumerate(leaves) if leaf.contains(keys[j]))
        arrived[number].append(j)
    for leaf, new in zip(leaves, arrived, strict=True):
        result.extend(split(leaf.cell, leaf.members + new, keys, may_cut) if new else [leaf])
    return result


def split(
    cell: list[tuple[int | None, int | None]], members: list[int], keys: list[Position], may_cut: bool
) -> list[Leaf]:
    """Return the leaves that a cell with these members is cut into, each with at most `LEAF_SIZE` members."""
    box = _bounding_box(members, keys)
    sides = [high - low for low, high in box]
    if len(members) <= LEAF_SIZE:
        return [Leaf(cell, members, box)]
    if max(sides) == 0 or not may_cut:
        latest = members[-LEAF_SIZE:]
        return [Leaf(cell, latest, _bounding_box(latest, keys))]
    axis = sides.index(max(sides))
    threshold = box[axis][0] + (sides[axis] - 1) // 2
    lower_cell, upper_cell = list(cell), list(cell)
    lower_cell[axis] = (cell[axis][0], threshold)
    upper_cell[axis] = (threshold + 1, cell[axis][1])
    lower = [j for j in members if keys[j][axis] <= threshold]
    upper = [j for j in members if keys[j][axis] > threshold]
    return split(lower_cell, lower, keys, may_cut) + split(upper_cell, upper, keys, may_cut)


def _bounding_box(members: list[int], keys: list[Position]) -> list[tuple[int, int]]:
    """Return the lowest and highest coordinate of the members along each axis."""
    return [(min(axis), max(axis)) for axis in zip(*(keys[j] for j in members), strict=True)]


def _leaf_order(leaf: Leaf, query: Position) -> tuple[int, int]:
    """Return the sort key of a leaf: squared distance of the query to the box, then the leaf's newest member first."""
    outside = (max(low - x, x - high, 0) for x, (low, high) in zip(query, leaf.box, strict=True))
    return sum(side * side for side in outside), -max(leaf.members)


def _nearest(query: Position, keys: list[Position], candidates: list[int], num_neighbors: int) -> list[Neighbor]:
    """Return the K nearest candidates, of equally near ones the most recent first."""
    squared = {j: sum((x - y) ** 2 for x, y in zip(query, keys[j], strict=True)) for j in candidates}
    return [(squared[j], j) for j in sorted(squared, key=lambda j: (squared[j], -j))[:num_neighbors]]
