"""The exact searches of the ranking benchmark."""

import pytest
import torch

from dfn_hf import DFNConfig, DFNModel
from dfn_hf.benchmarks.quality.neighbor_ranking import NO_NEIGHBORS, RANKINGS, largest_logits, searched_by
from dfn_hf.modeling.dfn.attention import DynamicFlowAttention
from dfn_hf.modeling.modules.row_layout import make_row_layout
from dfn_hf.modeling.ops.box_tree import GRID
from dfn_hf.modeling.ops.neighbor_search import nearest_predecessors


@pytest.mark.parametrize(("fades", "has_influence"), [(False, False), (True, False), (True, True)])
def test_largest_logits_equal_a_loop(fades, has_influence):
    torch.manual_seed(0)
    batch, heads, length, window, wanted = 2, 2, 300, 5, 7
    query, key = torch.randn(2, batch, heads, length, 3, dtype=torch.float64)
    sharpness, fading = torch.rand(2, heads, dtype=torch.float64)
    influence = torch.randn(batch, heads, length, dtype=torch.float64)
    found = largest_logits(
        query, key, sharpness, fading if fades else None, influence if has_influence else None, wanted, window
    )
    for row, head, i in [(0, 0, 3), (0, 1, 5), (1, 0, 9), (1, 1, 280), (0, 1, 299)]:
        logits = []
        for j in range(i - window + 1):
            logit = -sharpness[head] * (query[row, head, i] - key[row, head, j]).square().sum()
            if fades:
                logit = logit - fading[head] * torch.tensor(1.0 + i - j, dtype=torch.float64).log()
            if has_influence:
                logit = logit + influence[row, head, j]
            logits.append(logit.item())
        expected = sorted(range(len(logits)), key=lambda j: -logits[j])[:wanted]
        assert found[row, head, i].tolist() == expected + [-1] * (wanted - len(expected))


def test_rankings_replace_the_search():
    config = DFNConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_neighbors=4)
    model, tokens = DFNModel(config).eval(), torch.randint(40, (1, 120))
    search = DynamicFlowAttention.search_neighbors
    torch.manual_seed(0)
    query, key = torch.randint(-200, 200, (2, 1, 2, 120, 4)) / GRID
    rows = make_row_layout(1, 120, query.device)

    def neighbors(ranking):
        with searched_by(ranking):
            model(tokens, use_cache=False)
            return model.layers[0].attention.search_neighbors(query, key, rows, None)

    expected, _ = nearest_predecessors(query, key, 4, window=config.local_window)
    assert torch.equal(neighbors(RANKINGS[0]), expected)
    assert neighbors(NO_NEIGHBORS).shape == (1, 2, 120, 0)
    for ranking in RANKINGS[1:]:
        assert not torch.equal(neighbors(ranking), expected)
    assert DynamicFlowAttention.search_neighbors is search
