"""Arithmetic of the cell grids: axes, edges and cells per axis. Needs no tensors."""

import math

GRID = 64  # grid points per unit: searched positions are multiples of 2^-6
MAX_CELLS_PER_AXIS = 1023  # 30 bits for three axes


def grid_axes(position_dim: int) -> int:
    """A: more axes would make cells so many that few entities share one."""
    return min(position_dim, 3)


def geometric_cell_sizes(num_tables: int, coarsest: float = 8.0, finest: float = 0.35) -> list[float]:
    """Edges of the cells of each table, geometric from `coarsest` down to `finest`; the defaults are the model's.

    Cells of 8 span the ball: far matches are proposed from the first step of training on. At great length such cells
    hold nothing but the latest entities, and those of 0.35 part what belongs together; tune a trained model further
    with cells from 2 to 1 for it.

    Raises:
        ValueError: no table, or edges that are not positive or grow.
    """
    if num_tables < 1:
        raise ValueError(f"num_tables must be ≥ 1, got {num_tables}.")
    if not 0 < finest <= coarsest < math.inf:
        raise ValueError(f"finest must be positive and at most coarsest, got {finest} and {coarsest}.")
    return [coarsest * (finest / coarsest) ** (table / max(num_tables - 1, 1)) for table in range(num_tables)]


def ball_cells_per_axis(position_dim: int, cell_sizes: list[float]) -> list[int]:
    """Cells per axis of each table that cover the ball (radius `2 * sqrt(position_dim)`), whatever the shift."""
    radius = 1.01 * 2 * math.sqrt(position_dim)  # 1.01: rotations are rounded to integers
    return [2 * math.ceil(radius / size) + 1 for size in cell_sizes]


def check_cell_sizes(cell_sizes: list[float] | None, num_tables: int, candidates_per_table: int) -> list[float]:
    """The cell sizes to use; a ValueError names what does not fit."""
    if num_tables < 1 or candidates_per_table < 1:
        raise ValueError(
            f"num_tables and candidates_per_table must be ≥ 1, got {num_tables} and {candidates_per_table}."
        )
    if cell_sizes is None:
        return geometric_cell_sizes(num_tables)
    if len(cell_sizes) != num_tables:
        raise ValueError(f"cell_sizes must hold one size per table (num_tables={num_tables}), got {len(cell_sizes)}.")
    if not all(1 / GRID <= size < math.inf for size in cell_sizes):
        raise ValueError(f"cell_sizes must be finite and ≥ 1/{GRID}, the step of the grid, got {list(cell_sizes)}.")
    return list(cell_sizes)
