"""Draws entities in a plane, the boxes of the search tree, one query, the leaves that it reads and its neighbours.

The boxes and the neighbours come from the search itself.

Example:
    ```bash
    python scripts/draw_box_tree.py docs/img/box-tree.png    # or .svg
    ```
"""

import os
import sys
from dataclasses import dataclass

os.environ["DFN_HF_KERNELS"] = "0"  # the PyTorch operations keep a tree that can be read from outside

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dfn_hf.modeling.ops.box_tree import GRID, LEAF_SIZE, TreeIndex, index_shapes, to_grid, tree_base
from dfn_hf.modeling.ops.neighbor_search import search_tree
from dfn_hf.plots.style import FAINT, INK, MUTED, SERIES

LENGTH, NUM_NEIGHBORS, WINDOW, NUM_LEAVES = 2432, 12, 32, 4
QUERY = (0.55, -0.35)
CLUSTERS = (
    (-1.1, 0.9, 0.35),
    (0.6, -0.5, 0.28),
    (1.2, 1.1, 0.2),
    (-0.9, -1.0, 0.45),
    (0.2, 0.3, 0.7),
)  # x, y, deviation
READ, FOUND = SERIES[1], SERIES[0]


@dataclass
class Search:
    """One search in a plane, in units of position.

    Attributes:
        points: `[n, 2]`, entities that the query sees.
        base: number of them in the tree.
        boxes: `[leaves, 2, 2]`, lowest and highest coordinates of each leaf's box.
        read: bool `[leaves]`, whether the query reads the leaf.
        neighbors: indices of the neighbours.
    """

    points: torch.Tensor
    base: int
    boxes: torch.Tensor
    read: torch.Tensor
    neighbors: torch.Tensor


def search_plane() -> Search:
    """Draw entities in clusters and search the neighbours of one query."""
    generator = torch.Generator().manual_seed(4)
    x, y, deviation = torch.tensor(CLUSTERS)[torch.randint(len(CLUSTERS), (LENGTH,), generator=generator)].unbind(1)
    drawn = torch.stack([x, y], dim=1) + deviation[:, None] * torch.randn(LENGTH, 2, generator=generator)
    key, query = to_grid(drawn.clamp(-2, 2))[None], to_grid(torch.tensor([[QUERY]]))
    index = TreeIndex(
        **{
            name: torch.zeros(1, *shape, dtype=torch.int16 if name == "leaf_boxes" else torch.int32)
            for name, shape in index_shapes("flat", LENGTH, 2).items()
        }
    )
    place = torch.tensor([[LENGTH - 1]])
    neighbors, _ = search_tree(query, place, key, NUM_NEIGHBORS, WINDOW, NUM_LEAVES, index=index)
    seen, num_leaves = LENGTH - WINDOW, int(index.counters[0, 1])
    members, boxes = index.leaf_ids[0, :num_leaves], index.leaf_boxes[0, :num_leaves, :2].long()
    held = (members > 0).any(dim=1)
    gaps = torch.maximum(boxes[:, 0] - query[0, 0], query[0, 0] - boxes[:, 1]).clamp(min=0).square().sum(dim=1)
    codes = (gaps << 32 | (2**31 - members.amax(dim=1))).masked_fill(~held, 2**63 - 1)
    read = torch.zeros(num_leaves, dtype=torch.bool)
    read[codes.argsort()[:NUM_LEAVES]] = True
    return Search(key[0, :seen] / GRID, tree_base(seen), boxes[held] / GRID, read[held], neighbors[0, 0])


def draw(axes: Axes, found: Search, *, scale: float) -> None:
    """Draw entities, boxes, query and neighbours; `scale` is the factor of the sizes of the marks."""
    for (low, high), read in zip(found.boxes.tolist(), found.read.tolist(), strict=True):
        width, height = high[0] - low[0], high[1] - low[1]
        colour = READ if read else MUTED
        face = (*mpl.colors.to_rgb(READ), 0.16) if read else "none"
        axes.add_patch(Rectangle(low, width, height, edgecolor=colour, facecolor=face, linewidth=1.4 if read else 0.6))
    old, recent = found.points[: found.base], found.points[found.base :]
    axes.scatter(*recent.T, s=2.5 * scale, color="#c9b06a", linewidths=0, label="recent entities, not in the tree")
    axes.scatter(*old.T, s=3 * scale, color=INK, linewidths=0, label="entities in the tree")
    axes.scatter(
        *found.points[found.neighbors].T,
        s=16 * scale,
        facecolors="none",
        edgecolors=FOUND,
        linewidths=1.2,
        label=f"the {NUM_NEIGHBORS} neighbours",
    )
    axes.scatter(*QUERY, s=40 * scale, marker="*", color=FOUND, linewidths=0, zorder=5, label="query")
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(FAINT)


def plot(path: str) -> None:
    """Draw the whole plane and, enlarged, the surroundings of the query."""
    found = search_plane()
    mpl.rcParams["svg.hashsalt"] = "box-tree"
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    whole, near = figure.subplots(1, 2)
    draw(whole, found, scale=1.0)
    draw(near, found, scale=4.0)
    (x, y), reach = QUERY, 0.34
    whole.add_patch(Rectangle((x - reach, y - reach), 2 * reach, 2 * reach, edgecolor=FOUND, facecolor="none"))
    near.set_xlim(x - reach, x + reach)
    near.set_ylim(y - reach, y + reach)
    whole.set_title(
        f"{found.base:,} entities in {len(found.boxes)} leaves of at most {LEAF_SIZE}", fontsize=10, color=INK
    )
    near.set_title(
        f"the red square, enlarged: a query and the {NUM_LEAVES} leaves that it reads", fontsize=10, color=INK
    )
    handles, labels = whole.get_legend_handles_labels()
    handles.append(Rectangle((0, 0), 1, 1, edgecolor=MUTED, facecolor="none"))
    handles.append(Rectangle((0, 0), 1, 1, edgecolor=READ, facecolor=(*mpl.colors.to_rgb(READ), 0.16)))
    labels += ["box of a leaf", "box of a leaf that is read"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)


if __name__ == "__main__":
    plot(sys.argv[1])
