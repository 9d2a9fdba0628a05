"""Packed blocks to train and to validate on, from the embedded corpus or from one's own text."""

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..assets.corpus import load_corpus
from .packing import pack, tokenize
from .text import load_text

NUM_VALIDATION = 128
HELD_OUT_FRACTION = 0.05
HELD_OUT_OF_STREAM = 64
SHUFFLE_BUFFER = 1024


def corpus_blocks(
    tokenizer: PreTrainedTokenizerBase, block_size: int, *, num_validation: int = NUM_VALIDATION
) -> tuple[Dataset, Dataset]:
    """Blocks of the embedded corpus: all of its train split, and some of its validation split.

    Args:
        tokenizer: of the model to train.
        block_size: tokens per block.
        num_validation: how many blocks to validate on at most, spread evenly.

    Raises:
        ValueError: `block_size` is below 2 or `num_validation` below 1.
    """
    train, validation = (
        pack(tokenize(load_corpus(split), tokenizer), block_size, pad_token_id=padding(tokenizer))
        for split in ("train", "validation")
    )
    return train, spread(validation, num_validation)


def text_blocks(
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    data: str | None,
    validation_data: str | None = None,
    *,
    num_validation: int = NUM_VALIDATION,
    text_field: str = "text",
    streaming: bool = False,
    seed: int = 0,
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """Blocks of one's own text, to train on and to validate on.

    Args:
        tokenizer: of the model to train.
        block_size: tokens per block.
        data: file or folder, as `load_text` takes it; None for the embedded corpus (`corpus_blocks`), which the
            options below, but for `num_validation`, say nothing of.
        validation_data: likewise; without it the last 5 % of the blocks of `data` are held out, and of a stream the
            first 64.
        num_validation: how many blocks to validate on at most, spread evenly; of a stream the first.
        text_field: of JSON Lines.
        streaming: read `data` while training, its blocks shuffled within a buffer of 1,024.
        seed: of that shuffling.

    Raises:
        ValueError: no text, or too little to hold some of it out; `block_size` below 2 or `num_validation` below 1.
    """
    if data is None:
        return corpus_blocks(tokenizer, block_size, num_validation=num_validation)

    def blocks(path: str) -> Dataset | IterableDataset:
        documents = load_text(path, text_field=text_field, streaming=streaming)
        return pack(tokenize(documents, tokenizer), block_size, pad_token_id=padding(tokenizer))

    train = blocks(data)
    if validation_data is not None:
        validation = blocks(validation_data)
    elif isinstance(train, IterableDataset):
        train, validation = train.skip(HELD_OUT_OF_STREAM), train.take(HELD_OUT_OF_STREAM)
    else:
        if len(train) < 2:
            raise ValueError(
                f"{data} fills no more than one block of {block_size} tokens, so none can be held out: "
                "lower block_size, or give validation data"
            )
        first_held_out = len(train) - max(1, round(HELD_OUT_FRACTION * len(train)))
        train, validation = train.select(range(first_held_out)), train.select(range(first_held_out, len(train)))
    if isinstance(train, IterableDataset):
        train = train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return train, spread(validation, num_validation)


def spread(blocks: Dataset | IterableDataset, at_most: int) -> Dataset | IterableDataset:
    """`at_most` of the blocks, evenly spread over them; of a stream the first.

    Raises:
        ValueError: `at_most` is below 1.
    """
    if at_most < 1:
        raise ValueError(f"num_validation must be at least 1, got {at_most}")
    if isinstance(blocks, IterableDataset):
        return blocks.take(at_most)
    number = min(at_most, len(blocks))
    return blocks.select([index * len(blocks) // number for index in range(number)])


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands at padded places; no model reads it."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
