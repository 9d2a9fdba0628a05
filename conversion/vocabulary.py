"""Character vocabularies that some originals store with the weights."""

import reprlib
from collections.abc import Mapping

from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from ..data.tokens import is_unicode


def character_tokenizer(vocabulary: Mapping[str, int], vocab_size: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per character; it skips characters outside the vocabulary.

    Args:
        vocabulary: character → id, the original's `stoi`.
        vocab_size: number of rows of the embedding.

    Raises:
        ValueError: `vocabulary` does not map single characters to distinct ids below `vocab_size`.
    """
    for character, number in vocabulary.items():
        if not isinstance(character, str) or len(character) != 1 or not is_unicode(character):
            shown = reprlib.repr(character)
            raise ValueError(f"the file's vocabulary (stoi) contains {shown}: use single characters")
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < vocab_size:
            raise ValueError(
                f"the file's vocabulary (stoi) gives {character!r} the id {reprlib.repr(number)}: use an id "
                f"below {vocab_size}, the number of embeddings"
            )
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("the file's vocabulary (stoi) gives two characters the same id: use distinct ids")
    tokenizer = Tokenizer(BPE(vocab=dict(vocabulary), merges=[]))
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
