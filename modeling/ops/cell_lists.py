"""Causal cell lists: the grids, the sorted lists of one call and the chains kept between calls.

Shape letters: B batch, H heads, G = B * H rows, M queries of this call, N stored entities, P position_dim, L tables,
A axes of a grid, w candidates per table.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .cell_grid import GRID, grid_axes
from .chunking import apply_chunked
from .custom_ops import use_custom_ops
from .dispatch import can_use_triton_search
from .kernels.neighbor_search_cpu import cells_cpu, search_library

ROTATION_SCALE = 1024  # rotations and shifts are stored as integers, in 1/1024
EMPTY_KEY_CELL, EMPTY_QUERY_CELL = 2**30, 2**30 + 1  # no cell: an absent key and an absent query never meet
SORT_CHUNK = 2**18  # entities times tables in one sort


def grid_constants(position_dim: int, num_tables: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random grids: rotation int32 `[L, A, P]` and shift int32 `[L, A]` (fractions of a cell), both in 1/1024."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    axes = grid_axes(position_dim)
    rotation = torch.linalg.qr(torch.randn(num_tables, position_dim, position_dim, **options)).Q[:, :axes]
    shift = torch.rand(num_tables, axes, **options)
    return (rotation * ROTATION_SCALE).round().int(), (shift * ROTATION_SCALE).floor().int()


@dataclass(frozen=True)
class CellGrids:
    """The grids of all tables.

    Attributes:
        rotation (int `[L, A, P]`), shift (int `[L, A]`): see `grid_constants`.
        cell_sizes: edge length of each table's cells, in units of position.
        cells_per_axis: odd; positions beyond the outermost cell count as in it.
        constants: `make_constants`, if they were made ahead.
    """

    rotation: torch.Tensor
    shift: torch.Tensor
    cell_sizes: list[float]
    cells_per_axis: list[int]
    constants: tuple[torch.Tensor, ...] | None = None

    @property
    def edges(self) -> list[int]:
        """Edge length of each table's cells, in the units that the rotation gives."""
        return [round(size * GRID * ROTATION_SCALE) for size in self.cell_sizes]

    @property
    def table_offsets(self) -> list[int]:
        """First slot of each table, and their total last, when all cells are numbered through."""
        offsets = [0]
        for count in self.cells_per_axis:
            offsets.append(offsets[-1] + count ** self.rotation.shape[1])
        return offsets

    def cells(self, positions: torch.Tensor, *, on_grid: bool = False) -> torch.Tensor:
        """Cell of each position in each table: `[..., P]` → int32 `[..., L]`.

        Integer arithmetic in float64: exact for positions on the grid, in any order of summation.

        Args:
            on_grid: all positions are, so that native code gives the same cells.
        """
        library = search_library(positions) if on_grid and not use_custom_ops() else None
        if library is not None:
            constants = (GRID, ROTATION_SCALE, self.rotation, self.shift, self.edges, self.cells_per_axis)
            return cells_cpu(library, positions, *constants)
        edges, shift, *others = self.constants or self.make_constants()
        if on_grid and not use_custom_ops() and can_use_triton_search(positions):
            from .kernels.triton_launch import cells_triton

            return cells_triton(positions, GRID, self.rotation, shift, edges, self.cells_per_axis)
        flat = positions.reshape(1, -1, positions.shape[-1])
        return apply_chunked(self._cells, flat).view(*positions.shape[:-1], len(edges))

    def _cells(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions `[1, N, P]` → int32 `[1, N, L]`."""
        edges, shift, counts, _ = self.constants or self.make_constants()
        scaled, cell = positions.double() * GRID, 0
        for axis in range(self.rotation.shape[1]):
            along = scaled @ self.rotation[:, axis].double().T
            # The quotient of two such integers is rounded to one from below only when it is one.
            place = ((along + shift[:, axis]) / edges).floor_() + (counts - 1) / 2
            cell = cell * counts + place.clamp_(min=0).minimum(counts - 1)
        return cell.int()

    def make_constants(self) -> tuple[torch.Tensor, ...]:
        """(edges `[L]` and shift `[L, A]` in the units of the rotation, cells per axis `[L]`, first slots `[L]`).

        The first slots are int64, the others whole numbers in float64. A captured graph cannot make them itself.
        """
        device = self.rotation.device
        edges = torch.tensor(self.edges, dtype=torch.float64, device=device)
        shift = (self.shift * edges[:, None]).div(ROTATION_SCALE, rounding_mode="floor")
        counts = torch.tensor(self.cells_per_axis, dtype=torch.float64, device=device)
        return edges, shift, counts, torch.tensor(self.table_offsets[:-1], device=device)

    def with_constants(self) -> "CellGrids":
        """The same grids, which will find their constants made."""
        return replace(self, constants=self.make_constants())


@dataclass
class CellChains:
    """The decode index: entities that have left the local window, chained by cell.

    Attributes:
        heads: int32 `[G, slots]`, the newest entity of each cell of each table, −1 if none. Updated by `search_cells`.
        links: int32 `[G, capacity, L]`, the entity before this one in the same cell, −1 if none. Likewise.
        table_offsets: first slot of each table.
    """

    heads: torch.Tensor
    links: torch.Tensor
    table_offsets: list[int]

    def slots(self, cells: torch.Tensor) -> torch.Tensor:
        """Slots of cells `[..., L]` as int64."""
        return cells.long() + torch.tensor(self.table_offsets[: cells.shape[-1]], device=cells.device)

    def newest(self, cells: torch.Tensor, tables: slice) -> torch.Tensor:
        """The newest entity in each of the cells, int64 `[G, L', M]` → int32, −1 if none; L' of the L tables."""
        offsets = torch.tensor(self.table_offsets[tables], device=cells.device)[:, None]
        slots = (cells + offsets).clamp(max=self.heads.shape[1] - 1)
        return self.heads.gather(1, slots.flatten(1)).view(cells.shape)

    def extend(self, run: torch.Tensor, first: torch.Tensor, tables: slice) -> None:
        """Chain new entities.

        Args:
            run: codes of the new entities in sorted order, int64 `[G, L', M]` (`sort_by_cell_and_time`).
            first: id of the entity of time 0, int64 `[G, 1]`; negative before the row starts.
            tables: which L' of the L tables these are.
        """
        cells = run >> 32
        ids = ((run & 0xFFFFFFFF) >> 1) + first[..., None]
        present = cells < EMPTY_KEY_CELL
        continues = torch.zeros_like(present)
        continues[..., 1:] = cells[..., 1:] == cells[..., :-1]
        before = torch.where(continues, ids.roll(1, dims=-1), self.newest(cells, tables).long())
        row, table, position = present.nonzero(as_tuple=True)
        entry = row, table, position
        self.links[row, ids[entry], table + (tables.start or 0)] = before[entry].int()
        last = present.clone()
        last[..., :-1] &= ~continues[..., 1:]
        row, table, position = last.nonzero(as_tuple=True)
        entry = row, table, position
        offsets = torch.tensor(self.table_offsets[tables], device=run.device)
        self.heads[row, cells[entry] + offsets[table]] = ids[entry].int()

    def walk(self, ids: torch.Tensor, heads: torch.Tensor) -> None:
        """Complete windows that were cut short by the start of the call.

        Args:
            ids: int64 `[G, L, M', w]`, oldest first, −1 in front; filled in place.
            heads: int32 `[G, L, M']`, where each chain starts.
        """
        rows, num_tables, _, num_candidates = ids.shape
        links = self.links.view(rows, -1)
        table = torch.arange(num_tables, device=ids.device)[:, None]
        steps, current = [], heads.long()
        for _ in range(num_candidates):
            steps.append(current)
            flat = (current.clamp(min=0) * num_tables + table).view(rows, -1)
            current = torch.where(current < 0, -1, links.gather(1, flat).view(current.shape).long())
        chain = torch.stack(steps, dim=-1)
        missing = (ids < 0).sum(dim=-1, keepdim=True)
        step = missing - 1 - torch.arange(num_candidates, device=ids.device)
        ids.copy_(torch.where(step >= 0, chain.gather(-1, step.clamp(min=0)), ids))

    def undo(self, cells: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> None:
        """Take the entities `first` ≤ id < `last` (int64 `[G]`) out again; `cells` int32 `[G, N, L]`."""
        span = int((last - first).max()) if first.numel() else 0
        if span <= 0:
            return
        ids = first[:, None] + torch.arange(span, device=first.device)
        inside = ids < last[:, None]
        ids = ids.clamp(max=cells.shape[1] - 1)[..., None].expand(-1, -1, cells.shape[-1])
        links = self.links.gather(1, ids)
        # Of the entities removed from one cell only the oldest links to one that stays: its link is the head again.
        oldest = inside[..., None] & (links < first[:, None, None])
        row, step, table = oldest.nonzero(as_tuple=True)
        self.heads[row, self.slots(cells.gather(1, ids))[row, step, table]] = links[row, step, table]


@dataclass
class CellLists:
    """The entities of a call sorted by (cell, time) in each table, and which of them are whose candidates.

    Each list has w empty places in front: a window that starts before the first run reads these.

    Attributes:
        times: int32 `[G, L, w + M]`.
        starts: int64 `[G, M, L]`, where a query's w candidates begin, all lists numbered through.
        filled: int64 `[G, M, L]`, how many of them, the last ones, are in its cell.
        places: per axis `[G, L, w + M]`, where the entities are; None until `lay_out`.
    """

    times: torch.Tensor
    starts: torch.Tensor
    filled: torch.Tensor
    num_candidates: int
    places: list[torch.Tensor] | None = None

    @classmethod
    def empty(cls, rows: int, num_tables: int, num_queries: int, num_candidates: int, device: torch.device):
        """Lists that nothing was `set` in yet."""
        times = torch.zeros(rows, num_tables, num_candidates + num_queries, dtype=torch.int32, device=device)
        starts = torch.empty(rows, num_queries, num_tables, dtype=torch.int64, device=device)
        return cls(times, starts, torch.empty_like(starts), num_candidates)

    def set(self, tables: slice, run: torch.Tensor, ends: torch.Tensor, query_cells: torch.Tensor) -> None:
        """Some of the tables, from what `sort_by_cell_and_time` gave: all `[G, L', M]`."""
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
        held = (ends - first.gather(-1, last)).clamp(max=self.num_candidates)
        self.filled[..., tables] = held.masked_fill_(~in_cell, 0).transpose(1, 2)

    def lay_out(self, positions: torch.Tensor) -> None:
        """Positions of the entities by time, `[G, M, P]`."""
        first = torch.arange(positions.shape[0], device=positions.device)[:, None, None] * positions.shape[1]
        order = (self.times + first).view(-1)
        self.places = [axis.reshape(-1).index_select(0, order) for axis in positions.unbind(dim=-1)]

    def read(self, queries: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(times int32 of the candidates, oldest first, whether each is one at all), `[G, M', L w]`."""
        place = torch.arange(self.num_candidates, device=self.times.device)
        there = place >= self.num_candidates - self.filled[:, queries, :, None]
        return self._windows(self.times, queries), there.flatten(2)

    def read_places(self, queries: slice) -> Iterator[torch.Tensor]:
        """Where they are, axis by axis, `[G, M', L w]`."""
        return (self._windows(axis, queries) for axis in self.places)

    def _windows(self, lists: torch.Tensor, queries: slice) -> torch.Tensor:
        windows = lists.view(-1).unfold(0, self.num_candidates, 1)
        starts = self.starts[:, queries]
        return windows.index_select(0, starts.reshape(-1)).view(*starts.shape[:2], -1)


def start_chains(chains: CellChains, key_cells: torch.Tensor, window: int, counts: torch.Tensor | None) -> None:
    """Chain the entities of rows without a past that have left the local window with the last query, `[G, M, L]`."""
    times = torch.arange(key_cells.shape[1], device=key_cells.device)
    ends = times.new_tensor([len(times)]) if counts is None else counts[:, None]
    entered = (times < ends - window).unsqueeze(-1)
    for table in range(key_cells.shape[-1]):
        tables = slice(table, table + 1)
        cells = torch.where(entered, key_cells[..., tables].long(), EMPTY_KEY_CELL).transpose(1, 2)
        chains.extend((cells << 32 | times << 1).sort(dim=-1).values, ends.new_zeros(len(cells), 1), tables)


def sort_by_cell_and_time(key_cells: torch.Tensor, query_cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One sort of keys and queries together, by (cell, time, key before query); time is the last index.

    Args:
        key_cells, query_cells: int64 `[G, L, M]`.

    Returns:
        (keys' codes `cell << 32 | time << 1` in sorted order, int64 `[G, L, M]`;
        for each query how many keys of its row and table sort before it, int64 `[G, L, M]`).
    """
    times = torch.arange(key_cells.shape[-1], device=key_cells.device) << 1
    codes = torch.cat([key_cells << 32 | times, query_cells << 32 | times | 1], dim=-1)
    if codes.device.type == "cpu":
        codes.numpy().sort(axis=-1)  # several times faster than torch's sort of int64
    else:
        codes = codes.sort(dim=-1).values
    is_key = (codes & 1) == 0
    keys = codes.masked_select(is_key).view(key_cells.shape)
    # A place for each key and each query, by time: the queries' are kept.
    keys_before = torch.empty_like(codes).scatter_(-1, codes & 0xFFFFFFFF, is_key.cumsum(dim=-1))
    return keys, keys_before[..., 1::2]


def fold_segments(query_cells, entering_cells, segments, entering):
    """Number (segment, cell) pairs so that equal numbers mean both are equal, below 2^30. Shapes `[G, L, M]`."""
    own = torch.unique(segments.clamp(min=0), return_inverse=True)[1][:, None]
    keys_own = own.gather(2, entering.clamp(min=0)[:, None])
    pairs = torch.stack([query_cells + (own << 31), entering_cells + (keys_own << 31)])
    numbers = torch.unique(pairs, return_inverse=True)[1]
    return numbers[0], numbers[1]
