"""Tests the bundled language models: generated text, scores on held-out text, and file size."""

import re

import pytest
from transformers import pipeline, set_seed

import dfn_hf
from dfn_hf.assets.corpus import load_corpus
from dfn_hf.evaluation.language_model import evaluate_causal_lm
from dfn_hf.loading.models import load_causal_lm

PROMPTS = ("MACBETH.\nI have", "And God said", "Enter KING HENRY", "And it came to pass", "O Romeo,")
WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)*")
LONGEST_COPY = 60
MAX_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def training_text():
    return "\n".join(load_corpus("train")["text"])


@pytest.fixture(scope="module", params=["dfn-tiny", "flownetwork-tiny"])
def folder(request):
    return dfn_hf.checkpoint_path(request.param)


@pytest.fixture(scope="module")
def samples(folder):
    """Continuations of the prompts, sampled with the checkpoint's generation config."""
    set_seed(0)
    write = pipeline("text-generation", model=str(folder))
    outputs = write(list(PROMPTS), max_new_tokens=150, return_full_text=False)
    return [output[0]["generated_text"] for output in outputs]


def test_generated_words_occur_in_the_training_text(samples, training_text):
    vocabulary = {word.lower() for word in WORD.findall(training_text)}
    words = [word.lower() for sample in samples for word in WORD.findall(sample)]
    assert len(words) >= 250
    assert sum(word in vocabulary for word in words) / len(words) >= 0.85


def test_generated_text_copies_no_long_spans(samples, training_text):
    def spaced(text):
        return " ".join(text.split())

    training_text = spaced(training_text)
    for sample in map(spaced, samples):
        for start in range(max(1, len(sample) - LONGEST_COPY)):
            span = sample[start : start + LONGEST_COPY + 1]
            assert len(span) <= LONGEST_COPY or span not in training_text, span


@pytest.mark.parametrize(
    ("name", "context_length"),
    [("dfn-tiny", 256), ("dfn-bytes", 512), pytest.param("flownetwork-tiny", 256, marks=pytest.mark.slow)],
)
def test_card_states_the_score_on_held_out_text(name, context_length):
    folder = dfn_hf.checkpoint_path(name)
    model, tokenizer = load_causal_lm(str(folder))
    found = evaluate_causal_lm(model, tokenizer, load_corpus("test")["text"], context_length=context_length)
    assert f"{found.bits_per_byte:.3f} bits per byte" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["dfn-tiny", "flownetwork-tiny", "dfn-bytes"])
def test_checkpoint_is_small(name):
    assert sum(path.stat().st_size for path in dfn_hf.checkpoint_path(name).iterdir()) <= MAX_BYTES
