"""Builds the bundled tokenizers from the train splits of the bundled corpus and verse pairs.

Example:
    ```bash
    python scripts/build_tokenizers.py
    ```
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dfn_hf.assets.corpus import load_corpus
from dfn_hf.assets.verses import load_verses

ASSETS = Path(__file__).parents[1] / "dfn_hf/assets/tokenizers"
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
BPE_VOCAB_SIZE = 4096
TRANSLATION_VOCAB_SIZE = 8000


def main(
    output: Annotated[Path, typer.Option(help="Folder for the tokenizers.")] = ASSETS,
) -> None:
    """Write the folders bpe, byte and bpe-en-es."""
    verses = load_verses("train")
    translation = train_bpe((*verses["source"], *verses["target"]), TRANSLATION_VOCAB_SIZE)
    end = translation.token_to_id(END_OF_TEXT)
    translation.post_processor = processors.TemplateProcessing(
        single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, end)]
    )
    for name, tokenizer, padding_side in (
        ("bpe", train_bpe(load_corpus("train")["text"], BPE_VOCAB_SIZE), "left"),
        ("byte", byte_tokenizer(), "left"),
        ("bpe-en-es", translation, "right"),
    ):
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=PAD,
            padding_side=padding_side,
            model_input_names=["input_ids", "attention_mask"],
            clean_up_tokenization_spaces=False,
        ).save_pretrained(output / name)
        tokenizer.save(str(output / name / "tokenizer.json"), pretty=False)
        print(f"{name}: {tokenizer.get_vocab_size()} tokens")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE. The special tokens have the first ids: <|endoftext|> is 0, <|pad|> is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Build a tokenizer with one token per byte: ids 0 to 255 are bytes, <|endoftext|> is 256, <|pad|> is 257."""
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, PAD])
    return tokenizer


if __name__ == "__main__":
    typer.run(main)
