"""Cell search of one decode step: `neighbor_search.search_cells` of a single query per row, in fixed shapes.

No operation waits for data on the device, so a step can be compiled whole and captured in a CUDA graph. The lists
equal those of `search_cells` bit for bit.

Shape letters: G rows, N stored entities, P position_dim, L tables, w candidates per table, K neighbours.
"""

import torch

from .neighbor_ranking import rank_nearest, squared_distances


def search_step(
    query_positions: torch.Tensor,
    query_cells: torch.Tensor,
    query_index: torch.Tensor,
    key_positions: torch.Tensor,
    key_cells: torch.Tensor,
    num_neighbors: int,
    window: int,
    candidates_per_table: int,
    newest: torch.Tensor,
    links: torch.Tensor,
    first_slots: torch.Tensor,
    *,
    reach: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the K nearest distinct candidates of one query per row, and update the chains.

    Before the call the chains hold the entities before i − window, i the query's position; the call appends i −
    window.

    Args:
        query_positions: `[G, 1, P]`.
        query_cells: int32 `[G, 1, L]`.
        query_index: int64 `[G, 1]`, position i of each query.
        key_positions: `[G, N, P]`. Entries after a row's last entity are not read.
        key_cells: int32 `[G, N, L]`.
        num_neighbors: K.
        window: W.
        candidates_per_table: w.
        newest: int32 `[G, slots]`, see `CellChains`; updated in place.
        links: int32 `[G, capacity, L]`, see `CellChains`; updated in place.
        first_slots: int64 `[L]`, first slot of each table.
        reach: int64 `[G, 1]`, number of entities directly before i that may be candidates; None for all.
        counts: int64 `[G]`, 0 if the query is padding; None if all are real.

    Returns:
        (positions int64 `[G, 1, K]`, squared distances `[G, 1, K]`); −1 and inf if there are fewer than K.
    """
    # One function: a step is compiled and captured as a whole.
    num_tables = query_cells.shape[-1]
    entering = query_index - window
    enters = entering >= 0
    if counts is not None:
        enters = enters & (counts > 0)[:, None]
    entry = entering.clamp(min=0)[..., None].expand(-1, -1, num_tables)  # [G, 1, L]
    slots = key_cells.gather(1, entry)[:, 0] + first_slots
    previous = newest.gather(1, slots)
    linked = torch.where(enters[..., None], previous[:, None], links.gather(1, entry))
    # Padding writes the old values back. Compilers run index_put_ in place, but not scatter_.
    row, table = torch.arange(len(slots), device=slots.device)[:, None], torch.arange(num_tables, device=slots.device)
    links.index_put_((row, entry[:, 0], table), linked[:, 0])
    newest.index_put_((row, slots), torch.where(enters, entering.int(), previous))

    steps = [newest.gather(1, query_cells[:, 0] + first_slots)[:, None]]  # each [G, 1, L]
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
