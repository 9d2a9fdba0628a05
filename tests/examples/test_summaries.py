"""Tests examples/summaries.py: the pairs, and splits without common titles."""

import json

import pytest

from tests.support.scripts import load_script

summaries = load_script("examples/summaries.py")

PAGE = """<html><head><title>no</title></head><body><p>header</p>
<h1><a name="x"></a>Opening
 Documents</h1> <p>Do <b>one</b> &amp; both.</p><h2>Section</h2><p> </p><p>Then
 open.</p><h1>Second heading</h1></body></html>"""


def test_pair_is_the_first_paragraphs_and_the_heading(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/page.html").write_text(PAGE)
    (tmp_path / "again.html").write_text(PAGE)
    (tmp_path / "empty.html").write_text("<h1>Only a heading</h1>")
    long_paragraph = "x" * summaries.MAX_CHARACTERS
    (tmp_path / "long.html").write_text(f"<h1>Long</h1><p>Short.</p><p>{long_paragraph}</p><p>Not this.</p>")
    assert summaries.read_pairs(tmp_path) == [
        {"source": "Do one & both. Then open.", "target": "Opening Documents"},
        {"source": "Short.", "target": "Long"},
    ]


def test_splits_have_no_title_in_common(tmp_path, capsys):
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in range(200):
        (pages / f"{number}.html").write_text(f"<h1>Page {number // 2}</h1><p>Text {number}.</p>")
    summaries.build(pages, tmp_path / "pairs")
    train, test = (
        [json.loads(line) for line in (tmp_path / f"pairs/{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    assert len(train) + len(test) == 200 and 0 < len(test) < 50
    assert not {pair["target"] for pair in train} & {pair["target"] for pair in test}
    assert summaries.is_test("PAGE 1") == summaries.is_test("page 1")
    assert capsys.readouterr().out.split("\n")[0] == f"train: {len(train)} pairs"


def test_errors_overwrite_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no \.html page with a heading"):
        summaries.read_pairs(tmp_path)
    (tmp_path / "page.html").write_text(PAGE)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        summaries.build(tmp_path, kept)
    monkeypatch.setattr(summaries, "read_pairs", lambda folder: [{"source": "\ud800", "target": "x"}])
    with pytest.raises(UnicodeEncodeError):
        summaries.build(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists() and (kept / "mine.txt").read_text() == "mine"
