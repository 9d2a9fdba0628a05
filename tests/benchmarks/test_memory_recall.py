"""Recall with FlowNetwork's memory: an answer beyond the reach of its windows, queried later in the row."""

from itertools import islice

import pytest
import torch
from transformers import DynamicCache

from dfn_hf.benchmarks.datasets.mqar import IGNORED
from dfn_hf.benchmarks.recall.memory_recall import (
    ANSWER_POSITIONS,
    QUERIES,
    MemoryRecallSettings,
    memory_recall_accuracy,
    memory_recall_batches,
    train_memory_recall,
)
from dfn_hf.modeling.modules.cache import CACHE_NAME


def test_rows_have_one_answer_far_before_every_query():
    settings = MemoryRecallSettings()
    assert settings.distance > settings.reach > settings.num_hidden_layers * settings.flow_window
    query = settings.answers + settings.fillers
    for batch in islice(memory_recall_batches(settings, seed=0), 3):
        ids, labels = batch["input_ids"], batch["labels"]
        is_answer = ids < settings.answers
        assert (is_answer.sum(dim=1) == 1).all() and not is_answer[:, ANSWER_POSITIONS:].any()
        asked = labels[:, 1:] != IGNORED
        assert torch.equal(asked, ids[:, :-1] == query) and (asked.sum(dim=1) == QUERIES).all()
        assert not asked[:, : settings.length // 2].any()
        answers = ids[is_answer][:, None].expand_as(labels[:, 1:])
        assert torch.equal(labels[:, 1:][asked], answers[asked])


def test_rows_depend_only_on_the_seed():
    settings = MemoryRecallSettings()
    first, same, other = (next(memory_recall_batches(settings, seed))["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.slow
@pytest.mark.parametrize(("memory_size", "least", "most"), [(8, 0.95, 1.0), (0, 0.0, 0.1)])
def test_only_a_model_with_memory_recalls_the_answer(memory_size, least, most):
    settings = MemoryRecallSettings(memory_size=memory_size)
    model = train_memory_recall(settings)
    assert least <= memory_recall_accuracy(model, settings) <= most
    model = model.double()
    ids = next(memory_recall_batches(settings, seed=1))["input_ids"]
    half = settings.length // 2
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids).logits
        pieces = [model(piece, **{CACHE_NAME: cache}).logits for piece in ids.split([half] + [1] * half, dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-9, rtol=0)
