"""Flow attention in C, entity by entity, forward and backward: `flow_attention.flow_attention` in float32 on the CPU.

The backward pass computes the weights again from the log-sum that the forward pass kept. Each (row, head) is summed in
one order, whatever the number of threads.
"""

import ctypes

import torch

from .c_compiler import compiled_library, in_threads, kernels_enabled
from .c_source import c_source

# Only the sums that say so are reassociated to run in vector registers.
ATTENTION_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd")
ATTENTION_SOURCE = c_source("flow_attention_cpu.c")


class _Tensor(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), *((step, ctypes.c_int64) for step in ("batch", "head", "entity"))]


ATTENTION_SIZES = ("heads", "length", "features", "value_features", "num_neighbors", "window")
ATTENTION_TENSORS = (
    "query",
    "key",
    "value",
    "y",
    "total",
    "grad_query",
    "grad_key",
    "grad_value",
    "grad_y",
    "grad_total",
)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ATTENTION_SIZES),
        *((name, _Tensor) for name in ATTENTION_TENSORS),
        *((name, ctypes.c_void_p) for name in ("fading", "index", "reach", "neighbors", "grad_fading")),
    ]


def attention_library(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """The library if it can be used for these tensors: all float32 on the CPU."""
    fit = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return compiled_library(ATTENTION_SOURCE, *ATTENTION_FLAGS) if fit and kernels_enabled() else None


def flow_attention_forward_cpu(
    library: ctypes.CDLL,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    fading: torch.Tensor,
    index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flow_attention.read` without dropout."""
    query, key, value = (_with_dense_features(x) for x in (query, key, value))
    batch, heads, length, _ = query.shape
    y = value.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    total = query.new_empty(batch, heads, length)
    tensors = {"query": query, "key": key, "value": value, "y": y, "total": total.unsqueeze(-1)}
    _run(library.forward, tensors, window, fading=fading, index=index, reach=reach, neighbors=neighbors)
    return y, total


def flow_attention_backward_cpu(
    library: ctypes.CDLL,
    grad_y: torch.Tensor,
    grad_total: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    fading: torch.Tensor,
    index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    total: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`flow_attention.read_gradients` without dropout."""
    query, key, value, grad_y = (_with_dense_features(x) for x in (query, key, value, grad_y))
    grads = [x.new_zeros(x.shape) for x in (query, key, value)]
    grad_fading = fading.new_zeros(query.shape[:2])
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "total": total.unsqueeze(-1),
        "grad_y": grad_y,
        "grad_total": grad_total.contiguous().unsqueeze(-1),
        **dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True)),
    }
    plain = {"fading": fading, "index": index, "reach": reach, "neighbors": neighbors, "grad_fading": grad_fading}
    _run(library.backward, tensors, window, **plain)
    return *grads, grad_fading.sum(dim=0)


def _with_dense_features(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def _run(function, tensors: dict[str, torch.Tensor], window: int, **plain: torch.Tensor) -> None:
    """Call `function` on all rows; every tensor is held until it returns."""
    query, neighbors = tensors["query"], plain["neighbors"]
    batch, heads, length, features = query.shape
    call = _Call(heads, length, features, tensors["value"].shape[-1], neighbors.shape[-1], window)
    plain = {name: tensor.contiguous() for name, tensor in plain.items()}
    for name, tensor in tensors.items():
        setattr(call, name, _Tensor(tensor.data_ptr(), *tensor.stride()[:3]))
    for name, tensor in plain.items():
        setattr(call, name, tensor.data_ptr())

    def work(first: int, last: int) -> None:
        if function(ctypes.c_int64(first), ctypes.c_int64(last), ctypes.byref(call)):
            raise MemoryError(f"no memory to read {window} local entities and {neighbors.shape[-1]} others in")

    in_threads(work, batch * heads, length)
