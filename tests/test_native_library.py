"""Native code: built once, shared by processes, and never needed."""

import threading

import pytest
import torch

from dfn_hf import DFNConfig, DFNForCausalLM
from dfn_hf.modeling import native_library as module
from dfn_hf.modeling.native_library import in_threads, native_library, processor

SOURCE = "int answer(void) { return %d; }"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library.cache_clear()
    yield tmp_path / "dfn_hf" / "native"
    native_library.cache_clear()


def test_is_built_once_and_named_by_what_it_was_built_from(folder):
    assert [native_library(SOURCE % number).answer() for number in (1, 2)] == [1, 2]
    built = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(built) == 2
    native_library.cache_clear()
    assert native_library(SOURCE % 1).answer() == 1
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == built


def test_another_processor_gets_a_library_of_its_own(folder, monkeypatch):
    native_library(SOURCE % 1)
    native_library.cache_clear()
    monkeypatch.setattr(module, "processor", lambda: processor() + " and more")
    native_library(SOURCE % 1)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("obstacle", ["no compiler", "broken compiler", "wrong code", "no folder"])
def test_where_it_cannot_be_built_there_is_none(folder, obstacle, monkeypatch, tmp_path):
    source = SOURCE % 1
    if obstacle == "no compiler":
        monkeypatch.setattr(module.shutil, "which", lambda name: None)
    elif obstacle == "broken compiler":
        monkeypatch.setenv("CC", "false")
    elif obstacle == "wrong code":
        source = "int answer(void) { return"
    else:
        (tmp_path / "dfn_hf").write_text("in the way")
    assert native_library(source) is None


def test_a_model_without_it_gives_the_same(folder, monkeypatch):
    config = DFNConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        num_neighbors=4, local_window=4, num_tables=3, candidates_per_table=3, memory_slots=2, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DFNForCausalLM(config)
    ids = torch.randint(0, 40, (2, 50))

    def run():
        model.zero_grad()
        outputs = model(ids, labels=ids, use_cache=False, output_entities=True)
        outputs.loss.backward()
        return outputs, [parameter.grad.clone() for parameter in model.parameters()]

    with_it, gradients = run()
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setenv("DFN_HF_NATIVE", "0")
    without, expected = run()
    for entities, others in zip(with_it.entities, without.entities, strict=True):
        assert torch.equal(entities.neighbors, others.neighbors) and (entities.neighbors >= 0).any()
    assert torch.allclose(with_it.logits, without.logits, atol=1e-4, rtol=0)
    for found, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-4 * max(1, float(wanted.abs().max())), rtol=0)


@pytest.mark.parametrize(("rows", "threads"), [(1, 4), (5, 2), (3, 8), (7, 1), (0, 4)])
def test_threads_share_the_rows(rows, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    done, lock = [], threading.Lock()

    def work(first, last):
        with lock:
            done.extend(range(first, last))

    in_threads(work, rows, 10**6)
    assert sorted(done) == list(range(rows))
