"""Tests the bundled verse pairs: content, no overlap between splits, and the script that builds them."""

import re

import pytest

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.assets.verses import SPLITS, load_verses
from tests.support.scripts import load_script

build_verses = load_script("scripts/build_verses.py")


def runs_of_eight_words(text):
    words = text.lower().split()
    return {" ".join(words[start : start + 8]) for start in range(len(words) - 7)}


def book_of(verse):
    return verse.rsplit(" ", 1)[0]


def test_splits_are_by_book_and_pairs_are_clean():
    books = {split: set(map(book_of, load_verses(split)["verse"])) for split in SPLITS}
    assert [len(books[split]) for split in SPLITS] == [56, 5, 5]
    assert len(set.union(*books.values())) == 66
    assert [len(load_verses(split)) for split in SPLITS] == [29_919, 468, 671]
    for split in SPLITS:
        for pair in load_verses(split):
            for text in (pair["source"], pair["target"]):
                assert text == build_verses.strip_markup(text)
                assert not re.search("[<>¶]", text)
            assert 1 / build_verses.MAX_RATIO <= len(pair["source"]) / len(pair["target"]) <= build_verses.MAX_RATIO


@pytest.mark.parametrize("side", ["source", "target"])
def test_held_out_books_hardly_overlap_the_train_split(side):
    seen = set().union(*map(runs_of_eight_words, load_verses("train")[side]))
    for split in ("validation", "test"):
        runs = [run for text in load_verses(split)[side] for run in runs_of_eight_words(text)]
        assert sum(run in seen for run in runs) / len(runs) <= 0.0035


def test_tokenizer_restores_both_languages_and_appends_the_end_token():
    tokenizer = load_tokenizer("bpe-en-es")
    assert len(tokenizer) == 8000
    for pair in load_verses("test").select(range(40)):
        for text in (pair["source"], pair["target"]):
            ids = tokenizer(text)["input_ids"]
            assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    lengths = [len(ids) for ids in tokenizer(list(load_verses("test")["target"]))["input_ids"]]
    assert sum(lengths) / len(lengths) < 50


def test_unknown_split_is_rejected():
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_verses("dev")


MADE_OF = """$$$[ Module Heading ]

$$$Genesis 1:0
<chapter n="1"/>
$$$Genesis 1:1
<title>Of the beginning</title><w lemma="strong:H0430">In</w> the beginning<note>A <i>note</i>.</note>, God ¶
created.
$$$I Samuel 1:1
{}
$$$Ruth 1:2
&lt;A short one
"""


def test_build_strips_markup_and_skips_unmatched_verses(tmp_path):
    english, spanish = tmp_path / "web.imp", tmp_path / "rv.imp"
    english.write_text(MADE_OF.format("A verse"))
    spanish.write_text(MADE_OF.format("A verse more than three times as long"))
    assert build_verses.read_verses(english)["Genesis", 1, 1] == "In the beginning, God created."
    assert build_verses.read_verses(english)["Ruth", 1, 2] == "<A short one"
    build_verses.build(english, spanish, tmp_path)
    assert {path.name for path in tmp_path.glob("*.bz2")} == {f"{split}.jsonl.bz2" for split in SPLITS}
    with pytest.raises(ValueError, match="holds no verse"):
        empty = tmp_path / "empty.imp"
        empty.write_text("")
        build_verses.read_verses(empty)
