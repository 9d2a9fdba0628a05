"""Recall@k between the two views of rows, from the embeddings of a contrastive model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data.contrastive import PAIR, ContrastiveCollator, Row


@torch.no_grad()
def embed(
    model: torch.nn.Module, rows: Sequence[Row], collator: ContrastiveCollator, batch_size: int = 64
) -> torch.Tensor:
    """Embed the first views of rows.

    Args:
        model: a `DFNForContrastive`; it is set to evaluation mode.
        rows: rows of one or two views; second views are ignored.
        collator: collator of the rows.
        batch_size: rows per forward pass; rows of similar length share a batch.

    Returns:
        Embeddings `[rows, projection_dim]` on the CPU, in the order of `rows`.
    """
    model.eval()
    views = [{name: value for name, value in row.items() if not name.startswith(PAIR)} for row in rows]
    order = sorted(range(len(views)), key=lambda number: len(next(iter(views[number].values()))))
    device = next(model.parameters()).device
    embeddings: list[torch.Tensor] = [torch.empty(0)] * len(views)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = {name: tensor.to(device) for name, tensor in collator([views[number] for number in numbers]).items()}
        for number, embedding in zip(numbers, model(**batch).embeds.cpu(), strict=True):
            embeddings[number] = embedding
    return torch.stack(embeddings)


def second_views(rows: Sequence[Row]) -> list[Row]:
    """Rows with the second views of `rows` as first views, for `embed`."""
    return [{name.removeprefix(PAIR): value for name, value in row.items() if name.startswith(PAIR)} for row in rows]


@dataclass(frozen=True)
class Retrieval:
    """Recall@1, @5 and @10 of the pair of each view among all candidates. Ties count against the model.

    Attributes:
        recall_at_1, recall_at_5, recall_at_10: first views as queries, second views as candidates.
        back_recall_at_1, back_recall_at_5, back_recall_at_10: second views as queries, first views as candidates.
        candidates: number of candidates.
    """

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    back_recall_at_1: float
    back_recall_at_5: float
    back_recall_at_10: float
    candidates: int


def retrieval(embeds: torch.Tensor, pair_embeds: torch.Tensor) -> Retrieval:
    """Compute recall between the embeddings of first and second views, each `[rows, projection_dim]`.

    Raises:
        ValueError: there are no rows, or the shapes differ.
    """
    if embeds.shape != pair_embeds.shape or not len(embeds):
        raise ValueError(
            f"embeds and pair_embeds must have equal shape and at least one row, got {list(embeds.shape)} and "
            f"{list(pair_embeds.shape)}"
        )
    similarity = embeds.float() @ pair_embeds.float().T
    pair_similarity = similarity.diagonal()[:, None]
    forth, back = ((matrix >= pair_similarity).sum(dim=1) - 1 for matrix in (similarity, similarity.T))

    def recall(ranks: torch.Tensor, k: int) -> float:
        return (ranks < k).float().mean().item()

    return Retrieval(
        recall_at_1=recall(forth, 1),
        recall_at_5=recall(forth, 5),
        recall_at_10=recall(forth, 10),
        back_recall_at_1=recall(back, 1),
        back_recall_at_5=recall(back, 5),
        back_recall_at_10=recall(back, 10),
        candidates=len(embeds),
    )
