"""The mutators are pure: the same seed gives the same bytes, and each changes its input."""

import json
import random

import pytest
import torch
from safetensors.torch import save

from tests.campaigns import mutations

CONTENT = json.dumps({"a": 1, "b": [1, {"c": "text"}], "d": {"e": None}}).encode()
WEIGHTS = save({"first": torch.zeros(2, 3), "second": torch.ones(4)})
SOURCES = {
    "mutate_bytes": CONTENT,
    "mutate_json": CONTENT,
    "mutate_json_text": CONTENT,
    "mutate_safetensors": WEIGHTS,
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_seed_gives_the_same_mutation(name):
    mutate, source = getattr(mutations, name), SOURCES[name]
    first = [mutate(source, random.Random(seed)) for seed in range(300)]
    assert first == [mutate(source, random.Random(seed)) for seed in range(300)]
    assert len(set(first)) > 10 and sum(one != source for one in first) > 250


@pytest.mark.parametrize("content", (b"", b"x"))
def test_short_files_are_mutated_too(content):
    for seed in range(200):
        assert isinstance(mutations.mutate_bytes(content, random.Random(seed)), bytes)


def test_one_field_is_replaced_or_removed():
    values = [json.loads(mutations.mutate_json_field(CONTENT, "a", random.Random(seed))) for seed in range(50)]
    assert all(value["b"] == [1, {"c": "text"}] for value in values)
    assert any("a" not in value for value in values)
