"""The choice between C, Triton and torch, and its log line."""

import pytest
import torch

from dfn_hf.modeling.ops import dispatch

INDEX = torch.arange(5).expand(2, -1)


def search_backend(dtype=torch.float32, num_neighbors=3, candidates_per_table=4, **options):
    options = {"addressed": True, "with_chains": False, **options}
    return dispatch.search_backend(
        torch.zeros(2, 5, 3, dtype=dtype), INDEX, 2, candidates_per_table, num_neighbors, **options
    )


def attention_backend(dtype=torch.float32, value_dtype=torch.float32, dropout=0.0):
    query, key = torch.zeros(2, 1, 2, 5, 4, dtype=dtype)
    value = torch.zeros(1, 2, 5, 6, dtype=value_dtype)
    return dispatch.attention_backend(query, key, value, torch.zeros(2, dtype=dtype), dropout)


def test_c_runs_on_a_cpu(monkeypatch):
    monkeypatch.setenv("DFN_HF_KERNELS", "1")
    positions = torch.zeros(2, 5, 3)
    assert dispatch.cells_backend(positions, on_grid=True) == search_backend() == attention_backend() == "c"
    assert dispatch.cells_backend(positions, on_grid=False) == "torch"
    assert search_backend(with_chains=True) == "c"


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float64},
        {"addressed": False},
        {"num_neighbors": 2**14 + 1},
        {"candidates_per_table": 2**14 + 1},
    ],
)
def test_unsupported_searches_run_in_torch(options):
    assert search_backend(**options) == "torch"


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"value_dtype": torch.bfloat16}, {"dropout": 0.1}])
def test_unsupported_attention_runs_in_torch(options):
    assert attention_backend(**options) == "torch"


def test_triton_runs_if_available(monkeypatch):
    monkeypatch.setenv("DFN_HF_KERNELS", "0")
    monkeypatch.setattr(dispatch, "triton_available", lambda device: True)
    assert dispatch.cells_backend(torch.zeros(2, 5, 3), on_grid=True) == "triton"
    assert search_backend() == search_backend(with_chains=True) == attention_backend() == "triton"
    assert attention_backend(value_dtype=torch.bfloat16) == "triton"
    assert search_backend(candidates_per_table=512) == attention_backend(dropout=0.1) == "torch"
    monkeypatch.setattr(f"{__name__}.INDEX", INDEX + 7)  # a call with a past
    assert search_backend() == "triton" and search_backend(with_chains=True) == "torch"


def test_each_choice_is_logged_once_with_its_reason(monkeypatch):
    messages = []
    monkeypatch.setattr(dispatch.logger, "info", messages.append)
    dispatch._log_once.cache_clear()
    for _ in range(2):
        for switch in ("1", "0"):
            monkeypatch.setenv("DFN_HF_KERNELS", switch)
            search_backend()
        monkeypatch.setenv("DFN_HF_KERNELS", "1")
        attention_backend(dropout=0.1)
    dispatch._log_once.cache_clear()
    assert messages == [
        "On cpu, the neighbour search runs in C.",
        "On cpu, the neighbour search runs in torch operations: DFN_HF_KERNELS is 0.",
        "On cpu, flow attention runs in torch operations: "
        "the kernels do not support the dtype, the sizes or an option of this call.",
    ]
