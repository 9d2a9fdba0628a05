"""Arithmetic of the cell grids: axes, edge lengths and cells per axis. It uses no tensors."""

import math
from collections.abc import Sequence

GRID = 64  # grid points per unit: positions are rounded to multiples of 2^-6 before a search
MAX_CELL_SIZE = 2**20  # edge length in units of position; the ball of positions is far smaller
MAX_CELLS_PER_AXIS = 1023  # a cell of three axes then fits in 30 bits


def grid_axes(position_dim: int) -> int:
    """Return A, the number of axes of a grid: at most 3, because with more axes few entities would share a cell."""
    return min(position_dim, 3)


def geometric_cell_sizes(num_tables: int, coarsest: float = 8.0, finest: float = 0.35) -> list[float]:
    """Return the edge length of each table's cells, a geometric series from `coarsest` down to `finest`.

    The defaults are those of the model. A cell with edge 8 covers the ball of positions, so the search proposes
    distant entities from the first training step. In long rows such a cell holds too many entities to propose any but
    the most recent ones, and cells with edge 0.35 separate entities that match: fine-tune with edges from 2 to 1 for
    long rows.

    Args:
        num_tables: number of tables, L.
        coarsest, finest: edge lengths of the first and the last table, in units of position.

    Raises:
        ValueError: `num_tables` is less than 1, or the edge lengths are not positive and descending.

    Example:
        >>> from dfn_hf.modeling.ops.cell_grid import geometric_cell_sizes
        >>> geometric_cell_sizes(3, coarsest=8.0, finest=2.0)
        [8.0, 4.0, 2.0]
    """
    if num_tables < 1:
        raise ValueError(f"num_tables must be ≥ 1, got {num_tables}.")
    if not 0 < finest <= coarsest < math.inf:
        raise ValueError(f"finest must be positive and at most coarsest, got {finest} and {coarsest}.")
    return [coarsest * (finest / coarsest) ** (table / max(num_tables - 1, 1)) for table in range(num_tables)]


def ball_cells_per_axis(position_dim: int, cell_sizes: Sequence[float]) -> list[int]:
    """Return the cells per axis of each table, enough to cover the ball of radius `2 * sqrt(position_dim)`."""
    radius = 1.01 * 2 * math.sqrt(position_dim)  # 1.01: rotations are rounded to integers
    return [2 * math.ceil(radius / size) + 1 for size in cell_sizes]


def check_cell_sizes(cell_sizes: Sequence[float] | None, num_tables: int, candidates_per_table: int) -> list[float]:
    """Return the edge length of each table's cells; `geometric_cell_sizes(num_tables)` if `cell_sizes` is None.

    Raises:
        ValueError: an argument is out of range, or `cell_sizes` has not one entry per table.
    """
    if num_tables < 1 or candidates_per_table < 1:
        raise ValueError(
            f"num_tables and candidates_per_table must be ≥ 1, got {num_tables} and {candidates_per_table}."
        )
    if cell_sizes is None:
        return geometric_cell_sizes(num_tables)
    if len(cell_sizes) != num_tables:
        raise ValueError(f"cell_sizes must hold one size per table (num_tables={num_tables}), got {len(cell_sizes)}.")
    if not all(1 / GRID <= size <= MAX_CELL_SIZE for size in cell_sizes):
        raise ValueError(
            f"cell_sizes must lie between 1/{GRID} (the grid step of positions) and {MAX_CELL_SIZE}, got "
            f"{list(cell_sizes)}."
        )
    return list(cell_sizes)
