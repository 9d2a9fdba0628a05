"""Byte language models with dynamic chunking: equal parameters, equal operations, and boundary placement."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dfn_hf import DFNConfig, DFNForCausalLM
from dfn_hf.benchmarks.baselines.models import ModelSize, build_llama, count_parameters
from dfn_hf.benchmarks.harness.flops import operations_per_token
from dfn_hf.benchmarks.quality.byte_chunking import (
    EQUAL_COMPUTE,
    MODELS,
    ByteChunkingSettings,
    build,
    byte_chunking_table,
    placement,
    run_byte_chunking,
)

SMALL = ByteChunkingSettings(
    steps=2,
    batch_size=2,
    length=64,
    hidden_size=32,
    num_hidden_layers=5,
    intermediate_size=256,
    num_entity_layers=2,
    num_sample_layers=1,
    sample_intermediate_size=128,
    sampling_hidden_size=32,
    evaluation_windows=4,
)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: build(replace(SMALL, model=name)) for name in MODELS}


def test_models_match_parameters_or_operations(models):
    target = count_parameters(models["dfn"])
    for name in set(MODELS) - set(EQUAL_COMPUTE):
        assert count_parameters(models[name]) == pytest.approx(target, rel=0.03), name
    ids = torch.zeros(1, SMALL.length, dtype=torch.long)
    cheap = operations_per_token(models["fixed spans"], ids)
    assert cheap < operations_per_token(models["dfn"], ids)
    for name in EQUAL_COMPUTE:
        assert operations_per_token(models[name], ids) == pytest.approx(cheap, rel=0.03), name
        assert count_parameters(models[name]) < target


def test_operations_per_token_counts_executed_modules():
    size = ModelSize(50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    llama, length = build_llama(size), 10
    attention = 2 * 2 * 2 * (length + 1) / 2 * 16  # products with keys and with values, per layer and token
    weights = 2 * (4 * 16 * 16 + 3 * 16 * 24) + 16 * 50
    ids = torch.zeros(3, length, dtype=torch.long)
    assert operations_per_token(llama, ids) == pytest.approx(2 * weights + attention)

    options = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_neighbors": 0, "local_window": 4}
    dfn = DFNForCausalLM(DFNConfig(**options, num_hidden_layers=1, intermediate_size=24, position_dim=3))
    maps = sum(p.numel() for name, p in dfn.named_parameters() if p.dim() == 2)  # the tied embedding once, as the head
    assert operations_per_token(dfn, ids) == pytest.approx(2 * (maps + 16 * 4) + 2 * 2 * 4 * (4 + 8))


def test_placement_counts_where_entities_begin():
    text = torch.tensor([list(b"To be, or")])

    def model(input_ids, use_cache):
        return SimpleNamespace(boundary_mask=torch.tensor([[1, 0, 1, 0, 0, 0, 1, 0, 1]]))

    model.device = "cpu"
    rate, starts, insides = placement(model, text)
    # Entities begin at byte 0 and after the bytes 0, 2 and 6.
    assert rate == pytest.approx(4 / 9) and starts == 1.0 and insides == pytest.approx(1 / 3)


def test_runs_are_stored_and_printed(tmp_path):
    path = tmp_path / "byte-chunking.csv"
    options = {
        "models": ["adaptive", "dfn"],
        "seeds": [0],
        "learning_rates": [6e-3, 1e-9],
        "search_steps": 1,
        "path": path,
    }
    finished = run_byte_chunking(SMALL, **options)
    before = path.read_text()
    assert finished == run_byte_chunking(SMALL, **options) and path.read_text() == before
    (settings, adaptive), (_, dfn) = finished
    assert settings.learning_rate == 6e-3
    assert adaptive.bytes_per_entity > 1 and dfn.bytes_per_entity == 1 and adaptive.loss > 0
    table = byte_chunking_table(finished)
    assert "| adaptive" in table and "| dfn" in table
    with pytest.raises(ValueError, match="model is 'words'"):
        build(replace(SMALL, model="words"))
