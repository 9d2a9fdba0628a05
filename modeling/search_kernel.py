"""Causal cell lists in C: the walk along the chains that `flow_search.search_cells` describes, entity by entity.

What the torch form does with one sort per table is done here as in decoding: an entity that leaves the local window
becomes the head of its cells' chains, and a query walks w links from the heads of its cells. Both give the same lists,
bit for bit.
"""

import ctypes

import torch

from .native_library import in_threads, native_library, pointer, switched_on

MOST_NEIGHBORS = 2**14  # the code holds them on the stack
# Distances without fused multiply-adds: the same bits as torch's.
FLAGS = ("-ffp-contract=off", "-fno-math-errno")
SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* cells [n, L] of positions [n, P] that lie on the grid; see CellGrids.cells */
void cells(int64_t first, int64_t last, int64_t tables, int64_t axes, int64_t dims, const float *positions,
           double grid, const int32_t *rotation, const double *shift, const double *edges, const int32_t *counts,
           int32_t *out) {
    for (int64_t n = first; n < last; n++) {
        double scaled[dims];
        for (int64_t p = 0; p < dims; p++) scaled[p] = positions[n * dims + p] * grid;
        for (int64_t t = 0; t < tables; t++) {
            int32_t cell = 0;
            for (int64_t a = 0; a < axes; a++) {
                const int32_t *row = rotation + (t * axes + a) * dims;
                double along = shift[t * axes + a];
                for (int64_t p = 0; p < dims; p++) along += row[p] * scaled[p];
                double place = floor(along / edges[t]) + (counts[t] - 1) / 2;
                if (place < 0) place = 0;
                if (place > counts[t] - 1) place = counts[t] - 1;
                cell = cell * counts[t] + (int32_t)place;
            }
            out[n * tables + t] = cell;
        }
    }
}

/* Put a candidate among the best so far, in ascending order and each but once. */
static inline int64_t insert(uint64_t *best, int64_t found, int64_t wanted, uint64_t code) {
    if (found == wanted && code >= best[found - 1]) return found;
    int64_t place = found;
    while (place > 0 && best[place - 1] > code) place--;
    if (place > 0 && best[place - 1] == code) return found;
    if (found < wanted) found++;
    for (int64_t i = found - 1; i > place; i--) best[i] = best[i - 1];
    best[place] = code;
    return found;
}

/* Rows first .. last - 1; heads and links are NULL where there is no past and none is kept. Returns 0, or 1 if memory
   ran out. */
int search(int64_t first, int64_t last, int64_t length, int64_t tables, int64_t dims, int64_t wanted, int64_t window,
           int64_t candidates, const float *queries, const int32_t *query_cells, const int64_t *query_index,
           const float *keys, int64_t stored, const int32_t *key_cells, int64_t cells_stored, const int64_t *reach,
           const int64_t *counts, const int64_t *offsets, int64_t slots, int32_t *all_heads, int32_t *all_links,
           int64_t link_capacity, int64_t *indices, float *distances) {
    int32_t *own_heads = NULL, *own_links = NULL;
    if (!all_heads) {
        own_heads = malloc(slots * sizeof(int32_t));
        own_links = malloc(cells_stored * tables * sizeof(int32_t));
        if (!own_heads || !own_links) {
            free(own_heads);
            free(own_links);
            return 1;
        }
    }
    uint64_t best[wanted];
    int32_t current[tables];
    for (int64_t g = first; g < last; g++) {
        int32_t *heads = all_heads ? all_heads + g * slots : own_heads;
        int32_t *links = all_heads ? all_links + g * link_capacity * tables : own_links;
        if (!all_heads) memset(heads, -1, slots * sizeof(int32_t));
        const float *row_keys = keys + g * stored * dims;
        const int32_t *row_cells = key_cells + g * cells_stored * tables;
        for (int64_t m = 0; m < length; m++) {
            int64_t at = g * length + m, found = 0;
            if (!counts || m < counts[g]) {
                int64_t index = query_index[at], entering = index - window;
                if (entering >= 0)
                    for (int64_t t = 0; t < tables; t++) {
                        int32_t *head = heads + offsets[t] + row_cells[entering * tables + t];
                        links[entering * tables + t] = *head;
                        *head = (int32_t)entering;
                    }
                int64_t oldest = reach && index - reach[at] > 0 ? index - reach[at] : 0;
                const float *query = queries + at * dims;
                for (int64_t t = 0; t < tables; t++) current[t] = heads[offsets[t] + query_cells[at * tables + t]];
                for (int64_t step = 0; step < candidates; step++)
                    for (int64_t t = 0; t < tables; t++) {
                        int32_t id = current[t];
                        if (id < oldest) continue; /* -1, too, and all that lie behind it in the chain */
                        current[t] = links[(int64_t)id * tables + t];
                        float squared = 0;
                        for (int64_t p = 0; p < dims; p++) {
                            float apart = query[p] - row_keys[id * dims + p];
                            squared += apart * apart;
                        }
                        uint32_t bits; /* of a float >= 0: they sort as it does */
                        memcpy(&bits, &squared, sizeof bits);
                        found = insert(best, found, wanted, (uint64_t)bits << 32 | (uint64_t)(index - id));
                    }
                for (int64_t k = 0; k < found; k++) {
                    uint32_t bits = best[k] >> 32;
                    memcpy(distances + at * wanted + k, &bits, sizeof bits);
                    indices[at * wanted + k] = index - (int64_t)(best[k] & 0xFFFFFFFF);
                }
            }
            for (int64_t k = found; k < wanted; k++) {
                distances[at * wanted + k] = INFINITY;
                indices[at * wanted + k] = -1;
            }
        }
    }
    free(own_heads);
    free(own_links);
    return 0;
}
"""


def search_library(positions: torch.Tensor) -> ctypes.CDLL | None:
    """The library if it can be used for these positions: float32 on the CPU."""
    if positions.device.type != "cpu" or positions.dtype != torch.float32 or not switched_on():
        return None
    return native_library(SOURCE, *FLAGS)


def cells_natively(
    library: ctypes.CDLL,
    positions: torch.Tensor,
    grid: float,
    rotation: torch.Tensor,
    shift: torch.Tensor,
    edges: torch.Tensor,
    cells_per_axis: list[int],
) -> torch.Tensor:
    """`flow_search.CellGrids.cells` of positions on the grid: `[..., P]` → int32 `[..., L]`.

    Args:
        grid: grid points per unit; rotation: int32 `[L, A, P]`; shift: int64 `[L, A]` and edges: int64 `[L]`, both in
            the units that the rotation gives.
    """
    num_tables, axes, dims = rotation.shape
    positions = positions.contiguous()
    out = rotation.new_empty(*positions.shape[:-1], num_tables, dtype=torch.int32)
    tensors = [rotation.int(), shift.double(), edges.double(), rotation.new_tensor(cells_per_axis, dtype=torch.int32)]
    tensors = [tensor.contiguous() for tensor in tensors]

    def work(first: int, last: int) -> None:
        sizes = (ctypes.c_int64(size) for size in (first, last, num_tables, axes, dims))
        library.cells(*sizes, pointer(positions), ctypes.c_double(grid), *map(pointer, (*tensors, out)))

    in_threads(work, positions.numel() // dims if dims else 0, 1)
    return out


def search_natively(
    library: ctypes.CDLL,
    query_positions: torch.Tensor,
    query_cells: torch.Tensor,
    query_index: torch.Tensor,
    key_positions: torch.Tensor,
    key_cells: torch.Tensor,
    num_neighbors: int,
    window: int,
    candidates_per_table: int,
    table_offsets: list[int],
    reach: torch.Tensor | None,
    counts: torch.Tensor | None,
    heads: torch.Tensor | None,
    links: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flow_search.search_cells` for queries and neighbours that are there at all; updates `heads` and `links`.

    Raises:
        MemoryError: there is none left for the chains.
    """
    rows, length, num_tables = query_cells.shape
    assert heads is None or (heads.is_contiguous() and links.is_contiguous())
    inputs = (query_positions, query_cells, query_index, key_positions, key_cells, reach, counts)
    inputs = [None if tensor is None else tensor.contiguous() for tensor in inputs]
    query_positions, query_cells, query_index, key_positions, key_cells, reach, counts = inputs
    stored = key_positions.shape[1]
    offsets = query_index.new_tensor(table_offsets[:-1])
    indices = query_index.new_empty(rows, length, num_neighbors)
    distances = query_positions.new_empty(rows, length, num_neighbors)

    def work(first: int, last: int) -> None:
        sizes = (
            first,
            last,
            length,
            num_tables,
            query_positions.shape[-1],
            num_neighbors,
            window,
            candidates_per_table,
        )
        failed = library.search(
            *map(ctypes.c_int64, sizes),
            *map(pointer, (query_positions, query_cells, query_index, key_positions)),
            ctypes.c_int64(stored),
            pointer(key_cells),
            ctypes.c_int64(key_cells.shape[1]),
            *map(pointer, (reach, counts, offsets)),
            ctypes.c_int64(table_offsets[-1]),
            *map(pointer, (heads, links)),
            ctypes.c_int64(0 if links is None else links.shape[1]),
            *map(pointer, (indices, distances)),
        )
        if failed:
            raise MemoryError(f"no memory for the cell lists of {stored} entities")

    in_threads(work, rows, length)
    return indices, distances
