"""The choice between C, Triton and torch, and its log line."""

import pytest
import torch

from dfn_hf.modeling.ops import dispatch
from dfn_hf.modeling.ops.box_tree import TreeIndex, index_layout

COUNTERS = torch.zeros(2, 4, dtype=torch.int32)
FLAT = TreeIndex(COUNTERS, leaf_ids=COUNTERS, leaf_boxes=COUNTERS)
PAGED = TreeIndex(COUNTERS, leaves=COUNTERS, leaf_pages=COUNTERS, cuts=COUNTERS, pages=COUNTERS)


def search_backend(index=None):
    return dispatch.search_backend(torch.zeros(2, 5, 3, dtype=torch.int16), index)


def attention_backend(dtype=torch.float32, value_dtype=torch.float32, dropout=0.0):
    query, key = torch.zeros(2, 1, 2, 5, 4, dtype=dtype)
    value = torch.zeros(1, 2, 5, 6, dtype=value_dtype)
    return dispatch.attention_backend(query, key, value, torch.zeros(2, dtype=dtype), dropout)


def test_c_runs_on_a_cpu(monkeypatch):
    monkeypatch.setenv("DFN_HF_KERNELS", "1")
    assert search_backend() == search_backend(PAGED) == attention_backend() == "c"
    assert index_layout(torch.device("cpu"), 3) == "paged"


def test_torch_reads_an_index_that_it_filled(monkeypatch):
    monkeypatch.setenv("DFN_HF_KERNELS", "0")
    assert index_layout(torch.device("cpu"), 3) == "flat"
    for switch in ("0", "1"):
        monkeypatch.setenv("DFN_HF_KERNELS", switch)
        assert search_backend(FLAT) == "torch"


def test_an_index_of_the_c_code_needs_it(monkeypatch):
    monkeypatch.setenv("DFN_HF_KERNELS", "0")
    with pytest.raises(RuntimeError, match="DFN_HF_KERNELS is 0.*start with an empty cache"):
        search_backend(PAGED)


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"value_dtype": torch.bfloat16}, {"dropout": 0.1}])
def test_unsupported_attention_runs_in_torch(options):
    assert attention_backend(**options) == "torch"


def test_triton_runs_if_available(monkeypatch):
    monkeypatch.setenv("DFN_HF_KERNELS", "0")
    monkeypatch.setattr(dispatch, "triton_available", lambda device: True)
    assert search_backend() == search_backend(FLAT) == attention_backend() == "triton"
    assert attention_backend(value_dtype=torch.bfloat16) == "triton"
    assert attention_backend(dropout=0.1) == "torch"
    monkeypatch.setattr(dispatch, "MAX_TRITON_OFFSET", 14)  # a row has 15 numbers
    assert search_backend() == "torch"


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
