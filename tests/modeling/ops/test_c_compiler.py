"""Compiled C code: it is compiled once, shared by processes, and optional."""

import threading

import pytest
import torch
from transformers import DynamicCache

from dfn_hf import DFNConfig, DFNForCausalLM
from dfn_hf.modeling.ops.kernels import c_compiler
from dfn_hf.modeling.ops.kernels.box_tree_cpu import search_tree_cpu, tree_library
from dfn_hf.modeling.ops.kernels.c_compiler import compiled_library, in_threads, processor

SOURCE = "int answer(void) { return %d; }"


def homeless():
    raise RuntimeError("Could not determine home directory.")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled_library.cache_clear()
    yield tmp_path / "dfn_hf" / "kernels"
    compiled_library.cache_clear()


def test_library_is_compiled_once_per_source(folder):
    assert [compiled_library(SOURCE % number).answer() for number in (1, 2)] == [1, 2]
    built = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(built) == 2
    compiled_library.cache_clear()
    assert compiled_library(SOURCE % 1).answer() == 1
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == built


def test_each_processor_has_its_own_library(folder, monkeypatch):
    compiled_library(SOURCE % 1)
    compiled_library.cache_clear()
    monkeypatch.setattr(c_compiler, "processor", lambda: processor() + " and more")
    compiled_library(SOURCE % 1)
    assert len(list(folder.iterdir())) == 2


OBSTACLES = ("no compiler", "broken compiler", "wrong code", "no folder", "a folder open to others", "no home")


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_returns_none_if_compilation_fails(folder, obstacle, monkeypatch, tmp_path):
    source = SOURCE % 1
    if obstacle == "no compiler":
        monkeypatch.setattr(c_compiler.shutil, "which", lambda name: None)
    elif obstacle == "broken compiler":
        monkeypatch.setenv("CC", "false")
    elif obstacle == "wrong code":
        source = "int answer(void) { return"
    elif obstacle == "a folder open to others":
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    elif obstacle == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setattr(c_compiler.Path, "home", homeless)
    else:
        (tmp_path / "dfn_hf").write_text("in the way")
    assert compiled_library(source) is None


def test_compiles_without_march_native_if_unsupported(folder, monkeypatch):
    run = c_compiler.subprocess.run

    def refuse(command, **options):
        if "-march=native" in command:
            raise c_compiler.subprocess.CalledProcessError(1, command, stderr=b"unknown option")
        return run(command, **options)

    monkeypatch.setattr(c_compiler.subprocess, "run", refuse)
    assert compiled_library(SOURCE % 1).answer() == 1


def draw_model(length=50, **options):
    config = DFNConfig(**{
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
        "num_neighbors": 4, "local_window": 4, "initializer_range": 0.5,
        **options,
    })  # fmt: skip
    torch.manual_seed(0)
    return DFNForCausalLM(config), torch.randint(0, 40, (2, length))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype_for_new_tensors_changes_nothing(dtype):
    model, ids = draw_model()
    expected = model(ids).logits
    torch.set_default_dtype(dtype)
    try:
        found = model(ids).logits
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)


def test_a_default_device_for_new_tensors_changes_nothing():
    positions, index = torch.zeros(1, 5, 2, dtype=torch.int16), torch.arange(5)[None]
    arguments = tree_library(positions), positions, index, positions, 2, 1, 8, None, None, None
    expected = search_tree_cpu(*arguments)
    with torch.device("meta"):
        found = search_tree_cpu(*arguments)
    assert all(map(torch.equal, found, expected)) and found[0][0, -1].tolist() == [3, 2]


def test_window_wider_than_the_row(monkeypatch):
    model, ids = draw_model(local_window=2**15)
    with torch.no_grad():
        found = model(ids).logits
        monkeypatch.setenv("DFN_HF_KERNELS", "0")
        assert torch.allclose(found, model(ids).logits, atol=1e-5, rtol=0)


def test_storages_of_different_capacity(monkeypatch):
    model, ids = draw_model(conv_kernel=1, search_implementation="exact")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-50)
        model.config.search_implementation = "tree"
        found = model(ids[:, :20], past_key_values=cache).logits
        assert torch.allclose(found, model(ids[:, :20]).logits, atol=1e-5, rtol=0)


def test_model_gives_the_same_without_kernels(folder, monkeypatch):
    model, ids = draw_model(1200, memory_slots=2)  # long enough for a search tree

    def run():
        model.zero_grad()
        outputs = model(ids, labels=ids, use_cache=False, output_entities=True)
        outputs.loss.backward()
        return outputs, [parameter.grad.clone() for parameter in model.parameters()]

    with_it, gradients = run()
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setenv("DFN_HF_KERNELS", "0")
    without, expected = run()
    for entities, others in zip(with_it.entities, without.entities, strict=True):
        assert torch.equal(entities.neighbors, others.neighbors) and (entities.neighbors >= 0).any()
    assert torch.allclose(with_it.logits, without.logits, atol=1e-4, rtol=0)
    for found, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-4 * max(1, float(wanted.abs().max())), rtol=0)


@pytest.mark.parametrize(("rows", "threads"), [(1, 4), (5, 2), (3, 8), (7, 1), (0, 4)])
def test_threads_process_each_row_once(rows, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    done, lock = [], threading.Lock()

    def work(first, last):
        with lock:
            done.extend(range(first, last))

    in_threads(work, rows, 10**6)
    assert sorted(done) == list(range(rows))


def test_an_error_in_any_thread_is_raised(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def work(first, last):
        if first == 2:
            raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        in_threads(work, 3, 10**6)
