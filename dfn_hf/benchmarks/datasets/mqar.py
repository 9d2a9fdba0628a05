"""Multi-query associative recall (Zoology, arXiv 2312.04927): sequences of the task, and the accuracy of a model."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

IGNORED = -100


def recall_batch(
    generator: torch.Generator, *, batch_size: int, length: int, num_pairs: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """Draw one batch: `num_pairs` key-value pairs, then random filler that contains each key once as a query.

    Keys come from the lower half of the vocabulary and values from the upper half, without repetition. As in Zoology,
    a query is a key without its value, an even number of tokens after the pairs; its value is a label and not an
    input. Two things differ from Zoology: filler never contains a key of the sequence, so that only the pair gives the
    answer; and queries are distributed evenly over the sequence, so that the distance to a pair grows with the length.

    Returns:
        `input_ids` and `labels`, `[batch_size, length]` int64. A value is the label one column after its query
        (causal models shift labels); other labels are -100.

    Raises:
        ValueError: `length` is too short for the pairs and queries, or the vocabulary too small for the pairs.
    """
    half = vocab_size // 2
    if num_pairs > half:
        raise ValueError(
            f"num_pairs is {num_pairs}: a vocabulary of {vocab_size} tokens has {half} keys, so choose at most {half}"
        )
    if length < 4 * num_pairs:
        raise ValueError(f"length is {length}: {num_pairs} pairs and queries need at least {4 * num_pairs} tokens")

    def draw(count: int) -> torch.Tensor:
        return torch.rand(batch_size, count, generator=generator).argsort(dim=1)[:, :num_pairs]

    keys, values = draw(half), half + draw(half)
    queries = 2 * num_pairs + 2 * draw((length - 2 * num_pairs) // 2)
    is_filler = torch.ones(batch_size, vocab_size).scatter_(1, keys, 0.0)
    input_ids = torch.multinomial(is_filler, length, replacement=True, generator=generator)
    input_ids[:, 0 : 2 * num_pairs : 2] = keys
    input_ids[:, 1 : 2 * num_pairs : 2] = values
    input_ids.scatter_(1, queries, keys)
    labels = torch.full_like(input_ids, IGNORED).scatter_(1, queries + 1, values)
    return {"input_ids": input_ids, "labels": labels}


def recall_batches(seed: int, **task: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield endless batches of one seed; `task` holds the arguments of `recall_batch`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield recall_batch(generator, **task)


@torch.no_grad()
def recall_accuracy(model: PreTrainedModel, *, seed: int, num_batches: int, **task: int) -> float:
    """Return the top-1 accuracy on the queries of `num_batches` new batches."""
    batches = recall_batches(seed, **task)
    correct = queries = 0
    for _ in range(num_batches):
        batch = {name: tensor.to(model.device) for name, tensor in next(batches).items()}
        choices = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].argmax(dim=-1)
        answers = batch["labels"][:, 1:]
        is_query = answers != IGNORED
        correct += int((choices == answers)[is_query].sum())
        queries += int(is_query.sum())
    return correct / queries
