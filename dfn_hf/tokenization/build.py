"""Rebuild the embedded tokenizers from the train split of the embedded corpus.

python -m dfn_hf.tokenization.build
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..corpus import load_corpus

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
BPE_VOCAB_SIZE = 4096


def main(
    output: Annotated[Path, typer.Option(help="Folder for the two tokenizers.")] = Path(__file__).parent,
) -> None:
    """Write the folders bpe and byte."""
    for name, tokenizer in {"bpe": train_bpe(load_corpus("train")["text"]), "byte": byte_tokenizer()}.items():
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=PAD,
            padding_side="left",
            model_input_names=["input_ids", "attention_mask"],
            clean_up_tokenization_spaces=False,
        ).save_pretrained(output / name)
        print(f"{name}: {tokenizer.get_vocab_size()} tokens")


def train_bpe(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE with the special tokens first: <|endoftext|> is 0, <|pad|> is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """One token per byte, its id the byte's value: <|endoftext|> is 256, <|pad|> is 257."""
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, PAD])
    return tokenizer


if __name__ == "__main__":
    typer.run(main)
