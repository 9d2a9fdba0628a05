"""One decode step of the cell search: `search_cells` for a single query per row, in operations of fixed shape.

Nothing waits for the data, so a step can be compiled whole and captured in a CUDA graph. The lists are the same, bit
for bit. Shape letters: G rows, N stored entities, P position_dim, L tables, w candidates per table, K neighbours.
"""

import torch

from .neighbor_search import rank_nearest, squared_distances


def search_step(
    query_positions: torch.Tensor,
    query_cells: torch.Tensor,
    query_index: torch.Tensor,
    key_positions: torch.Tensor,
    key_cells: torch.Tensor,
    num_neighbors: int,
    window: int,
    candidates_per_table: int,
    heads: torch.Tensor,
    links: torch.Tensor,
    first_slots: torch.Tensor,
    *,
    reach: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K nearest distinct candidates of one query per row; brings the chains up to date.

    They hold the entities before index − window, and index − window enters them.

    Args:
        query_positions: `[G, 1, P]`; query_cells: int32 `[G, 1, L]`; query_index: int64 `[G, 1]`.
        key_positions: `[G, N, P]`; key_cells: int32 `[G, N, L]`; room behind a row's entities does not matter.
        heads: int32 `[G, slots]`; links: int32 `[G, capacity, L]`; see `CellChains`.
        first_slots: int64 `[L]`, the first slot of each table.
        reach: int64 `[G, 1]`, how many of the entities just before it a query may see; all if None.
        counts: int64 `[G]`, 0 where the query is padding. All are real if None.

    Returns:
        (indices int64 `[G, 1, K]`, squared distances `[G, 1, K]`); −1 and inf where there are fewer than K.
    """
    num_tables = query_cells.shape[-1]
    entering = query_index - window
    enters = entering >= 0
    if counts is not None:
        enters = enters & (counts > 0)[:, None]
    entry = entering.clamp(min=0)[..., None].expand(-1, -1, num_tables)  # [G, 1, L]
    slots = key_cells.gather(1, entry)[:, 0] + first_slots
    before = heads.gather(1, slots)
    linked = torch.where(enters[..., None], before[:, None], links.gather(1, entry))
    newest = torch.where(enters, entering.int(), before)
    # What does not enter writes back what stood there. Unlike scatter_, compilers do index_put_ in place.
    row, table = torch.arange(len(slots), device=slots.device)[:, None], torch.arange(num_tables, device=slots.device)
    links.index_put_((row, entry[:, 0], table), linked[:, 0])
    heads.index_put_((row, slots), newest)

    steps = [heads.gather(1, query_cells[:, 0] + first_slots)[:, None]]  # each [G, 1, L]
    while len(steps) < candidates_per_table:
        last = steps[-1]
        steps.append(torch.where(last < 0, -1, links.gather(1, last.long().clamp(min=0))))
    ids = torch.cat(steps, dim=1).flatten(1).long()  # [G, w * L]

    oldest = torch.zeros_like(query_index) if reach is None else (query_index - reach).clamp(min=0)
    visible = ids >= oldest
    if counts is not None:
        visible = visible & (counts > 0)[:, None]
    keys = key_positions.gather(1, ids.clamp(min=0)[..., None].expand(-1, -1, key_positions.shape[-1]))
    squared = squared_distances(query_positions, keys)
    nearest, squared = rank_nearest(squared, query_index - ids, visible, num_neighbors)
    return torch.where(nearest < 0, -1, query_index - nearest)[:, None], squared[:, None]
