"""Tests the plots of a Liquid."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.plots.liquid import plot_compression, plot_cross_attention, plot_experts, plot_spectra, read_translation
from dfn_hf.presets import new_causal_lm
from dfn_hf.seq2seq_presets import new_seq2seq_lm

TEXT = "In the beginning God created the heavens and the earth; it costs $5 or $6, and cauldrons bubble."
FRAME, WRITTEN, EXPERTS = 8, 6, 3


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bpe-en-es")


@pytest.fixture(scope="module")
def model(tokenizer):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_decoder_layers": 2, "frame_length": FRAME}
    return new_seq2seq_lm(tokenizer, num_experts=EXPERTS, initializer_range=1.0, **shape).eval()


@pytest.fixture(scope="module")
def reading(model, tokenizer):
    return read_translation(model, tokenizer, TEXT, max_new_tokens=WRITTEN)


def test_reading_equals_the_model_outputs(model, tokenizer, reading):
    inputs = tokenizer([TEXT], return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=WRITTEN)
    length = inputs["input_ids"].shape[1]
    assert "".join(reading.source[:-1]) == TEXT
    assert reading.target == [tokenizer.decode([token]) for token in written[0, 1:].tolist()]
    with torch.no_grad():
        outputs = model(**inputs, decoder_input_ids=written[:, :-1], output_attentions=True)
    target = written.shape[1] - 1
    assert reading.cross_attention.shape == (2, target, length)
    np.testing.assert_allclose(reading.cross_attention[1], outputs.cross_attentions[1][0].mean(dim=0), atol=1e-6)
    np.testing.assert_allclose(reading.cross_attention.sum(axis=-1), 1, atol=1e-5)
    assert reading.source_experts.shape == (1, length, EXPERTS)
    assert reading.target_experts.shape == (2, target, EXPERTS)
    np.testing.assert_allclose(reading.target_experts.sum(axis=-1), 1, atol=1e-5)


def test_spectra_are_those_of_the_embedding(model, tokenizer, reading):
    spectra = reading.spectra
    assert spectra.bands == [0, FRAME // 2 + 1]
    assert spectra.before.shape == spectra.after.shape == (len(spectra.ratios) + 1, FRAME // 2 + 1)
    config = model.config
    assert (spectra.ratios >= config.min_compression_ratio).all() and (spectra.ratios <= 1).all()
    inputs = tokenizer([TEXT], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, decoder_input_ids=torch.tensor([[0]]), output_router_logits=True)
    assert spectra.ratios.mean() == pytest.approx(outputs.metrics["compression_ratio"].item(), abs=1e-6)


def test_short_text_has_one_frame(model, tokenizer):
    spectra = read_translation(model, tokenizer, "the", max_new_tokens=2).spectra
    assert spectra.before.shape == (1, FRAME // 2 + 1) and spectra.ratios.shape == (1,)


@pytest.mark.parametrize("plot", [plot_cross_attention, plot_spectra, plot_experts])
def test_plots_are_saved(plot, reading, tmp_path):
    plot(reading, path=str(tmp_path / "picture.png"))
    assert imread(tmp_path / "picture.png")[..., :3].std() > 0.02


def test_compression_plot_of_several_texts(reading, tmp_path):
    figure = plot_compression({"one $": reading, "another": reading}, path=str(tmp_path / "picture.png"))
    bars = [patch.get_width() for patch in figure.axes[0].patches]
    assert bars == pytest.approx([reading.spectra.ratios.mean()] * 2)


def test_errors_name_the_argument(tokenizer, model):
    with pytest.raises(ValueError, match="model is a 'dfn'"):
        read_translation(new_causal_lm(tokenizer, hidden_size=16, num_hidden_layers=1), tokenizer, TEXT)
    with pytest.raises(ValueError, match="text is empty"):
        read_translation(model, tokenizer, " ")
