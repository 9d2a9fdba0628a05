"""Looking back over a window, block by block: time and memory of length × window, no loop over entities.

A block of queries sees the entities of its own block and the `before` ones ahead of it. Scores between them are laid
out by key, as products give them, or by offset, as everything that depends on i − j wants them.

Shape letters: B batch, M queries of this call, T queries of a block, N blocks, F features.
"""

import torch
from torch.nn import functional as F


def block_length(length: int, before: int) -> int:
    """T: as many queries as there are entities to look back to, fewer if the call has fewer."""
    return max(1, min(length, before))


def query_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """`[B, M, F]` → `[B, N, T, F]`, zero after the last."""
    length = x.shape[1]
    return F.pad(x, (0, 0, 0, -length % block)).unflatten(1, (-1, block))


def key_blocks(history: torch.Tensor, before: int, block: int) -> torch.Tensor:
    """What each block of queries sees: `[B, before + M, F]` → `[B, N, before + T, F]`, zero after the last."""
    length = history.shape[1] - before
    padded = F.pad(history, (0, 0, 0, -length % block))
    return padded.unfold(1, before + block, block).transpose(2, 3)


def join_blocks(x: torch.Tensor, length: int) -> torch.Tensor:
    """The way back: `[B, N, T, F]` → `[B, M, F]`."""
    return x.flatten(1, 2)[:, :length]


def by_offset(scores: torch.Tensor) -> torch.Tensor:
    """`[..., T, before + T]` by key → `[..., T, before + 1]`, oldest first: entry e looks back by before − e."""
    block, keys = scores.shape[-2:]
    # Row t begins at its key t: a row of keys + 1 entries is one entry longer than what it takes from.
    flat = F.pad(scores.flatten(-2), (0, block))
    return flat.unflatten(-1, (block, keys + 1))[..., : keys - block + 1]


def by_key(weights: torch.Tensor) -> torch.Tensor:
    """The way back: `[..., T, before + 1]` → `[..., T, before + T]`, zero outside the window."""
    block, width = weights.shape[-2:]
    keys = width + block - 1
    flat = F.pad(weights, (0, keys + 1 - width)).flatten(-2)
    return flat[..., : block * keys].unflatten(-1, (block, keys))


def to_dense(weights: torch.Tensor, index: torch.Tensor, num_entities: int) -> torch.Tensor:
    """Weights by offset → between entities, for output: `[B, H, M, before + 1]` → `[B, H, M, num_entities]`.

    Args:
        index: int64 `[B, M]`, place of each query in its row; what lies before the row's start must weigh 0.
    """
    width = weights.shape[-1]
    places = index[..., None] - torch.arange(width - 1, -1, -1, device=index.device)
    dense = weights.new_zeros(*weights.shape[:3], num_entities)
    places = places.clamp(min=0)[:, None].expand_as(weights)
    return dense.scatter_add(-1, places, weights)
