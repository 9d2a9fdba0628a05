"""The benchmark of the neighbour search alone."""

import dataclasses
import math

import pytest
import torch

from dfn_hf.benchmarks.speed import tree_search
from dfn_hf.benchmarks.speed.tree_search import SHAPES, SearchResult, SearchSettings

SMALL = SearchSettings(length=1800, timed_queries=100, compared_queries=60, num_leaves=2, repeats=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("position_dim", [2, 5])
def test_positions_depend_on_the_seed_alone_and_lie_on_the_ball(shape, position_dim):
    settings = dataclasses.replace(SMALL, shape=shape, position_dim=position_dim)
    key, query = tree_search.draw_positions(settings)
    assert key.shape == query.shape == (1, SMALL.length, position_dim) and key.dtype == torch.int16
    assert all(map(torch.equal, (key, query), tree_search.draw_positions(settings)))
    margin = 5 * 64 * tree_search.QUERY_BLUR
    assert max(key.abs().max(), query.abs().max()) <= 64 * tree_search.EXTENT + margin
    assert shape == "one place" or key.unique(dim=1).shape[1] > 200


def test_drifts_rise_along_the_row():
    for shape, axes in (("drift on one axis", 1), ("drift on all axes", 3)):
        key, _ = tree_search.draw_positions(dataclasses.replace(SMALL, shape=shape, position_dim=3))
        start, end = (part.float().mean(dim=1)[0] for part in (key[:, :200], key[:, -200:]))
        assert ((end - start) > 100).tolist() == [axis < axes for axis in range(3)]


def test_recall_counts_the_exact_neighbours_that_are_found():
    exact = torch.tensor([[[3, 1], [5, -1]]])
    assert tree_search.recall(torch.tensor([[[3, 2], [5, -1]]]), exact) == pytest.approx(2 / 3)
    assert tree_search.recall(torch.tensor([[[2, 1], [5, 4]]]), exact[..., :1]) == pytest.approx(1 / 2)
    assert math.isnan(tree_search.recall(exact, torch.full_like(exact, -1)))


@pytest.mark.parametrize("shape", SHAPES)
def test_all_leaves_find_every_neighbour_and_few_leaves_fewer(shape):
    settings = dataclasses.replace(SMALL, shape=shape, position_dim=6)
    every = tree_search.measure_search(dataclasses.replace(settings, num_leaves=1000))
    assert every.recall == every.recall_at_1 == 1
    few = tree_search.measure_search(settings)
    assert few.recall == 1 if shape == "one place" else few.recall < 1 if shape == "uniform" else few.recall <= 1
    assert few.microseconds > 0 and few.index_bytes > 0


def test_timed_queries_are_searched_in_the_tree_of_the_whole_row():
    key, query = tree_search.draw_positions(SMALL)
    index = tree_search.empty_index(SMALL)
    tree_search.search_last(SMALL, query[:, : -SMALL.timed_queries], key, 1, index)
    found = tree_search.search_last(SMALL, query, key, SMALL.timed_queries, index)
    whole = tree_search.search_last(SMALL, query, key, SMALL.length, tree_search.empty_index(SMALL))
    assert torch.equal(found, whole[:, -SMALL.timed_queries :])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timed_queries": 50}, "timed_queries is 50: choose at least 60"),
        ({"shape": "ring"}, "shape is 'ring': choose one of uniform"),
        ({"length": 100}, "length is 100: choose more than timed_queries .100."),
    ],
)
def test_impossible_settings_are_rejected_before_the_first_run(changes, words, tmp_path, monkeypatch):
    monkeypatch.setattr(tree_search, "measure_search", None)
    runs = [SMALL, dataclasses.replace(SMALL, **changes)]
    with pytest.raises(ValueError, match=words):
        tree_search.run_search(runs, tmp_path / "search.csv")


def test_the_table_has_one_row_per_run():
    runs = tree_search.search_runs(SMALL, shapes=["uniform", "clusters"], position_dims=[4, 8], lengths=[5000])
    result = SearchResult(recall=0.5, recall_at_1=0.25, microseconds=1.5, index_bytes=12.0, machine="m")
    lines = tree_search.search_table([(run, result) for run in runs]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][4] == "recall@16" and len(cells) == 6
    assert cells[3] == ["uniform", "8", "5,000", "2", "0.500", "0.250", "1.50", "12.0"]
