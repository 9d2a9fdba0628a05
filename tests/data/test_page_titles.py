"""Pairs from HTML pages: what is taken, what is left out, and that a test title is never trained on."""

import json

import pytest

from dfn_hf import page_titles
from dfn_hf.page_titles import MAX_CHARACTERS, build, is_test, read_pairs

PAGE = """<html><head><title>no</title></head><body><p>header</p>
<h1><a name="x"></a>Opening
 Documents</h1> <p>Do <b>one</b> &amp; both.</p><h2>Section</h2><p> </p><p>Then
 open.</p><h1>Second heading</h1></body></html>"""


def test_a_pair_is_the_paragraphs_below_the_first_heading_and_that_heading(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/page.html").write_text(PAGE)
    (tmp_path / "again.html").write_text(PAGE)
    (tmp_path / "empty.html").write_text("<h1>Only a heading</h1>")
    (tmp_path / "long.html").write_text(f"<h1>Long</h1><p>Short.</p><p>{'x' * MAX_CHARACTERS}</p><p>Not this.</p>")
    assert read_pairs(tmp_path) == [
        {"source": "Do one & both. Then open.", "target": "Opening Documents"},
        {"source": "Short.", "target": "Long"},
    ]


def test_titles_are_either_trained_on_or_tested(tmp_path, capsys):
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in range(200):
        (pages / f"{number}.html").write_text(f"<h1>Page {number // 2}</h1><p>Text {number}.</p>")
    build(pages, tmp_path / "pairs")
    train, test = (
        [json.loads(line) for line in (tmp_path / f"pairs/{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    assert len(train) + len(test) == 200 and 0 < len(test) < 50
    assert not {pair["target"] for pair in train} & {pair["target"] for pair in test}
    assert is_test("PAGE 1") == is_test("page 1")
    assert capsys.readouterr().out.split("\n")[0] == f"train: {len(train)} pairs"


def test_what_cannot_be_read_is_said_and_nothing_is_overwritten(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no \.html page with a heading"):
        read_pairs(tmp_path)
    (tmp_path / "page.html").write_text(PAGE)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        build(tmp_path, kept)
    monkeypatch.setattr(page_titles, "read_pairs", lambda folder: [{"source": "\ud800", "target": "x"}])
    with pytest.raises(UnicodeEncodeError):
        build(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists() and (kept / "mine.txt").read_text() == "mine"
