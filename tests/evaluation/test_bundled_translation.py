"""Tests the bundled translation model: scores on held-out books, dependence on the source, and file size."""

import re

import pytest

import dfn_hf
from dfn_hf.assets.verses import load_verses
from dfn_hf.evaluation.translation import score_translations, shuffle_sources, translate
from dfn_hf.loading.models import load_seq2seq_lm

MAX_BYTES = 12 * 2**20
MIN_GAIN = 10  # chrF over shuffled sources
PROCESSORS_DIFFER = 0.2  # points; rounding differs between processors and can change near ties in beam search


@pytest.fixture(scope="module")
def folder():
    return dfn_hf.checkpoint_path("liquid-tiny")


@pytest.fixture(scope="module")
def translator(folder):
    return load_seq2seq_lm(str(folder))


@pytest.fixture(scope="module")
def verses():
    test = load_verses("test")
    return list(test["source"]), list(test["target"])


@pytest.mark.slow  # translates 671 verses with beams
def test_card_states_the_scores_on_held_out_books(folder, translator, verses):
    sources, references = verses
    scores = score_translations(translate(*translator, sources), references)
    card = (folder / "README.md").read_text(encoding="utf-8")
    chrf, bleu = map(float, re.search(r"chrF ([\d.]+) and BLEU ([\d.]+)", card).groups())
    assert abs(scores.chrf - chrf) < PROCESSORS_DIFFER and abs(scores.bleu - bleu) < PROCESSORS_DIFFER


def test_translation_depends_on_the_source(translator, verses):
    sources, references = (side[:96] for side in verses)
    read, blind = (
        score_translations(translate(*translator, texts, num_beams=1), references).chrf
        for texts in (sources, shuffle_sources(sources))
    )
    assert read >= blind + MIN_GAIN


def test_checkpoint_is_small(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES
