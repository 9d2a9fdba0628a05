"""The Triton kernels against torch and a loop: on a GPU if there is one, in Triton's interpreter otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_flow_attention import DIFFERENTIABLE, TOLERANCE, draw_inputs, outputs_and_gradients
from test_flow_search import assert_same, draw_positions

from dfn_hf.modeling.flow_attention import flow_attention_reference
from dfn_hf.modeling.flow_search import (
    GRID,
    ROTATION_SCALE,
    CellGrids,
    ball_cells_per_axis,
    geometric_cell_sizes,
    grid_constants,
    search_cells,
)

flow_kernels = pytest.importorskip(
    "dfn_hf.modeling.flow_kernels", reason="Triton is made for Linux alone", exc_type=ImportError
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch):
    """What the kernels are compared with is not to be the kernels, nor the C code."""
    monkeypatch.setenv("DFN_HF_NATIVE", "0")


def draw_grids(position_dim, num_tables, cell_sizes=None):
    sizes = cell_sizes or geometric_cell_sizes(num_tables)
    constants = (x.to(DEVICE) for x in grid_constants(position_dim, num_tables, 1))
    return CellGrids(*constants, sizes, ball_cells_per_axis(position_dim, sizes))


# Search


@pytest.mark.parametrize(("shape", "num_tables"), [((2, 1, 37, 4), 3), ((1, 300, 1), 1), ((3, 5, 16), 6)])
def test_cells_are_those_of_torch(shape, num_tables):
    grids = draw_grids(shape[-1], num_tables)
    positions = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    positions = (positions * GRID).round() / GRID
    positions[..., 0, 0], positions[..., 1, 0] = 1e30, -1e30  # beyond the outermost cells
    positions = positions.to(DEVICE)
    edges = torch.tensor([round(size * GRID * ROTATION_SCALE) for size in grids.cell_sizes], device=DEVICE)
    shift = (grids.shift.long() * edges[:, None]).div(ROTATION_SCALE, rounding_mode="floor")
    found = flow_kernels.cells_on_gpu(positions, GRID, grids.rotation, shift, edges, grids.cells_per_axis)
    assert torch.equal(found, grids.cells(positions))


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
def test_neighbours_are_those_of_torch(case):
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
    query_cells, key_cells = grids.cells(queries), grids.cells(keys)
    expected = search_cells(queries, query_cells, index, keys, key_cells, *sizes, reach=reach, counts=counts)
    found = flow_kernels.search_on_gpu(
        queries, query_cells, keys, key_cells, *sizes, grids.table_offsets, reach, counts
    )
    assert_same(found, expected)
    assert (expected[0] >= 0).any() == (options["window"] < length and length > 1 or options["window"] == 0)


# Attention


CASES = {
    "plain": {"length": 19},
    "window 1": {"window": 1},
    "window longer than the row": {"window": 40},
    "no neighbours asked": {"num_neighbors": 0},
    "no neighbours found": {"share": 0.0, "past": (3, 3)},
    "ragged past": {"past": (0, 23), "room": 3, "window": 5},
    "one step": {"length": 1, "past": (9, 30)},
    "several tiles": {"batch": 1, "past": (2,), "length": 37, "window": 35, "num_neighbors": 2},
}


def on_device(inputs):
    return {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in inputs.items()}


def attend(**inputs):
    y, total = flow_kernels.FlowAttentionOnGPU.apply(*on_device(inputs).values())
    return y.cpu(), total.cpu()


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


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_loop(case):
    assert_equals_the_loop(draw_inputs(7, **CASES[case]), torch.float32)


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("deterministic")
def test_gradients_with_and_without_atomic_additions(value_dtype):
    assert_equals_the_loop(draw_inputs(8, length=9, past=(5, 0), room=1), value_dtype)


def test_values_of_any_stride():
    inputs = draw_inputs(9)
    expected = outputs_and_gradients(attend, inputs, **dict.fromkeys(DIFFERENTIABLE, torch.float32))
    inputs["value"] = inputs["value"].mT.contiguous().mT  # its features do not lie together
    inputs["key"] = inputs["key"].transpose(1, 2).contiguous().transpose(1, 2)
    found = outputs_and_gradients(attend, inputs, **dict.fromkeys(DIFFERENTIABLE, torch.float32))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_large_logits_stay_finite():
    inputs = draw_inputs(2)
    inputs["query"] = 1e3 * inputs["query"]
    outputs = outputs_and_gradients(attend, inputs, **dict.fromkeys(DIFFERENTIABLE, torch.float32))
    assert all(value.isfinite().all() for value in outputs.values())


# Compiled


def test_kernels_compile_for_a_gpu():
    """With sizes of the default model, in a process of its own: in this one they are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiled_kernels.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == {
        "cells_kernel", "ends_kernel", "search_kernel", "forward_kernel", "backward_queries_kernel",
        "backward_neighbors_kernel", "backward_keys_kernel",
    }  # fmt: skip
    for kernel in kernels:
        # What registers cannot hold goes to the stack, hundreds of bytes of it if blocks are too large.
        assert kernel["stack"] < 64, kernel
