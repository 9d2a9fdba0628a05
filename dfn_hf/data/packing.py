"""Tokenizes documents and packs them into blocks for causal language models.

Example:
    ```python
    tokenizer = load_tokenizer("bpe")
    blocks = pack(tokenize(load_corpus("train"), tokenizer), block_size=256)
    ```
"""

from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from transformers import PreTrainedTokenizerBase

from .tokens import token_ids

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

IDS = Sequence(Value("int32"))
IGNORED_LABEL = -100

# Documents per group: few limit the memory of tokenizing, many limit the padding of packed blocks.
TOKENIZING_BATCH = 16
PACKING_BATCH = 256


def tokenize(dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase) -> AnyDataset:
    """Tokenize documents and add a start and an end token to each.

    The start token is the tokenizer's `bos_token`, or its `eos_token` if there is none. The end token is its
    `eos_token`. Tokens that the tokenizer does not define are omitted.

    Args:
        dataset: documents in the string column `text`; map-style or streaming.
        tokenizer: any tokenizer of transformers.

    Returns:
        A dataset of the same kind with the columns `input_ids` (int32) and `num_bytes` (UTF-8 bytes of the text, used
        for bits per byte).

    Raises:
        ValueError: the dataset has no column `text` or no document.
    """
    if dataset.column_names is not None and "text" not in dataset.column_names:
        raise ValueError(
            f"the dataset has the columns {dataset.column_names} but no column 'text': rename the column with the text"
        )
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


def pack(dataset: AnyDataset, block_size: int, *, pad_token_id: int = 0) -> AnyDataset:
    """Concatenate documents and cut them into blocks of `block_size` tokens.

    A block may hold parts of several documents. `segment_ids` separates them, so that no token attends to or is
    predicted from another document. Documents are packed in groups of 256; the last block of each group is padded.

    Args:
        dataset: result of `tokenize`; map-style or streaming.
        block_size: tokens per block, at least 2.
        pad_token_id: id at padded positions, which the model does not read.

    Returns:
        A dataset of the same kind with the int32 columns `input_ids`, `labels` and `segment_ids`, each `[block_size]`.
        `labels` equal `input_ids`, because a causal language model shifts them itself, but are -100 at padding and at
        the first token of each document in a block. `segment_ids` number the documents of a block from 0 and are -1
        at padding.

    Raises:
        ValueError: `block_size` is below 2, or there is no document.
    """
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2 (one token and the token it predicts), got {block_size}")
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
    """Raise ValueError if a map-style dataset is empty."""
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("the dataset holds no document: give at least one document with text")
