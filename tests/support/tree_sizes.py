"""Smaller blocks of the box tree, so that short rows reach it."""

from dfn_hf.modeling.ops import box_tree, box_tree_torch, neighbor_search_reference
from dfn_hf.modeling.ops.kernels import box_tree_cpu


def set_sizes(monkeypatch, **sizes):
    """Change constants of the box tree wherever they were imported; C code keeps its own."""
    for module in (box_tree, box_tree_torch, neighbor_search_reference):
        for name, size in sizes.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, size)


def set_sizes_and_c(monkeypatch, **sizes):
    """Change BLOCK, RECENT or SPARE_LEAVES in Python and in C."""
    set_sizes(monkeypatch, **sizes)
    defines = [f"-D{name}={getattr(box_tree, name)}" for name in ("BLOCK", "RECENT", "SPARE_LEAVES")]
    monkeypatch.setattr(box_tree_cpu, "TREE_FLAGS", (*box_tree_cpu.TREE_FLAGS, *defines))
