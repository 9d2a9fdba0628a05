"""Compiles the Triton kernels for an H100 or H200 without a GPU; prints one line of JSON per kernel.

It calls the real launch functions with small tensors on the CPU, and replaces the launch itself by a compilation.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from dfn_hf.modeling.ops.cell_grid import GRID, ball_cells_per_axis, geometric_cell_sizes
from dfn_hf.modeling.ops.cell_lists import CellGrids, grid_constants
from dfn_hf.modeling.ops.kernels import triton_launch

LENGTH, HEADS, POSITION_DIM, NUM_NEIGHBORS, WINDOW, TABLES, CANDIDATES, VALUE_FEATURES = 256, 2, 4, 16, 32, 16, 8, 64


class H200:
    """The part of a Triton driver that compilation needs."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compile_only(self, *arguments, run=JITFunction.run, **options):
    kernel = run(self, *arguments, **options | {"warmup": True})
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        output = subprocess.run([reader, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", output)[1]) for name in ("REG", "STACK"))
    usage = {
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }
    print(json.dumps({"name": self.__name__, **usage}))


def search():
    queries, keys = torch.zeros(2, HEADS, LENGTH, POSITION_DIM)
    sizes = geometric_cell_sizes(TABLES)
    grids = CellGrids(*grid_constants(POSITION_DIM, TABLES, 0), sizes, ball_cells_per_axis(POSITION_DIM, sizes))
    constants = grids.rotation, torch.zeros(grids.shift.shape), torch.ones(TABLES), grids.cells_per_axis
    triton_launch.cells_triton(queries, GRID, *constants)
    cells = grids.cells(keys)
    reach, counts = torch.zeros(HEADS, LENGTH, dtype=torch.int64), torch.zeros(HEADS, dtype=torch.int64)
    triton_launch.search_cells_triton(
        queries, cells, keys, cells, NUM_NEIGHBORS, WINDOW, CANDIDATES, grids.table_offsets, reach, counts
    )


def attend(value_dtype, deterministic):
    query, key = torch.zeros(2, 1, HEADS, LENGTH, POSITION_DIM + 1)
    value = torch.zeros(1, HEADS, LENGTH, VALUE_FEATURES, dtype=value_dtype)
    decay, index = torch.zeros(HEADS), torch.arange(LENGTH)[None]
    neighbors = torch.zeros(1, HEADS, LENGTH, NUM_NEIGHBORS, dtype=torch.int64)
    inputs = (query, key, value, decay, index, index, neighbors)
    y, lse = triton_launch.flow_attention_forward_triton(*inputs, WINDOW)
    torch.use_deterministic_algorithms(deterministic)
    triton_launch.flow_attention_backward_triton(torch.zeros_like(y), torch.zeros_like(lse), *inputs, y, lse, WINDOW)


if __name__ == "__main__":
    driver.set_active(H200())
    JITFunction.run = compile_only
    search()
    attend(torch.bfloat16, deterministic=False)
    attend(torch.float32, deterministic=True)
