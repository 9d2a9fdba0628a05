"""Multi-query associative recall (Zoology, arXiv 2312.04927): the task's sequences, and a model's accuracy on them."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

IGNORED = -100


def recall_batch(
    generator: torch.Generator, *, batch_size: int, length: int, num_pairs: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """One batch of `num_pairs` key-value pairs, then random filler with every key once more among it, as a query.

    Keys come from the lower half of the vocabulary and values from the upper, each without repetition. As in Zoology
    a query is a key alone, an even number of tokens behind the pairs; its value is a label and no input. Unlike there
    filler is never one of the sequence's keys, so that the pair alone tells the answer, and queries are spread evenly
    over the sequence, not crowded behind the pairs, so that the distance to a pair grows with the length.

    Returns:
        `input_ids` and `labels`, `[batch_size, length]` int64; labels are the values, one column after their query
        (causal models shift), and -100 elsewhere.

    Raises:
        ValueError: a length too short for the pairs and the queries, or a vocabulary too small for the pairs.
    """
    half = vocab_size // 2
    if num_pairs > half:
        raise ValueError(f"num_pairs is {num_pairs}: a vocabulary of {vocab_size} has only {half} keys")
    if length < 4 * num_pairs:
        raise ValueError(f"length is {length}: {num_pairs} pairs and queries take at least {4 * num_pairs} tokens")

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
    """Endless batches of one seed; `task` as in `recall_batch`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield recall_batch(generator, **task)


@torch.no_grad()
def recall_accuracy(model: PreTrainedModel, *, seed: int, num_batches: int, **task: int) -> float:
    """Share of the queries of `num_batches` fresh batches whose value is the model's first choice."""
    batches = recall_batches(seed, **task)
    right = asked = 0
    for _ in range(num_batches):
        batch = {name: tensor.to(model.device) for name, tensor in next(batches).items()}
        choices = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].argmax(dim=-1)
        answers = batch["labels"][:, 1:]
        is_query = answers != IGNORED
        right += int((choices == answers)[is_query].sum())
        asked += int(is_query.sum())
    return right / asked
