"""Packed blocks for training and validation, from the bundled corpus or from a user's text."""

from itertools import accumulate

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
    """Pack the bundled corpus into blocks.

    Args:
        tokenizer: tokenizer of the model to train.
        block_size: tokens per block.
        num_validation: maximum number of validation blocks, evenly spaced over the validation split.

    Returns:
        The blocks of the train split and `num_validation` blocks of the validation split.

    Raises:
        ValueError: `block_size` is below 2 or `num_validation` below 1.
    """
    train, validation = (
        pack(tokenize(load_corpus(split), tokenizer), block_size, pad_token_id=pad_id(tokenizer))
        for split in ("train", "validation")
    )
    return train, evenly_spaced(validation, num_validation)


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
    """Pack a user's text into blocks for training and validation.

    Args:
        tokenizer: tokenizer of the model to train.
        block_size: tokens per block.
        data: file or folder, see `load_text`; None means the bundled corpus (`corpus_blocks`), for which all options
            below except `num_validation` are ignored.
        validation_data: file or folder to validate on; None holds out the last 5 % of the blocks of `data`, or the
            first 64 blocks if `streaming`.
        num_validation: maximum number of validation blocks, evenly spaced; of a stream the first ones.
        text_field: field of JSON Lines that holds the text.
        streaming: read `data` during training and shuffle its blocks in a buffer of 1,024.
        seed: seed of that shuffle.

    Returns:
        Training blocks and validation blocks.

    Raises:
        ValueError: there is no text or too little to hold out blocks, the tokenizer has no token for it, `block_size`
            is below 2, or `num_validation` is below 1.
    """
    if data is None:
        return corpus_blocks(tokenizer, block_size, num_validation=num_validation)

    def blocks(path: str, num_held_out: int) -> Dataset | IterableDataset:
        documents = tokenize(load_text(path, text_field=text_field, streaming=streaming), tokenizer)
        packed = pack(documents, block_size, pad_token_id=pad_id(tokenizer))
        check_number_of_blocks(packed, documents, block_size, num_held_out, path)
        return packed

    train = blocks(data, HELD_OUT_OF_STREAM if streaming and validation_data is None else 0)
    if validation_data is not None:
        validation = blocks(validation_data, 0)
    elif isinstance(train, IterableDataset):
        train, validation = train.skip(HELD_OUT_OF_STREAM), train.take(HELD_OUT_OF_STREAM)
    else:
        if len(train) < 2:
            raise ValueError(
                f"{data} fills less than two blocks of {block_size} tokens, so no block can be held out for "
                "validation: lower block_size (--block-size), or give validation_data (--validation-data)"
            )
        first_held_out = len(train) - max(1, round(HELD_OUT_FRACTION * len(train)))
        train, validation = train.select(range(first_held_out)), train.select(range(first_held_out, len(train)))
    if isinstance(train, IterableDataset):
        train = train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return train, evenly_spaced(validation, num_validation)


def check_number_of_blocks(
    blocks: Dataset | IterableDataset,
    documents: Dataset | IterableDataset,
    block_size: int,
    num_held_out: int,
    path: str,
) -> None:
    """Raise ValueError unless there are more than `num_held_out` blocks. As little of a stream is read as possible.

    Args:
        blocks: result of `pack(documents, block_size)`.
        documents: result of `tokenize`.
        block_size: tokens per block.
        num_held_out: blocks of a stream that are held out for validation.
        path: file or folder, for the error.
    """
    if isinstance(blocks, Dataset):
        enough = len(blocks) > 0
    else:
        num_tokens = accumulate(len(document["input_ids"]) for document in documents)
        enough = any(number > num_held_out * block_size for number in num_tokens)
        enough = enough or next(iter(blocks.skip(num_held_out)), None) is not None  # padding may fill the rest
    if enough:
        return
    if num_held_out:
        raise ValueError(
            f"{path} fills at most {num_held_out} blocks of {block_size} tokens, all of which a stream holds out for "
            "validation: read it without streaming (--streaming), lower block_size (--block-size), or give "
            "validation_data (--validation-data)"
        )
    raise ValueError(f"the tokenizer has no token for the text in {path}: use another tokenizer")


def evenly_spaced(blocks: Dataset | IterableDataset, num_validation: int) -> Dataset | IterableDataset:
    """Select at most `num_validation` blocks, evenly spaced; of a stream the first ones.

    Raises:
        ValueError: `num_validation` is below 1.
    """
    if num_validation < 1:
        raise ValueError(f"num_validation must be at least 1, got {num_validation}")
    if isinstance(blocks, IterableDataset):
        return blocks.take(num_validation)
    number = min(num_validation, len(blocks))
    return blocks.select([index * len(blocks) // number for index in range(number)])


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad token id, or 0 if it has none."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
