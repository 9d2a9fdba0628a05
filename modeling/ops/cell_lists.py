"""Causal cell lists: random grids, the sorted lists of one call, and the chains that a cache keeps between calls.

A form of locality-sensitive hashing: a table is a hash table, a cell is a bucket.

Shape letters: B batch, H heads, G = B * H rows, M queries of this call, N stored entities, P position_dim, L tables,
A axes of a grid, w candidates per table. L' is the number of tables processed together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cell_grid import GRID, grid_axes
from .chunking import apply_chunked
from .dispatch import cells_backend
from .kernels.neighbor_search_cpu import cells_cpu, search_library

ROTATION_SCALE = 1024  # rotations and shifts are stored as integers, in units of 1/1024
EMPTY_KEY_CELL, EMPTY_QUERY_CELL = 2**30, 2**30 + 1  # placeholders for padding; different, so they never match
SORT_CHUNK = 2**18  # entities × tables in one sort


def grid_constants(position_dim: int, num_tables: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random grids.

    Args:
        position_dim: P.
        num_tables: L.
        seed: determines the grids; the global random state is not used.

    Returns:
        (rotation int32 `[L, A, P]`, shift int32 `[L, A]` as a fraction of a cell), both in units of 1/1024.
    """
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    axes = grid_axes(position_dim)
    rotation = torch.linalg.qr(torch.randn(num_tables, position_dim, position_dim, **options)).Q[:, :axes]
    shift = torch.rand(num_tables, axes, **options)
    return (rotation * ROTATION_SCALE).round().int(), (shift * ROTATION_SCALE).floor().int()


@dataclass(frozen=True)
class CellGrids:
    """The grids of all tables, which map positions to cells.

    Attributes:
        rotation (int `[L, A, P]`), shift (int `[L, A]`): see `grid_constants`.
        cell_sizes: edge length of each table's cells, in units of position.
        cells_per_axis: for each table, an odd number. Positions beyond the outermost cell belong to it.
        constants: the result of `make_constants`, if it was computed ahead.
    """

    rotation: torch.Tensor
    shift: torch.Tensor
    cell_sizes: Sequence[float]
    cells_per_axis: list[int]
    constants: tuple[torch.Tensor, ...] | None = None

    @property
    def edges(self) -> list[int]:
        """Edge length of each table's cells, in the units of rotated positions: 1 / (GRID · ROTATION_SCALE)."""
        return [round(size * GRID * ROTATION_SCALE) for size in self.cell_sizes]

    @property
    def table_offsets(self) -> list[int]:
        """First slot of each table, then the number of slots: L + 1 numbers. A slot is a cell of one of the tables."""
        offsets = [0]
        for count in self.cells_per_axis:
            offsets.append(offsets[-1] + count ** self.rotation.shape[1])
        return offsets

    def cells(self, positions: torch.Tensor, *, on_grid: bool = False) -> torch.Tensor:
        """Return the cell of each position in each table, int32 `[..., L]`.

        Sums are integers in float64, so they are exact in any order for positions on the grid.

        Args:
            positions: `[..., P]`.
            on_grid: whether all positions are multiples of 1 / GRID. C and Triton then return the same cells as torch.
        """
        backend = cells_backend(positions, on_grid)
        if backend == "c":
            constants = (GRID, ROTATION_SCALE, self.rotation, self.shift, self.edges, self.cells_per_axis)
            return cells_cpu(search_library(positions), positions, *constants)
        edges, shift, *others = self.constants or self.make_constants()
        if backend == "triton":
            from .kernels.triton_launch import cells_triton

            return cells_triton(positions, GRID, self.rotation, shift, edges, self.cells_per_axis)
        flat = positions.reshape(1, -1, positions.shape[-1])
        return apply_chunked(self._cells, flat).view(*positions.shape[:-1], len(edges))

    def _cells(self, positions: torch.Tensor) -> torch.Tensor:
        """Cells of positions `[1, N, P]` in torch operations, int32 `[1, N, L]`."""
        edges, shift, counts, _ = self.constants or self.make_constants()
        scaled = positions.double() * GRID
        cell: Any = 0  # a tensor after the first axis
        for axis in range(self.rotation.shape[1]):
            along = scaled @ self.rotation[:, axis].double().T
            # A quotient of these integers is never rounded up to the next integer, so the floor is exact.
            place = ((along + shift[:, axis]) / edges).floor_() + (counts - 1) / 2
            cell = cell * counts + place.clamp_(min=0).minimum(counts - 1)
        return cell.int()

    def make_constants(self) -> tuple[torch.Tensor, ...]:
        """Compute tensors that depend only on the grids. A captured CUDA graph cannot create them itself.

        Returns:
            (edges `[L]` and shift `[L, A]` in the units of rotated positions, cells per axis `[L]`, all float64 with
            integer values; first slot of each table, int64 `[L]`).
        """
        device = self.rotation.device
        edges = torch.tensor(self.edges, dtype=torch.float64, device=device)
        shift = (self.shift * edges[:, None]).div(ROTATION_SCALE, rounding_mode="floor")
        counts = torch.tensor(self.cells_per_axis, dtype=torch.float64, device=device)
        return edges, shift, counts, torch.tensor(self.table_offsets[:-1], device=device)

    def with_constants(self) -> "CellGrids":
        """Return the same grids with `constants` computed."""
        return replace(self, constants=self.make_constants())


@dataclass
class CellChains:
    """The decode index: linked lists, one per cell, of the entities that have left the local window.

    Attributes:
        newest: int32 `[G, slots]`, the most recent entity of each cell of each table, −1 if none. `search_cells` and
            `search_step` update it in place.
        links: int32 `[G, capacity, L]`, the previous entity in the same cell, −1 if none. Updated likewise.
        table_offsets: `CellGrids.table_offsets`.
    """

    newest: torch.Tensor
    links: torch.Tensor
    table_offsets: list[int]

    def slots(self, cells: torch.Tensor) -> torch.Tensor:
        """Return the slots of cells `[..., L]`, int64."""
        return cells.long() + torch.tensor(self.table_offsets[: cells.shape[-1]], device=cells.device)

    def newest_in(self, cells: torch.Tensor, tables: slice) -> torch.Tensor:
        """Return the most recent entity in each cell, int32 `[G, L', M]`, −1 if none; cells int64 `[G, L', M]`."""
        offsets = torch.tensor(self.table_offsets[tables], device=cells.device)[:, None]
        slots = (cells + offsets).clamp(max=self.newest.shape[1] - 1)
        return self.newest.gather(1, slots.flatten(1)).view(cells.shape)

    def extend(self, run: torch.Tensor, first: torch.Tensor, tables: slice) -> None:
        """Append new entities to the chains.

        Args:
            run: sorted codes of the new entities, int64 `[G, L', M]`, from `sort_by_cell_and_time`.
            first: id of the entity with time 0, int64 `[G, 1]`; negative before the row starts.
            tables: the L' of L tables that `run` holds.
        """
        cells = run >> 32
        ids = ((run & 0xFFFFFFFF) >> 1) + first[..., None]
        present = cells < EMPTY_KEY_CELL
        continues = torch.zeros_like(present)
        continues[..., 1:] = cells[..., 1:] == cells[..., :-1]
        before = torch.where(continues, ids.roll(1, dims=-1), self.newest_in(cells, tables).long())
        row, table, position = present.nonzero(as_tuple=True)
        entry = row, table, position
        self.links[row, ids[entry], table + (tables.start or 0)] = before[entry].int()
        last = present.clone()
        last[..., :-1] &= ~continues[..., 1:]
        row, table, position = last.nonzero(as_tuple=True)
        entry = row, table, position
        offsets = torch.tensor(self.table_offsets[tables], device=run.device)
        self.newest[row, cells[entry] + offsets[table]] = ids[entry].int()

    def walk(self, ids: torch.Tensor, newest: torch.Tensor) -> None:
        """Fill candidate lists that the start of the call has cut short from the chains.

        Args:
            ids: int64 `[G, L, M', w]`, oldest first, −1 at the front; filled in place.
            newest: int32 `[G, L, M']`, first entity of each chain.
        """
        rows, num_tables, _, num_candidates = ids.shape
        links = self.links.view(rows, -1)
        table = torch.arange(num_tables, device=ids.device)[:, None]
        steps, current = [], newest.long()
        for _ in range(num_candidates):
            steps.append(current)
            flat = (current.clamp(min=0) * num_tables + table).view(rows, -1)
            current = torch.where(current < 0, -1, links.gather(1, flat).view(current.shape).long())
        chain = torch.stack(steps, dim=-1)
        missing = (ids < 0).sum(dim=-1, keepdim=True)
        step = missing - 1 - torch.arange(num_candidates, device=ids.device)
        ids.copy_(torch.where(step >= 0, chain.gather(-1, step.clamp(min=0)), ids))

    def undo(self, cells: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> None:
        """Remove the most recent entities from the chains.

        Args:
            cells: int32 `[G, N, L]`, cells of all entities.
            first, last: int64 `[G]`; entities first ≤ id < last are removed.
        """
        span = int((last - first).max()) if first.numel() else 0
        if span <= 0:
            return
        ids = first[:, None] + torch.arange(span, device=first.device)
        inside = ids < last[:, None]
        ids = ids.clamp(max=cells.shape[1] - 1)[..., None].expand(-1, -1, cells.shape[-1])
        links = self.links.gather(1, ids)
        # Of the entities removed from a cell only the oldest links to a remaining one, which is the newest again.
        oldest = inside[..., None] & (links < first[:, None, None])
        row, step, table = oldest.nonzero(as_tuple=True)
        self.newest[row, self.slots(cells.gather(1, ids))[row, step, table]] = links[row, step, table]


@dataclass
class CellLists:
    """The entities of a call sorted by (cell, time) in each table, and the candidates of each query.

    The w entries before a query's place in the list are its candidates. Each list starts with w empty entries, for
    queries near its start.

    Attributes:
        times: int32 `[G, L, w + M]`, index of each entity in the call.
        starts: int64 `[G, M, L]`, index in flattened `times` of each query's first candidate.
        filled: int64 `[G, M, L]`, number of candidates, the last ones, that lie in the query's cell.
        num_candidates: w.
        positions: of the entities, one tensor `[G L (w + M)]` per axis; None before `lay_out`.
    """

    times: torch.Tensor
    starts: torch.Tensor
    filled: torch.Tensor
    num_candidates: int
    positions: list[torch.Tensor] | None = None

    @classmethod
    def empty(cls, rows: int, num_tables: int, num_queries: int, num_candidates: int, device: torch.device):
        """Allocate lists for `set` to fill."""
        times = torch.zeros(rows, num_tables, num_candidates + num_queries, dtype=torch.int32, device=device)
        starts = torch.empty(rows, num_queries, num_tables, dtype=torch.int64, device=device)
        return cls(times, starts, torch.empty_like(starts), num_candidates)

    def set(self, tables: slice, run: torch.Tensor, ends: torch.Tensor, query_cells: torch.Tensor) -> None:
        """Fill the lists of some tables.

        Args:
            tables: the L' of L tables.
            run, ends: the results of `sort_by_cell_and_time`, int64 `[G, L', M]`.
            query_cells: int64 `[G, L', M]`.
        """
        rows, num_tables, length = self.times.shape
        self.times[:, tables, self.num_candidates :] = (run & 0xFFFFFFFF) >> 1
        lists = torch.arange(rows * num_tables, device=run.device).view(rows, num_tables, 1)[:, tables]
        self.starts[..., tables] = (ends + lists * length).transpose(1, 2)
        cells = run >> 32
        is_first = torch.ones_like(cells, dtype=torch.bool)
        is_first[..., 1:] = cells[..., 1:] != cells[..., :-1]
        first = (is_first * torch.arange(cells.shape[-1], device=run.device)).cummax(dim=-1).values
        last = (ends - 1).clamp(min=0)
        in_cell = (cells.gather(-1, last) == query_cells) & (ends > 0)
        count = (ends - first.gather(-1, last)).clamp(max=self.num_candidates)
        self.filled[..., tables] = count.masked_fill_(~in_cell, 0).transpose(1, 2)

    def lay_out(self, positions: torch.Tensor) -> None:
        """Store the positions of the entities in list order; `positions` `[G, M, P]` are by time."""
        first = torch.arange(positions.shape[0], device=positions.device)[:, None, None] * positions.shape[1]
        order = (self.times + first).view(-1)
        self.positions = [axis.reshape(-1).index_select(0, order) for axis in positions.unbind(dim=-1)]

    def read(self, queries: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (times of the candidates, oldest first, int32; whether each exists, bool), `[G, M', L w]`."""
        entry = torch.arange(self.num_candidates, device=self.times.device)
        exists = entry >= self.num_candidates - self.filled[:, queries, :, None]
        return self._windows(self.times, queries), exists.flatten(2)

    def read_positions(self, queries: slice) -> Iterator[torch.Tensor]:
        """Yield the positions of the candidates, one tensor `[G, M', L w]` per axis."""
        return (self._windows(axis, queries) for axis in self.positions)

    def _windows(self, lists: torch.Tensor, queries: slice) -> torch.Tensor:
        """Gather the candidates' entries of `lists` `[G, L, w + M]`, `[G, M', L w]`."""
        windows = lists.view(-1).unfold(0, self.num_candidates, 1)
        starts = self.starts[:, queries]
        return windows.index_select(0, starts.reshape(-1)).view(*starts.shape[:2], -1)


def start_chains(chains: CellChains, key_cells: torch.Tensor, window: int, counts: torch.Tensor | None) -> None:
    """Build the chains of rows without a past: the entities that have left the local window of the last query.

    Args:
        chains: empty chains, filled in place.
        key_cells: int32 `[G, M, L]`.
        window: W.
        counts: int64 `[G]`, number of real entities of each row; None if all are real.
    """
    times = torch.arange(key_cells.shape[1], device=key_cells.device)
    ends = times.new_tensor([len(times)]) if counts is None else counts[:, None]
    entered = (times < ends - window).unsqueeze(-1)
    for table in range(key_cells.shape[-1]):
        tables = slice(table, table + 1)
        cells = torch.where(entered, key_cells[..., tables].long(), EMPTY_KEY_CELL).transpose(1, 2)
        chains.extend((cells << 32 | times << 1).sort(dim=-1).values, ends.new_zeros(len(cells), 1), tables)


def sort_by_cell_and_time(key_cells: torch.Tensor, query_cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort keys and queries together by (cell, time, key before query); time is the index in the last dimension.

    Args:
        key_cells, query_cells: int64 `[G, L, M]`.

    Returns:
        (sorted codes `cell << 32 | time << 1` of the keys, int64 `[G, L, M]`;
        for each query the number of keys of its row and table that sort before it, int64 `[G, L, M]`).
    """
    times = torch.arange(key_cells.shape[-1], device=key_cells.device) << 1
    codes = torch.cat([key_cells << 32 | times, query_cells << 32 | times | 1], dim=-1)
    if codes.device.type == "cpu":
        codes.numpy().sort(axis=-1)  # several times faster than torch's sort of int64
    else:
        codes = codes.sort(dim=-1).values
    is_key = (codes & 1) == 0
    keys = codes.masked_select(is_key).view(key_cells.shape)
    # Scattered back to time order, keys at even and queries at odd indices.
    keys_before = torch.empty_like(codes).scatter_(-1, codes & 0xFFFFFFFF, is_key.cumsum(dim=-1))
    return keys, keys_before[..., 1::2]


def fold_segments(query_cells, entering_cells, segments, entering):
    """Replace cells by numbers below 2^30 that are equal only if both segment and cell are equal.

    Args:
        query_cells, entering_cells: int64 `[G, L, M]`.
        segments: int64 `[G, M]`, segment of each entity.
        entering: int64 `[G, M]`, index of the entity that leaves the window with each query.

    Returns:
        (numbers of the queries, numbers of the entering entities), int64 `[G, L, M]`.
    """
    query_segments = torch.unique(segments.clamp(min=0), return_inverse=True)[1][:, None]
    key_segments = query_segments.gather(2, entering.clamp(min=0)[:, None])
    pairs = torch.stack([query_cells + (query_segments << 31), entering_cells + (key_segments << 31)])
    numbers = torch.unique(pairs, return_inverse=True)[1]
    return numbers[0], numbers[1]
