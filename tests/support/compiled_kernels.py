"""Compiles the Triton kernels for a GPU that is not there; prints one line of JSON per kernel.

Arguments: the compute capability, for example 80 (A100) or 90 (H100, H200). The script calls the real launch functions
with small tensors on the CPU, and replaces the launch itself by a compilation.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from dfn_hf.modeling.ops.box_tree import BLOCK, RECENT, empty_tree_index
from dfn_hf.modeling.ops.kernels import triton_launch

LENGTH, HEADS, POSITION_DIM, NUM_NEIGHBORS, WINDOW, NUM_LEAVES, VALUE_FEATURES = 256, 2, 4, 16, 32, 8, 64


class AbsentGPU:
    """The part of a Triton driver that compilation needs."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


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
    """Compile the search of a whole row, and of a step with an index."""
    length = RECENT + 3 * BLOCK
    for queries in (length, 1):
        query, key = (
            torch.zeros(HEADS, queries, POSITION_DIM).short(),
            torch.zeros(HEADS, length, POSITION_DIM).short(),
        )
        index = empty_tree_index("flat", HEADS, length, POSITION_DIM, query.device) if queries == 1 else None
        positions = torch.arange(length - queries, length).expand(HEADS, -1)
        counts = torch.full((HEADS,), queries)
        triton_launch.search_tree_triton(query, positions, key, NUM_NEIGHBORS, WINDOW, NUM_LEAVES, None, counts, index)


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
    driver.set_active(AbsentGPU(int(sys.argv[1])))
    JITFunction.run = compile_only
    search()
    attend(torch.bfloat16, deterministic=False)
    attend(torch.float32, deterministic=True)
