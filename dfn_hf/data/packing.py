"""From documents to blocks that a causal language model trains on.

tokenizer = load_tokenizer("bpe")
blocks = pack(tokenize(load_corpus("train"), tokenizer), block_size=256)
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from transformers import PreTrainedTokenizerBase

from ..assets.corpus import load_corpus
from ..assets.tokenizers import load_tokenizer
from ..assets.verses import load_verses
from .text import load_text

__all__ = ["load_corpus", "load_text", "load_tokenizer", "load_verses", "pack", "tokenize"]

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

IDS = Sequence(Value("int32"))
IGNORED_LABEL = -100

# Documents per group: few for the memory that tokenizing takes, many for the little that padding costs.
TOKENIZING_BATCH = 16
PACKING_BATCH = 256
CHARACTER_CHUNK = 1 << 20


def tokenize(dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase) -> AnyDataset:
    """The tokens of each document, between a start and an end token.

    The start token is the tokenizer's `bos_token`, or else its `eos_token`; the end token is its `eos_token`. A token
    that the tokenizer does not have is left out.

    Args:
        dataset: documents, with the string column `text`; map-style or streaming.
        tokenizer: any tokenizer of transformers.

    Returns:
        A dataset of the same kind with the columns `input_ids` (integers) and `num_bytes` (of the text in UTF-8, for
        bits per byte).

    Raises:
        ValueError: there is no column `text`, or no document.
    """
    if dataset.column_names is not None and "text" not in dataset.column_names:
        raise ValueError(f"the dataset has no column 'text' but {dataset.column_names}: rename the one with the text")
    require_rows(dataset)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    start = end if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        documents = [start + token_ids(text, tokenizer) + end for text in batch["text"]]
        return {
            "input_ids": [np.array(document, dtype=np.int32) for document in documents],
            "num_bytes": [len(text.encode()) for text in batch["text"]],
        }

    return dataset.select_columns("text").map(
        encode,
        batched=True,
        batch_size=TOKENIZING_BATCH,
        remove_columns=["text"],
        features=Features({"input_ids": IDS, "num_bytes": Value("int64")}),
    )


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text, without special tokens. Part by part: tokenizing takes some 150 bytes per character."""
    ids: list[int] = []
    for part in split_text(text):
        ids += tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def split_text(text: str) -> Iterator[str]:
    """Parts of bounded length that end where a word does before a line break: a byte-level BPE never merges across."""
    start = 0
    while len(text) - start > CHARACTER_CHUNK:
        limit = start + CHARACTER_CHUNK
        before_break = text[start : text.rfind("\n", start, limit) + 1].rstrip()
        stop = start + len(before_break) if before_break else limit
        yield text[start:stop]
        start = stop
    yield text[start:]


def pack(dataset: AnyDataset, block_size: int, *, pad_token_id: int = 0) -> AnyDataset:
    """Documents one after another, cut into blocks of `block_size` tokens.

    A block may hold parts of several documents; `segment_ids` tells them apart, so that an entity finds no neighbour
    in another document, and nothing is predicted from one document to the next. Documents are packed in groups of
    256, and the last block of each group is padded.

    Args:
        dataset: what `tokenize` returns; map-style or streaming.
        block_size: tokens per block, at least 2.
        pad_token_id: stands at the padded places; no model reads it.

    Returns:
        A dataset of the same kind whose columns all are `[block_size]` integers: `input_ids`; `labels`, the same
        tokens (a causal language model shifts them itself) but -100 at each document's first token in the block and
        at padding; `segment_ids`, which count the block's documents from 0, and are -1 at padding.

    Raises:
        ValueError: `block_size` is below 2, or there is no document.
    """
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}, but a block needs a token and the one it predicts: at least 2")
    require_rows(dataset)

    def pack_documents(batch: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        documents = batch["input_ids"]
        lengths = [len(document) for document in documents]
        padding = -sum(lengths) % block_size
        tokens = np.pad(np.concatenate(documents, dtype=np.int64), (0, padding), constant_values=pad_token_id)
        document_of = np.pad(np.repeat(np.arange(len(lengths)), lengths), (0, padding), constant_values=-1)
        tokens, document_of = tokens.reshape(-1, block_size), document_of.reshape(-1, block_size)
        continues = np.zeros_like(tokens, dtype=bool)
        continues[:, 1:] = document_of[:, 1:] == document_of[:, :-1]
        real = document_of >= 0
        return {
            "input_ids": tokens,
            "labels": np.where(continues & real, tokens, IGNORED_LABEL),
            "segment_ids": np.where(real, document_of - document_of[:, :1], -1),
        }

    packed = dataset.select_columns("input_ids").with_format("numpy")
    return packed.map(
        pack_documents,
        batched=True,
        batch_size=PACKING_BATCH,
        remove_columns=["input_ids"],
        features=Features({"input_ids": IDS, "labels": IDS, "segment_ids": IDS}),
    ).with_format(None)


def require_rows(dataset: Dataset | IterableDataset) -> None:
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("the dataset holds no document: give one with text in it")
