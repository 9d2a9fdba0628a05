"""Tests reading of JSON Lines: every invalid line raises an error that names the file and the line."""

import json

import pytest

from dfn_hf.data.pairs import load_pairs
from dfn_hf.data.text import load_text

GOOD = '{"text": "good", "source": "good", "target": "bueno"}\n'
LINES = {
    '{"text": "bad \\ud83d", "source": "bad \\ud83d", "target": "x"}': r"contains \\ud83d, a lone surrogate",
    '{"text": "bad \\udc00", "source": "a", "target": "bad \\udc00"}': r"contains \\udc00, a lone surrogate",
    '{"a":' * 100_000 + "1" + "}" * 100_000: "nests too deeply",
    "[" * 100_000: "nests too deeply",
    '{"n": ' + "9" * 5000 + "}": "is not JSON .*4300 digits",
    "[" + "9" * 5000 + "]": "is not JSON .*4300 digits",
    '{"text": null, "source": null}': "is None: give a string",
    '{"text": [1], "source": {}}': "give a string",
    '{"text": 1e999, "source": NaN}': "give a string",
    "{}": "has no field 'text', only {}|has no field 'source', only {}",
    '"text"': "is not a JSON object",
    "\0": "is not JSON",
    json.dumps({f"field {number}": number for number in range(1000)}): "'field 9', …",
    json.dumps({"x" * 10**6: 1}): "only 'xxx.*xxx'",
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(("line", "message"), LINES.items(), ids=range(len(LINES)))
@pytest.mark.parametrize("load", [load_text, load_pairs, lambda path: list(load_text(path, streaming=True))])
def test_invalid_lines_are_named(tmp_path, line, message, load):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 3 + line + "\n" + GOOD)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 4.*({message})") as caught:
        load(path)
    assert len(str(caught.value)) < 1000


def test_surrogate_pairs_are_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert load_text(tmp_path)["text"][:] == ["😀"]
