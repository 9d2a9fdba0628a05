"""Character vocabularies that some originals keep beside the weights."""

from collections.abc import Mapping

from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast


def character_tokenizer(vocabulary: Mapping[str, int], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character; characters outside the vocabulary are left out of a text.

    Args:
        vocabulary: character → id, the original's `stoi`.
        vocab_size: rows of the embedding.

    Raises:
        ValueError: not a vocabulary of single characters with ids of their own below `vocab_size`.
    """
    for character, number in vocabulary.items():
        if not isinstance(character, str) or len(character) != 1:
            raise ValueError(f"the file's vocabulary (stoi) holds {character!r}, which is no single character")
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < vocab_size:
            raise ValueError(
                f"the file's vocabulary (stoi) gives {character!r} the id {number!r}: it must lie below {vocab_size}, "
                "the rows of the embedding"
            )
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("the file's vocabulary (stoi) gives two characters the same id")
    tokenizer = Tokenizer(BPE(vocab=dict(vocabulary), merges=[]))
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
