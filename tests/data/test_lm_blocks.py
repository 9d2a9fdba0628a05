"""Tests the blocks of a user's text: too little text, texts without tokens and errors in the middle of a stream."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.data.lm_blocks import HELD_OUT_OF_STREAM, text_blocks
from dfn_hf.data.pairs import encode_pairs, load_pairs
from dfn_hf.data.tokens import token_ids, vocabulary_size

BLOCK = 8


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def byte():
    return load_tokenizer("byte")


def test_streams_that_the_held_out_blocks_empty_are_refused(tmp_path, byte):
    path = str(tmp_path / "a.txt")
    held_out = BLOCK * HELD_OUT_OF_STREAM
    (tmp_path / "a.txt").write_text("x" * (held_out - 2))
    with pytest.raises(
        ValueError, match=r"a\.txt fills at most 64 blocks of 8 tokens.*--streaming.*--validation-data"
    ):
        text_blocks(byte, BLOCK, path, streaming=True)
    for arguments in ({"streaming": False}, {"streaming": True, "validation_data": path}):
        train, validation = (list(blocks) for blocks in text_blocks(byte, BLOCK, path, **arguments))
        assert train and validation
    (tmp_path / "a.txt").write_text("x" * (held_out - 1))
    train, validation = text_blocks(byte, BLOCK, path, streaming=True)
    assert (len(list(train)), len(list(validation))) == (1, HELD_OUT_OF_STREAM)


def test_padded_blocks_of_a_stream_count(tmp_path, byte):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 256 * 2)  # two groups of 96 full blocks
    train, _ = text_blocks(byte, BLOCK, str(tmp_path), streaming=True)
    assert len(list(train)) == 2 * 96 - HELD_OUT_OF_STREAM
    (tmp_path / "a.jsonl").write_text('{"text": "xyz"}\n' * 256 + '{"text": "x"}\n')
    train, _ = text_blocks(byte, 20, str(tmp_path), streaming=True)
    assert len(list(train)) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_without_tokens_are_refused(tmp_path, byte, streaming):
    (tmp_path / "a.txt").write_text("xyz")
    (tmp_path / "b.txt").write_text("abc" * 100)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[])))
    for data, validation in (("a.txt", None), ("a.txt", "b.txt"), ("b.txt", "a.txt")):
        validation = validation and str(tmp_path / validation)
        with pytest.raises(ValueError, match=r"(no token for the text in .*a\.txt|fills at most 64 blocks)"):
            text_blocks(tokenizer, BLOCK, str(tmp_path / data), validation, streaming=streaming)


def test_errors_in_the_middle_of_a_stream_name_the_line(tmp_path, byte):
    (tmp_path / "a.jsonl").write_text('{"text": "some good text"}\n' * 500 + '{"text": "bad \\ud83d"}\n')
    train, _ = text_blocks(byte, BLOCK, str(tmp_path), streaming=True)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 501: the field 'text' contains \\ud83d"):
        list(train)


def test_texts_that_the_tokenizer_cannot_encode_are_refused(tmp_path, byte):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "z": 100})))
    assert vocabulary_size(tokenizer) == 101 and vocabulary_size(byte) == 258
    with pytest.raises(ValueError, match="the tokenizer cannot encode a text .*UNK.*use another tokenizer"):
        token_ids("b", tokenizer)
    with pytest.raises(ValueError, match="a lone surrogate"):
        token_ids("a\ud83d", byte)


def test_pairs_without_tokens_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"source": "abc", "target": "xyz"}\n')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[])))
    with pytest.raises(ValueError, match="the target 'xyz' has no tokens: remove the pair"):
        encode_pairs(load_pairs(tmp_path), tokenizer, 20)
