"""Evaluates causal language models: loss, perplexity, bits per byte, top-1 and top-5 accuracy."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokens import token_ids, vocabulary_size

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Evaluation:
    """Means over all scored tokens of all documents.

    Attributes:
        loss: nats per token.
        perplexity: `exp(loss)`, comparable only between models with the same tokenizer.
        bits_per_byte: total nats / ln 2 / total UTF-8 bytes of the documents, comparable between all models.
        top1_accuracy: fraction of tokens with the highest logit. Ties count against the model.
        top5_accuracy: fraction of tokens among the five highest logits.
        num_tokens: number of scored tokens.
        num_bytes: UTF-8 bytes of the documents.
        num_documents: number of documents with at least one token.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    top1_accuracy: float
    top5_accuracy: float
    num_tokens: int
    num_bytes: int
    num_documents: int


def evaluate_causal_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    context_length: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Score every token of every document once, given the preceding tokens of its document.

    A start token (the tokenizer's `bos_token`, or its `eos_token` if there is none) precedes each document. A window
    at offset a reads tokens a … a + context_length − 1 and predicts a + 1 … a + context_length. Windows start at 0,
    `stride`, 2 · `stride` …, and a window is scored on tokens that no earlier window predicted. With
    `stride = context_length`, a token is predicted from 1 to `context_length` tokens. With a smaller stride, it is
    predicted from at least `context_length − stride + 1` tokens if the document has them, at `context_length / stride`
    times the cost.

    Args:
        model: causal language model; its device and training mode do not change.
        tokenizer: the model's tokenizer.
        documents: texts, possibly a stream.
        context_length: tokens per window.
        stride: tokens between the starts of two windows; None means `context_length`.
        batch_size: windows per forward pass.

    Raises:
        ValueError: there is no text, the model cannot read a window, the tokenizer has no start token or ids outside
            the model's vocabulary, or logits are not finite.
    """
    stride = context_length if stride is None else stride
    check_window(model, context_length, stride, batch_size)
    check_vocabulary(model, tokenizer)
    start_token = document_start_token(tokenizer)

    num_documents = num_bytes = 0

    def windows() -> Iterator[tuple[list[int], int]]:
        nonlocal num_documents, num_bytes
        for text in documents:
            tokens = token_ids(text, tokenizer)
            if tokens:
                num_documents += 1
                num_bytes += len(text.encode())
                yield from scored_windows([start_token, *tokens], context_length, stride)

    nats = 0.0
    num_tokens = top1 = top5 = 0
    was_training = model.training
    model.eval()
    try:
        remaining = windows()
        while batch := list(islice(remaining, batch_size)):
            losses, ranks = token_losses_and_ranks(model, batch)
            nats += losses.sum(dtype=torch.float64).item()
            num_tokens += len(losses)
            top1 += int((ranks < 1).sum())
            top5 += int((ranks < 5).sum())
    finally:
        model.train(was_training)
    if num_tokens == 0:
        raise ValueError("documents holds no text: give at least one document that is not empty")
    if not math.isfinite(nats):
        raise ValueError("the model's logits are not finite on these documents: use a model that has not diverged")
    loss = nats / num_tokens
    return Evaluation(
        loss=loss,
        perplexity=torch.tensor(loss, dtype=torch.float64).exp().item(),
        bits_per_byte=nats / math.log(2) / num_bytes,
        top1_accuracy=top1 / num_tokens,
        top5_accuracy=top5 / num_tokens,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_documents=num_documents,
    )


def scored_windows(tokens: list[int], context_length: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Yield windows of at most `context_length` + 1 tokens, each with the number of its last tokens to score.

    Every token except the first is scored once.
    """
    scored = 0
    for start in range(0, len(tokens) - 1, stride):
        last = min(start + context_length, len(tokens) - 1)
        yield tokens[start : last + 1], last - scored
        scored = last
        if last == len(tokens) - 1:
            return


@torch.no_grad()
def token_losses_and_ranks(
    model: PreTrainedModel, windows: list[tuple[list[int], int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss in nats and rank (0 for the highest logit) of every scored token of `windows`, each `[num_scored]`."""
    length = max(len(tokens) for tokens, _ in windows) - 1
    input_ids = torch.zeros(len(windows), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORED_LABEL)
    for row, (tokens, num_scored) in enumerate(windows):
        read = len(tokens) - 1
        input_ids[row, :read] = torch.tensor(tokens[:-1])
        attention_mask[row, :read] = 1
        targets[row, read - num_scored : read] = torch.tensor(tokens[-num_scored:])
    scored = targets != IGNORED_LABEL

    outputs = model(
        input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device), use_cache=False
    )
    logits = outputs.logits[scored.to(model.device)].float()  # [num_scored, vocab_size]
    targets = targets[scored].to(model.device)
    losses = cross_entropy(logits, targets, reduction="none")
    target_logits = logits.gather(1, targets[:, None])
    ranks = (logits >= target_logits).sum(-1) - 1
    return losses, ranks


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the tokenizer has ids outside the model's vocabulary."""
    size = vocabulary_size(tokenizer)
    if size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {size} tokens but the model's vocab_size is {model.config.vocab_size}: "
            "use the model's own tokenizer"
        )


def document_start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that starts a document: the tokenizer's `bos_token`, or its `eos_token` if there is none.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        "the tokenizer has neither bos_token nor eos_token to start a document: set tokenizer.bos_token and save the "
        "tokenizer, or give a prompt"
    )


def check_window(model: PreTrainedModel, context_length: int, stride: int, batch_size: int) -> None:
    """Raise ValueError if an option is out of range or the model cannot read `context_length` tokens."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if context_length < 1:
        raise ValueError(f"context_length must be at least 1, got {context_length}")
    if longest is not None and context_length > longest:
        raise ValueError(
            f"context_length {context_length} exceeds the model's max_position_embeddings: lower it to {longest}"
        )
    if not 1 <= stride <= context_length:
        raise ValueError(f"stride must be between 1 and context_length ({context_length}), got {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
