"""The Triton kernels against torch and a loop, on a GPU or else in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from dfn_hf.modeling.ops import dispatch
from dfn_hf.modeling.ops.cell_grid import GRID, ball_cells_per_axis, geometric_cell_sizes
from dfn_hf.modeling.ops.cell_lists import CellGrids, grid_constants
from dfn_hf.modeling.ops.flow_attention import flow_attention, flow_attention_reference
from dfn_hf.modeling.ops.neighbor_search import search_cells
from tests.modeling.ops.test_c_compiler import draw_model
from tests.modeling.ops.test_flow_attention import DIFFERENTIABLE, TOLERANCE, draw_inputs, outputs_and_gradients
from tests.modeling.ops.test_neighbor_search import assert_same, draw_positions

triton_launch = pytest.importorskip(
    "dfn_hf.modeling.ops.kernels.triton_launch", reason="Triton supports Linux only", exc_type=ImportError
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEARCH = ("cells_triton", "search_cells_triton")
ATTENTION = ("flow_attention_forward_triton", "flow_attention_backward_triton")


@pytest.fixture
def launched(monkeypatch):
    """Send tensors of any device to the kernels; returns the names of the launched functions."""
    monkeypatch.setenv("DFN_HF_KERNELS", "0")  # the comparison runs in torch
    monkeypatch.setattr(dispatch, "triton_available", lambda device: True)
    names = []

    def observed(name, launch):
        def call(*arguments):
            names.append(name)
            return launch(*arguments)

        return call

    for name in SEARCH + ATTENTION:
        monkeypatch.setattr(triton_launch, name, observed(name, getattr(triton_launch, name)))
    return names


def draw_grids(position_dim, num_tables, cell_sizes=None):
    sizes = cell_sizes or geometric_cell_sizes(num_tables)
    constants = (x.to(DEVICE) for x in grid_constants(position_dim, num_tables, 1))
    return CellGrids(*constants, sizes, ball_cells_per_axis(position_dim, sizes))


# Search


@pytest.mark.parametrize(("shape", "num_tables"), [((2, 1, 37, 4), 3), ((1, 300, 1), 1), ((3, 5, 16), 6)])
def test_cells_are_those_of_torch(shape, num_tables, launched):
    grids = draw_grids(shape[-1], num_tables)
    positions = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    positions = (positions * GRID).round() / GRID
    positions[..., 0, 0], positions[..., 1, 0] = 1e30, -1e30  # beyond the outermost cells
    positions = positions.to(DEVICE, torch.float32)
    expected = grids.cells(positions)
    assert launched == [] and torch.equal(grids.cells(positions, on_grid=True), expected)
    assert launched == ["cells_triton"]


SEARCHES = {
    "spread": {},
    "duplicates": {"kind": "few", "num_tables": 5},
    "all the same": {"kind": "same", "shape": (3, 29, 2)},
    "no window": {"window": 0},
    "more neighbours than candidates": {"num_neighbors": 11, "num_tables": 1},
    "one entity": {"shape": (2, 1, 2), "window": 0},
    "window longer than the row": {"shape": (1, 7, 2), "window": 9},
    "more cells than 16 bits number": {"shape": (1, 40, 3), "cell_sizes": [8.0, 0.1], "num_tables": 2},
    "many dimensions": {"shape": (1, 35, 16)},
    "reach": {"reach": True, "kind": "few"},
    "padding": {"counts": (33, 0), "reach": True},
}


@pytest.mark.parametrize("case", SEARCHES)
def test_neighbours_are_those_of_torch(case, launched):
    options = {
        "shape": (2, 45, 4), "kind": "spread", "num_tables": 3, "cell_sizes": None, "candidates_per_table": 3,
        "num_neighbors": 5, "window": 2, "reach": None, "counts": None, **SEARCHES[case],
    }  # fmt: skip
    rows, length, position_dim = options["shape"]
    queries, keys = (x.to(DEVICE) for x in draw_positions(options["shape"], 0, kind=options["kind"]))
    grids = draw_grids(position_dim, options["num_tables"], options["cell_sizes"])
    index = torch.arange(length, device=DEVICE).expand(rows, -1)
    reach = None if options["reach"] is None else index % 17
    counts = None if options["counts"] is None else torch.tensor(options["counts"], device=DEVICE)
    sizes = (options["num_neighbors"], options["window"], options["candidates_per_table"])
    arguments = (queries, grids.cells(queries), index, keys, grids.cells(keys), *sizes)
    expected = search_cells(*arguments, reach=reach, counts=counts)
    assert launched == []
    found = search_cells(*arguments, reach=reach, counts=counts, table_offsets=grids.table_offsets)
    assert launched == ["search_cells_triton"]
    assert_same(found, expected)
    assert (expected[0] >= 0).any() == (options["window"] < length and length > 1 or options["window"] == 0)


# Attention


CASES = {
    "plain": {"length": 19},
    "window 1": {"window": 1},
    "window longer than the row": {"window": 40},
    "no neighbours": {"num_neighbors": 0},
    "no neighbours found": {"share": 0.0, "past": (3, 3)},
    "ragged past": {"past": (0, 23), "room": 3, "window": 5},
    "one step": {"length": 1, "past": (9, 30)},
    "several tiles": {"batch": 1, "past": (2,), "length": 37, "window": 35, "num_neighbors": 2},
}


def attend(**inputs):
    y, lse = flow_attention(**{name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in inputs.items()})
    return y.cpu(), lse.cpu()


@pytest.fixture
def attention_launched(launched):
    yield
    assert set(launched) == set(ATTENTION)


def assert_equals_the_loop(inputs, value_dtype):
    dtypes = dict.fromkeys(DIFFERENTIABLE, torch.float32) | {"value": value_dtype}
    rounded = inputs | {name: inputs[name].to(dtypes[name]).double() for name in DIFFERENTIABLE}
    found = outputs_and_gradients(attend, rounded, **dtypes)
    expected = outputs_and_gradients(flow_attention_reference, rounded)
    for name in expected:
        scale = expected[name].abs().max().clamp(min=1)
        assert (found[name] - expected[name]).abs().max() <= TOLERANCE[value_dtype] * scale, name


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("attention_launched")
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_loop(case):
    assert_equals_the_loop(draw_inputs(7, **CASES[case]), torch.float32)


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("attention_launched", "deterministic")
def test_gradients_with_and_without_atomic_additions(value_dtype):
    inputs = draw_inputs(8, length=9, past=(5, 0), room=1)
    inputs["reach"] = inputs["query_index"] % 3  # segments start within the window
    assert_equals_the_loop(inputs, value_dtype)


@pytest.mark.usefixtures("attention_launched")
def test_values_of_any_stride():
    inputs = draw_inputs(9)
    expected = outputs_and_gradients(attend, inputs, **dict.fromkeys(DIFFERENTIABLE, torch.float32))
    inputs["value"] = inputs["value"].mT.contiguous().mT  # features are not contiguous
    inputs["key"] = inputs["key"].transpose(1, 2).contiguous().transpose(1, 2)
    found = outputs_and_gradients(attend, inputs, **dict.fromkeys(DIFFERENTIABLE, torch.float32))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("attention_launched")
def test_large_logits_stay_finite():
    inputs = draw_inputs(2)
    inputs["query"] = 1e3 * inputs["query"]
    outputs = outputs_and_gradients(attend, inputs, **dict.fromkeys(DIFFERENTIABLE, torch.float32))
    assert all(value.isfinite().all() for value in outputs.values())


# Dispatch


def test_model_gives_the_same_in_triton(launched, monkeypatch):
    model, ids = draw_model(num_hidden_layers=1)
    model, ids = model.to(DEVICE), ids[:, :21].to(DEVICE)

    def run():
        model.zero_grad()
        outputs = model(ids, labels=ids, use_cache=False, output_entities=True)
        outputs.loss.backward()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            continued = [model(ids[:, part], past_key_values=cache).logits for part in (slice(17), slice(17, 21))]
        gradients = [parameter.grad for parameter in model.parameters()]
        return outputs.entities[0].neighbors, [outputs.logits, *continued, *gradients]

    neighbors, found = run()
    cells, first_search = ["cells_triton", "cells_triton"], ["search_cells_triton"]
    assert launched == [
        *cells,
        *first_search,
        *ATTENTION,
        *cells,
        *first_search,
        "flow_attention_forward_triton",
        *cells,
        "flow_attention_forward_triton",
    ]
    monkeypatch.setattr(dispatch, "triton_available", lambda device: False)
    expected_neighbors, expected = run()
    assert torch.equal(neighbors, expected_neighbors) and (neighbors >= 0).any()
    for x, wanted in zip(found, expected, strict=True):
        assert torch.allclose(x, wanted, atol=1e-4 * float(wanted.detach().abs().max().clamp(min=1)), rtol=0)


@pytest.mark.parametrize("misfit", ["dropout", "float64", "wide values"])
def test_unsupported_inputs_run_in_torch(misfit, launched):
    inputs = draw_inputs(0, length=3)
    if misfit != "float64":
        inputs |= {name: inputs[name].float() for name in DIFFERENTIABLE}
    if misfit == "wide values":
        inputs["value"] = inputs["value"].repeat(1, 1, 1, 100)
    y, _ = flow_attention(**inputs, dropout=0.5 if misfit == "dropout" else 0.0)
    assert launched == [] and y.isfinite().all()


@pytest.mark.parametrize("obstacle", ["an old GPU", "no Triton", "switched off", "no GPU"])
def test_triton_is_unavailable(obstacle, monkeypatch):
    capability = (7, 5) if obstacle == "an old GPU" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("DFN_HF_KERNELS", "0" if obstacle == "switched off" else "1")
    if obstacle == "no Triton":
        monkeypatch.setitem(sys.modules, "dfn_hf.modeling.ops.kernels.triton_launch", None)
    device = torch.device("cpu" if obstacle == "no GPU" else "cuda")
    dispatch._can_run.cache_clear()
    assert not dispatch.triton_available(device)
    monkeypatch.undo()
    dispatch._can_run.cache_clear()


def test_triton_is_available_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("DFN_HF_KERNELS", "1")
    assert dispatch.triton_available(torch.device("cuda"))
    dispatch._can_run.cache_clear()


# Compiled


def test_kernels_compile_for_a_gpu():
    """Sizes are those of the default model. A new process compiles them: this one interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "support" / "compiled_kernels.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == {
        "cells_kernel", "ends_kernel", "search_kernel", "forward_kernel", "backward_queries_kernel",
        "backward_neighbors_kernel", "backward_keys_kernel",
    }  # fmt: skip
    for kernel in kernels:
        # Registers spill to the stack, by hundreds of bytes if blocks are too large.
        assert kernel["stack"] < 64, kernel
