"""The causal box tree: which entities a query finds among its predecessors, and the tensors that hold the tree.

Positions are integers on a grid (`to_grid`), so squared distances are exact and all implementations agree bit for bit.

A sequence is one row and head, or one segment of a packed row. Query i sees its first `seen = max(i − W + 1, 0)`
entities, W the local window. `base = tree_base(seen)` of them are in the tree:

- Recents, the entities base ≤ j < seen, are all candidates. There are at most `RECENT + BLOCK − 1`, so a query that
  sees fewer than `RECENT + BLOCK` entities is answered exactly.
- The tree keeps the entities j < base in leaves. The members of the B leaves whose boxes are nearest to the query are
  candidates. A box is the tight bounding box of a leaf's members. Of equally near leaves, the one whose newest member
  is more recent comes first.

The result is the K candidates with the smallest (squared distance, age i − j).

The leaves depend only on the entities before base. Each leaf has a cell, an axis-parallel box, and the cells partition
space. The first leaf has all of space. Entities enter in blocks of `BLOCK`: each goes to the leaf whose cell contains
it, and then each leaf with more than `LEAF_SIZE` members is cut until no part has more:

- The cut halves the widest side of the members' box (the first axis of equals) and divides the cell with it.
- If all members are in one place, or if the sequence has more leaves than its budget (`leaf_budget`), the leaf is not
  cut: its latest `LEAF_SIZE` members stay and the others leave the tree.

The budget bounds the memory of every sequence, and with it the cost of positions that drift.

Shape letters: G rows (batch * heads), N stored entities, P position_dim, L leaves of storage, Q pages.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.compiler import assume_constant_result

GRID = 64  # grid points per unit of position
GRID_LIMIT = 2**14 - 1  # largest coordinate in grid points

LEAF_SIZE = 16  # members of a leaf
BLOCK = 128  # entities that enter the tree together
RECENT = 896  # entities that are candidates without the tree, besides an incomplete block
ENTITIES_PER_LEAF = 8  # the budget has one leaf for this number of entities
SPARE_LEAVES = 256  # leaves of the budget of a sequence without entities

INDEX_DTYPES = {"leaf_boxes": torch.int16}  # the other tensors of a `TreeIndex` are int32

Count = TypeVar("Count", int, torch.Tensor)


def to_grid(positions: torch.Tensor) -> torch.Tensor:
    """Round positions to the grid: int16, in steps of 1 / `GRID`, at most `GRID_LIMIT` steps from 0. NaN becomes 0.

    A product over one entity and a product over many differ in their last bits. Without rounding, equal contexts would
    tie in one and not in the other.
    """
    steps = (positions.float() * GRID).round().nan_to_num(0.0)
    return steps.clamp(-GRID_LIMIT, GRID_LIMIT).to(torch.int16)


def tree_base(seen: Count) -> Count:
    """Return how many of the first `seen` entities of a sequence are in the tree, a multiple of `BLOCK`."""
    return (seen > RECENT) * (seen - RECENT) // BLOCK * BLOCK


def leaf_budget(entered: Count) -> Count:
    """Return the number of leaves beyond which a sequence with `entered` entities in the tree cuts no more leaves."""
    return entered // ENTITIES_PER_LEAF + SPARE_LEAVES


@dataclass
class TreeIndex:
    """The trees of G rows, updated in place by a search. All tensors zero: empty trees.

    The "flat" layout (torch, Triton) has `leaf_ids` and `leaf_boxes`, the "paged" layout (C) has `leaves`,
    `leaf_pages`, `cuts` and `pages`. The tensors of the other layout are None.

    Attributes:
        counters: int32 `[G, 4]`: entities in the tree, leaves, pages, root page. A row of zeros is an empty tree,
            and the other tensors are not read; the next search builds the tree again from the keys.
        leaf_ids: int32 `[G, L, LEAF_SIZE]`, member ids + 1, ascending; 0 where there are fewer members.
        leaf_boxes: int16 `[G, L, 4, P]`: lowest and highest coordinates of the members, then of the cell, inclusive.
        leaves: int32 `[G, L, words]`, members and their positions, written and read by C.
        leaf_pages: int32 `[G, L]`, page of each leaf.
        cuts: int32 `[G, L, 3]`, the cuts of space, a binary tree.
        pages: int32 `[G, Q, words]`, hierarchy of boxes over the leaves, written and read by C.
    """

    counters: torch.Tensor
    leaf_ids: torch.Tensor | None = None
    leaf_boxes: torch.Tensor | None = None
    leaves: torch.Tensor | None = None
    leaf_pages: torch.Tensor | None = None
    cuts: torch.Tensor | None = None
    pages: torch.Tensor | None = None


@assume_constant_result
def index_layout(device: torch.device, position_dim: int) -> str:
    """Return the layout of an index on `device`: "paged" where the search runs in C, else "flat"."""
    from .kernels.box_tree_cpu import tree_library

    query = torch.empty(0, 0, position_dim, dtype=torch.int16, device=device)
    return "flat" if tree_library(query) is None else "paged"


def index_shapes(layout: str, capacity: int, position_dim: int) -> dict[str, tuple[int, ...]]:
    """Return the shape per row of each tensor of a `TreeIndex`; their dtypes are in `INDEX_DTYPES`.

    Args:
        layout: "flat" or "paged".
        capacity: entities that the tree may hold, for example `tree_base` of the longest sequence.
        position_dim: P.
    """
    # A block adds at most BLOCK leaves to a full budget.
    num_leaves = leaf_budget(capacity) + 2 * BLOCK if capacity else 0
    counters = {"counters": (4,)}
    if layout == "flat":
        return counters | {"leaf_ids": (num_leaves, LEAF_SIZE), "leaf_boxes": (num_leaves, 4, position_dim)}
    axis_pairs = -(-position_dim // 2)
    return counters | {
        "leaves": (num_leaves, LEAF_SIZE * (1 + axis_pairs)),
        "leaf_pages": (num_leaves,),
        "cuts": (num_leaves, 3),
        "pages": (
            num_leaves // 5 + 16 * (num_leaves > 0),
            32 * axis_pairs + 64,
        ),  # boxes and the struct `Page` of the C code
    }


def empty_tree_index(layout: str, rows: int, capacity: int, position_dim: int, device: torch.device) -> TreeIndex:
    """Return empty trees for G rows; the arguments are those of `index_shapes`."""
    shapes = index_shapes(layout, capacity, position_dim)
    return TreeIndex(
        **{
            name: torch.zeros(rows, *shape, dtype=INDEX_DTYPES.get(name, torch.int32), device=device)
            for name, shape in shapes.items()
        }
    )
