"""Tests the plots of a FlowNetwork."""

import numpy as np
import pytest
import torch

from dfn_hf import DFNConfig, DFNForCausalLM, FlowNetworkConfig, FlowNetworkForCausalLM
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.plots.flows import plot_flow_matrix, plot_memory, plot_patterns, plot_windows, read_flows

TEXT = "Double, double, toil and trouble; fire burn, and cauldron bubble. It costs $5 or $6.\n\n"
LAYERS, PATTERNS, WINDOW, SLOTS, CHUNK = 2, 6, 12, 3, 8
PLOTS = (plot_patterns, plot_flow_matrix, plot_windows, plot_memory)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bpe")


def small_model(tokenizer, **options):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": LAYERS, "intermediate_size": 24, "num_patterns": PATTERNS}
    shape |= {"flow_window": WINDOW, "memory_size": SLOTS, "memory_chunk": CHUNK, **options}
    return FlowNetworkForCausalLM(FlowNetworkConfig(vocab_size=len(tokenizer), **shape)).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model(tokenizer)


@pytest.fixture(scope="module")
def reading(model, tokenizer):
    return read_flows(model, tokenizer, TEXT, layer=1)


def test_reading_equals_the_model_outputs(model, tokenizer, reading):
    tokens = torch.tensor([tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    number = tokens.shape[1]
    with torch.no_grad():
        flows = model(tokens, output_flows=True).flows
    assert "".join(reading.words) == TEXT
    np.testing.assert_array_equal(reading.matrix, flows[1].matrix[0])
    np.testing.assert_array_equal(reading.windows, torch.cat([layer.window for layer in flows]))
    np.testing.assert_array_equal(reading.fractions, torch.cat([layer.fraction for layer in flows]))
    np.testing.assert_array_equal(reading.kept[1], (reading.matrix > 0).sum(axis=1))
    assert reading.patterns.shape == (number, PATTERNS)
    np.testing.assert_allclose(reading.patterns.sum(axis=1), 1, atol=1e-5)
    assert reading.profiles.shape == (PATTERNS, WINDOW)
    assert (reading.profiles.argmax(axis=1) == 1).all()


def test_reading_contains_the_memory(model, reading):
    layer = model.model.layers[1]
    assert reading.slots.shape == (-(-len(reading.words) // CHUNK), SLOTS, 16)
    np.testing.assert_array_equal(reading.slots[0], layer.sequence_memory.initial_slots.detach())
    assert np.abs(reading.slots[-1] - reading.slots[0]).max() > 1e-3
    np.testing.assert_array_equal(reading.bank, model.model.memory.memory_bank)
    assert reading.bank_shares.sum() == pytest.approx(1, abs=1e-5)
    assert [len(words) for words in reading.bank_words] == [4] * SLOTS


def test_reading_does_not_change_the_model(tokenizer):
    model = small_model(tokenizer).train()
    bank = model.model.memory.memory_bank.clone()
    read_flows(model, tokenizer, TEXT)
    model.commit_memory()
    assert torch.equal(model.model.memory.memory_bank, bank)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("plot", PLOTS)
def test_plots(model, tokenizer, plot, repeats, tmp_path):
    reading = read_flows(model, tokenizer, TEXT * repeats)
    figure = plot(reading, path=str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    if plot is not plot_memory:
        labels = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]
        assert ("trouble" in labels) == (repeats == 1)


def test_zeros_of_the_flow_matrix_are_blank(reading):
    image = plot_flow_matrix(reading).axes[0].images[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(image), reading.matrix == 0)


def test_window_plot_has_a_line_per_layer(reading):
    panels = plot_windows(reading).axes
    for axes, values in zip(panels, (reading.windows, reading.fractions, reading.kept), strict=True):
        np.testing.assert_array_equal([line.get_ydata() for line in axes.lines], values)


def test_memory_plot_of_a_short_text(model, tokenizer):
    plot_memory(read_flows(model, tokenizer, "Double"))


def test_model_with_one_pattern_and_without_memory(tokenizer):
    reading = read_flows(small_model(tokenizer, memory_size=0, num_patterns=1), tokenizer, TEXT)
    assert reading.slots is None and reading.bank is None
    for plot in PLOTS[:3]:
        plot(reading)
    with pytest.raises(ValueError, match="has no memory"):
        plot_memory(reading)


@pytest.mark.parametrize(("options", "words"), [({"text": ""}, "text is empty"), ({"layer": 2}, "layers 0 to 1")])
def test_errors_name_the_argument(model, tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        read_flows(model, tokenizer, **{"text": TEXT, **options})


def test_other_models_are_rejected(tokenizer):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 24}
    with pytest.raises(ValueError, match="model is a 'dfn': give a FlowNetwork"):
        read_flows(DFNForCausalLM(DFNConfig(vocab_size=len(tokenizer), **shape)), tokenizer, TEXT)
