"""Tests the plots of flow maps and of loss curves."""

import numpy as np
import pytest
import torch

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.plots.flow_map import flow_map, plot_flow_map
from dfn_hf.plots.loss_curves import plot_loss_curves
from dfn_hf.presets import new_causal_lm

TEXT = "Double, double, toil and trouble; fire burn, and cauldron bubble. Double, double, toil and trouble."
HISTORY = [
    {"step": 0, "eval_loss": 8.0},
    {"step": 10, "loss": 7.0, "grad_norm": 1.0},
    {"step": 20, "loss": 6.0},
    {"step": 20, "eval_loss": 6.5},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bpe")


@pytest.fixture(scope="module")
def model(tokenizer):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return new_causal_lm(tokenizer, local_window=4, num_neighbors=3, **shape).eval()


@pytest.fixture(scope="module")
def flow(model, tokenizer):
    return flow_map(model, tokenizer, TEXT, layer=1, head=1)


def test_flow_map_equals_the_model_outputs(model, tokenizer, flow):
    tokens = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        outputs = model(tokens, output_entities=True)
    number = tokens.shape[1]
    assert flow.rest_positions.shape == flow.moved_positions.shape == (number, model.config.position_dim)
    assert flow.weights.sum() == pytest.approx(1, abs=1e-5)
    local = set(range(flow.reader - 3, flow.reader + 1))
    assert len(flow.far) == 3
    assert not local & set(flow.far)
    assert set(np.flatnonzero(flow.weights)) == local | set(flow.far)
    expected = outputs.entities[1].neighbors[0, 1, flow.reader].tolist()
    assert list(flow.far) == expected
    assert "".join(flow.words) == TEXT


def test_reader_is_the_last_repeated_word(flow):
    assert flow.words[flow.reader].strip() == "trouble"
    assert flow.reader > len(flow.words) - 3


def test_word_selects_the_reader(model, tokenizer):
    flow = flow_map(model, tokenizer, TEXT, word="and")
    assert flow.words[flow.reader].strip() == "and"


def test_layer_and_head_have_the_largest_weight_of_distant_neighbours(model, tokenizer):
    def far_weight(flow):
        return flow.weights[list(flow.far)].sum()

    every = [flow_map(model, tokenizer, TEXT, layer=layer, head=head) for layer in (0, 1) for head in (0, 1)]
    assert far_weight(flow_map(model, tokenizer, TEXT)) == max(map(far_weight, every))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"word": "Macbeth"}, "no token of the text"),
        ({"layer": 2}, "layers 0 to 1"),
        ({"head": -1}, "heads 0 to 1"),
        ({"text": ""}, "text is empty"),
    ],
)
def test_errors_name_the_argument(model, tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        flow_map(model, tokenizer, **{"text": TEXT, **options})


@pytest.mark.parametrize("dimensions", [None, (0, 3)])
def test_plot_has_a_line_per_neighbour(flow, dimensions, tmp_path):
    figure = plot_flow_map(flow, dimensions=dimensions, num_local=2, path=str(tmp_path / "map.png"))
    axes = figure.axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert len(lines) == len(flow.far) + 2
    written = {text.get_text() for text in axes.texts}
    assert flow.words[flow.reader].strip() in written
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_labels_do_not_overlap(flow):
    figure = plot_flow_map(flow)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert not any(first.overlaps(other) for index, first in enumerate(boxes) for other in boxes[:index])


def test_missing_dimensions_are_rejected(flow):
    with pytest.raises(ValueError, match="dimensions 0 to 3"):
        plot_flow_map(flow, dimensions=(0, 4))


def test_loss_curves_contain_both_losses_of_each_run(tmp_path):
    figure = plot_loss_curves({"dfn": HISTORY, "llama": HISTORY}, path=str(tmp_path / "loss.png"))
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[7.0, 6.0], [8.0, 6.5]] * 2
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["dfn: 6.500", "llama: 6.500"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_runs_without_a_loss_are_rejected():
    with pytest.raises(ValueError, match="histories is empty"):
        plot_loss_curves({})
    with pytest.raises(ValueError, match="the history of 'dfn' holds no loss"):
        plot_loss_curves({"dfn": [{"step": 1}]})
