"""The causal box tree in C: `neighbor_search.search_tree` on a CPU.

The C code enters blocks of entities into the leaves and keeps a balanced hierarchy of boxes over them, in the "paged"
layout of `box_tree.TreeIndex`. The neighbours equal those of the torch form bit for bit.
"""

import ctypes

import torch

from ..box_tree import LEAF_SIZE, TreeIndex
from .c_compiler import compiled_library, in_threads, kernels_enabled, pointer
from .c_source import c_source

TREE_FLAGS = ("-fno-math-errno",)
TREE_SOURCE = c_source("box_tree_cpu.c")
TREE_SIZES = ("length", "dims", "wanted", "window", "leaves_read", "stored", "leaf_capacity", "page_capacity")
INDEX_TENSORS = ("counters", "leaves", "leaf_pages", "cuts", "pages")
TREE_TENSORS = ("queries", "keys", "query_index", "reach", "counts", *INDEX_TENSORS, "indices", "distances")


class _TreeSearch(ctypes.Structure):
    """`Search` of the C code: sizes and tensors."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in TREE_SIZES),
        *((name, ctypes.c_void_p) for name in TREE_TENSORS),
    ]


def tree_library(positions: torch.Tensor) -> ctypes.CDLL | None:
    """Return the compiled library if positions are on a CPU and kernels are enabled, else None."""
    if positions.device.type != "cpu" or not kernels_enabled():
        return None
    functions = ("search_tree", "crop_tree")
    return compiled_library(TREE_SOURCE, *TREE_FLAGS, functions=functions, carried="libbox_tree")


def search_tree_cpu(
    library: ctypes.CDLL,
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
    """`neighbor_search.search_tree` with at least one query and one neighbour; updates a "paged" `index` in place.

    Raises:
        MemoryError: the working memory cannot be allocated.
    """
    rows, length, dims = query.shape
    query, query_index, key, reach, counts = (
        None if tensor is None else tensor.contiguous() for tensor in (query, query_index, key, reach, counts)
    )
    indices = query_index.new_empty(rows, length, num_neighbors)
    distances = query.new_empty(rows, length, num_neighbors, dtype=torch.int32)
    sizes = (length, dims, num_neighbors, window, num_leaves, key.shape[1])
    call = _tree_search(index, dict(zip(TREE_SIZES, sizes, strict=False)))
    tensors = {"queries": query, "keys": key, "query_index": query_index, "reach": reach, "counts": counts}
    for name, tensor in (tensors | {"indices": indices, "distances": distances}).items():
        setattr(call, name, pointer(tensor))

    def work(first: int, last: int) -> None:
        if library.search_tree(ctypes.c_int64(first), ctypes.c_int64(last), ctypes.byref(call)):
            raise MemoryError(f"The neighbour search could not allocate memory for {key.shape[1]} entities.")

    in_threads(work, rows, length)
    return indices, distances


def crop_tree_cpu(library: ctypes.CDLL, index: TreeIndex, base: torch.Tensor) -> None:
    """`neighbor_search.crop_tree` of a "paged" index.

    Raises:
        MemoryError: the working memory cannot be allocated.
    """
    base = base.contiguous()
    axis_pairs = index.leaves.shape[2] // LEAF_SIZE - 1
    call = _tree_search(index, {"dims": 2 * axis_pairs})  # the last axis of an odd number is 0

    def work(first: int, last: int) -> None:
        if library.crop_tree(ctypes.c_int64(first), ctypes.c_int64(last), ctypes.byref(call), pointer(base)):
            raise MemoryError("The neighbour search could not allocate memory to crop its trees.")

    in_threads(work, len(base), index.leaves.shape[1])


def _tree_search(index: TreeIndex | None, sizes: dict[str, int]) -> _TreeSearch:
    """Return the arguments of the C code with these sizes and the tensors of an index."""
    call = _TreeSearch(**sizes)
    if index is not None:
        call.leaf_capacity, call.page_capacity = index.leaves.shape[1], index.pages.shape[1]
        for name in INDEX_TENSORS:
            tensor = getattr(index, name)
            assert tensor.is_contiguous()
            setattr(call, name, pointer(tensor))
    return call
