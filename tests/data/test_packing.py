"""Tests loading of text files, tokenizing and packing."""

import gzip
import json
import os
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import default_data_collator

import dfn_hf.data.packing
from dfn_hf import DFNConfig, DFNForCausalLM
from dfn_hf.assets.corpus import load_corpus
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.data.packing import pack, tokenize
from dfn_hf.data.text import load_text


@pytest.fixture(scope="module")
def byte():
    return load_tokenizer("byte")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "deep" / ".git").mkdir(parents=True)
    (root / "a.txt").write_text("first\n", encoding="utf-8")
    (root / "deep" / "b.jsonl").write_text(
        '{"text": "second", "n": 1}\n\n{"text": " "}\n{"text": "third", "n": "x"}\n'
    )
    with gzip.open(root / "deep" / "c.md.gz", "wt", encoding="utf-8") as file:
        file.write("förth")
    (root / "deep" / ".git" / "d.txt").write_text("hidden")
    (root / "e.py").write_text("not text")
    return root


def random_documents(seed: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abé \n", k=generator.randint(1, 60))) for _ in range(generator.randint(1, 30))]


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_is_read_recursively_in_path_order(folder, streaming):
    dataset = load_text(folder, streaming=streaming)
    assert [row["text"] for row in dataset] == ["first\n", "second", "third", "förth"]
    assert [row["text"] for row in dataset] == ["first\n", "second", "third", "förth"]


def test_changed_file_is_read_again(folder):
    assert load_text(folder / "a.txt")["text"][:] == ["first\n"]
    (folder / "a.txt").write_text("other\n")
    os.utime(folder / "a.txt", ns=(1, 1))
    assert load_text(folder / "a.txt")["text"][:] == ["other\n"]


def test_text_field_selects_the_json_field(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "héllo", "text": 3}))
    assert load_text(tmp_path / "a.jsonl", text_field="body")[0] == {"text": "héllo"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no file or folder .*none.txt"),
        ("empty.txt", b"", "empty.txt holds no text"),
        ("blank.jsonl", b'{"text": " "}\n', "blank.jsonl holds no text"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8"),
        ("broken.jsonl", b'{"text": \n', "broken.jsonl, line 1 is not JSON"),
        ("array.jsonl", b"[1]\n", "array.jsonl, line 1 is not a JSON object"),
        ("number.jsonl", b'{"text": 3}\n', "number.jsonl, line 1: the field 'text' is 3: give a string"),
        ("field.jsonl", b'{"body": "x"}\n', "field.jsonl, line 1 has no field 'text', only 'body': .*--text-field"),
    ],
)
def test_error_names_the_unreadable_file(tmp_path, streaming, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(tmp_path / name, streaming=streaming)


def test_error_names_an_invalid_line_after_valid_lines(tmp_path):
    (tmp_path / "late.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match="late.jsonl, line 2"):
        load_text(tmp_path / "late.jsonl")


def test_folder_without_text_is_rejected(tmp_path):
    (tmp_path / "a.py").write_text("x")
    with pytest.raises(ValueError, match="holds no text file .*.jsonl"):
        load_text(tmp_path)


def test_documents_start_and_end_with_the_end_token(byte):
    tokens = tokenize(Dataset.from_dict({"text": ["aé", ""], "title": ["x", "y"]}), byte)
    assert tokens[0] == {"input_ids": [256, *"aé".encode(), 256], "num_bytes": 3}
    assert tokens[1] == {"input_ids": [256, 256], "num_bytes": 0}


@pytest.mark.parametrize("name", ["bpe", "byte"])
def test_tokenizing_in_parts_equals_tokenizing_the_whole_text(name, monkeypatch):
    tokenizer = load_tokenizer(name)
    text = load_corpus("test")[0]["text"]
    expected = tokenizer(text, verbose=False)["input_ids"]
    monkeypatch.setattr(dfn_hf.data.tokens, "CHARACTER_CHUNK", 1000)
    assert len(list(dfn_hf.data.tokens.split_text(text))) > len(text) / 1000
    assert dfn_hf.data.tokens.token_ids(text, tokenizer) == expected


@pytest.mark.parametrize("text", ["a" * 50, "\n" * 50, " \n" * 20 + "a" * 40 + "\n" * 30])
def test_text_without_line_breaks_is_split_at_the_limit(text, monkeypatch):
    monkeypatch.setattr(dfn_hf.data.tokens, "CHARACTER_CHUNK", 7)
    parts = list(dfn_hf.data.tokens.split_text(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 7


@pytest.mark.parametrize("block_size", [2, 7, 32, 1000])
def test_blocks_contain_every_token_once_and_no_label_crosses_documents(block_size, byte):
    documents = random_documents(seed=block_size)
    blocks = pack(tokenize(Dataset.from_dict({"text": documents}), byte), block_size, pad_token_id=257)
    columns = {name: np.array(blocks[name][:]) for name in ("input_ids", "labels", "segment_ids")}
    assert {column.shape for column in columns.values()} == {(len(blocks), block_size)}

    real = columns["segment_ids"] >= 0
    assert (columns["input_ids"][~real] == 257).all() and (columns["labels"][~real] == -100).all()
    tokens = [token for document in documents for token in (256, *document.encode(), 256)]
    assert columns["input_ids"][real].tolist() == tokens
    assert len(blocks) == -(-len(tokens) // block_size)

    document_of = np.repeat(np.arange(len(documents)), [len(document.encode()) + 2 for document in documents])
    start = 0
    for ids, labels, segments in zip(*columns.values(), strict=True):
        length = (segments >= 0).sum()
        expected = document_of[start : start + length]
        assert segments[:length].tolist() == (expected - expected[0]).tolist()
        first = np.diff(expected, prepend=-1) != 0
        first[0] = True
        assert (labels[:length] == np.where(first, -100, ids[:length])).all()
        start += length


def test_streaming_yields_the_same_blocks(byte, monkeypatch):
    monkeypatch.setattr(dfn_hf.data.packing, "PACKING_BATCH", 5)
    documents = Dataset.from_dict({"text": random_documents(seed=0)})
    stored = pack(tokenize(documents, byte), 16)
    streamed = pack(tokenize(documents.to_iterable_dataset(), byte), 16)
    batches = zip(
        DataLoader(stored, batch_size=4, collate_fn=default_data_collator),
        DataLoader(streamed, batch_size=4, collate_fn=default_data_collator),
        strict=True,
    )
    for one, other in batches:
        assert set(one) == set(other) == {"input_ids", "labels", "segment_ids"}
        for name in one:
            assert one[name].dtype == other[name].dtype == torch.int64
            assert torch.equal(one[name], other[name])


def test_streamed_files_are_packed_while_they_are_read(folder, byte):
    blocks = list(pack(tokenize(load_text(folder, streaming=True), byte), 8))
    text = bytes(id for block in blocks for id in block["input_ids"][block["segment_ids"] >= 0] if id < 256).decode()
    assert text == "first\nsecondthirdförth"


def test_logits_of_packed_documents_equal_those_of_single_documents(byte):
    torch.manual_seed(0)
    config = DFNConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, local_window=4, initializer_range=0.5)
    model = DFNForCausalLM(config).double().eval()
    documents = Dataset.from_dict({"text": ["a packed document", "another", "and one more of them"]})
    (block,) = pack(tokenize(documents, byte), 64).with_format("torch")
    with torch.no_grad():
        packed = model(block["input_ids"][None], segment_ids=block["segment_ids"][None]).logits[0]
        merged = model(block["input_ids"][None]).logits[0]
        for segment in range(3):
            inside = block["segment_ids"] == segment
            alone = model(block["input_ids"][inside][None]).logits[0]
            torch.testing.assert_close(packed[inside], alone, rtol=0, atol=1e-9)
    assert (packed - merged)[block["segment_ids"] == 2].abs().max() > 1e-3


@pytest.mark.parametrize("block_size", [-1, 0, 1])
def test_too_small_block_size_is_rejected(block_size, byte):
    with pytest.raises(ValueError, match=f"block_size must be at least 2 .*got {block_size}"):
        pack(tokenize(Dataset.from_dict({"text": ["a"]}), byte), block_size)


def test_datasets_without_documents_or_text_column_are_rejected(byte):
    with pytest.raises(ValueError, match="holds no document"):
        tokenize(Dataset.from_dict({"text": []}), byte)
    with pytest.raises(ValueError, match="the columns .'body'. but no column 'text'"):
        tokenize(Dataset.from_dict({"body": ["a"]}), byte)
