"""How well one view finds the other: embeddings of many rows, and recall among them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data.contrastive import PAIR, ContrastiveCollator, Row


@torch.no_grad()
def embed(
    model: torch.nn.Module, rows: Sequence[Row], collator: ContrastiveCollator, batch_size: int = 64
) -> torch.Tensor:
    """Embeddings `[rows, projection_dim]` of first views, on the CPU, in the order of `rows`.

    Args:
        model: a `DFNForContrastive`; it is put into evaluation mode.
        rows: of one view, or of two of which the second is not looked at.
        batch_size: rows at a time; those of like length stand together.
    """
    model.eval()
    views = [{name: value for name, value in row.items() if not name.startswith(PAIR)} for row in rows]
    order = sorted(range(len(views)), key=lambda number: len(next(iter(views[number].values()))))
    device = next(model.parameters()).device
    found: list[torch.Tensor] = [torch.empty(0)] * len(views)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = {name: tensor.to(device) for name, tensor in collator([views[number] for number in numbers]).items()}
        for number, embedding in zip(numbers, model(**batch).embeds.cpu(), strict=True):
            found[number] = embedding
    return torch.stack(found)


def second_views(rows: Sequence[Row]) -> list[Row]:
    """The second views of rows as first ones, to be embedded alone."""
    return [{name.removeprefix(PAIR): value for name, value in row.items() if name.startswith(PAIR)} for row in rows]


@dataclass(frozen=True)
class Retrieval:
    """Shares of views whose pair is the best match of all candidates, or among the best five or ten.

    Attributes:
        recall_at_1, recall_at_5, recall_at_10: of first views that look for the second. Ties count against the model.
        back_recall_at_1, back_recall_at_5, back_recall_at_10: of second views that look for the first.
        candidates: how many there were to choose from.
    """

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    back_recall_at_1: float
    back_recall_at_5: float
    back_recall_at_10: float
    candidates: int


def retrieval(embeds: torch.Tensor, pair_embeds: torch.Tensor) -> Retrieval:
    """Recall of `pair_embeds` by `embeds` and the other way round, both `[rows, projection_dim]`.

    Raises:
        ValueError: there are no rows, or more of one than of the other.
    """
    if embeds.shape != pair_embeds.shape or not len(embeds):
        raise ValueError(
            f"embeddings must be of as many rows, and of one at least: got {list(embeds.shape)} and "
            f"{list(pair_embeds.shape)}"
        )
    similarity = embeds.float() @ pair_embeds.float().T
    right = similarity.diagonal()[:, None]
    forth, back = ((matrix >= right).sum(dim=1) - 1 for matrix in (similarity, similarity.T))

    def share(ranks: torch.Tensor, best: int) -> float:
        return (ranks < best).float().mean().item()

    return Retrieval(
        recall_at_1=share(forth, 1),
        recall_at_5=share(forth, 5),
        recall_at_10=share(forth, 10),
        back_recall_at_1=share(back, 1),
        back_recall_at_5=share(back, 5),
        back_recall_at_10=share(back, 10),
        candidates=len(embeds),
    )
