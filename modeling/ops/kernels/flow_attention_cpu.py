"""Flow attention in C, forward and backward: `flow_attention.flow_attention` in float32 on a CPU.

The C code processes one query at a time. The backward pass recomputes the weights from the log-sum-exp of the forward
pass. The order of summation within a (row, head) does not depend on the number of threads.
"""

import ctypes

import torch

from .c_compiler import compiled_library, in_threads, kernels_enabled
from .c_source import c_source

# -fopenmp-simd vectorises only the loops marked `omp simd`; other sums keep their order.
ATTENTION_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd")
ATTENTION_SOURCE = c_source("flow_attention_cpu.c")


class _Tensor(ctypes.Structure):
    """`Tensor` of the C code: address and strides."""

    _fields_ = [("start", ctypes.c_void_p), *((step, ctypes.c_int64) for step in ("batch", "head", "entity"))]


ATTENTION_SIZES = ("heads", "length", "features", "value_features", "num_neighbors", "window")
ATTENTION_TENSORS = (
    "query",
    "key",
    "value",
    "y",
    "lse",
    "grad_query",
    "grad_key",
    "grad_value",
    "grad_y",
    "grad_lse",
)


class _Call(ctypes.Structure):
    """`Call` of the C code: sizes and tensors."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ATTENTION_SIZES),
        *((name, _Tensor) for name in ATTENTION_TENSORS),
        *((name, ctypes.c_void_p) for name in ("decay", "index", "reach", "neighbors", "grad_decay")),
    ]


def attention_library(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """Return the compiled library if these tensors are float32 on a CPU and kernels are enabled, else None."""
    supported = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    if not supported or not kernels_enabled():
        return None
    return compiled_library(
        ATTENTION_SOURCE, *ATTENTION_FLAGS, functions=("forward", "backward"), carried="libflow_attention"
    )


def flow_attention_forward_cpu(
    library: ctypes.CDLL,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flow_attention.flow_attention_forward` without dropout.

    Raises:
        MemoryError: the temporary storage cannot be allocated.
    """
    query, key, value = (_with_dense_features(x) for x in (query, key, value))
    batch, heads, length, _ = query.shape
    y = value.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, heads, length)
    tensors = {"query": query, "key": key, "value": value, "y": y, "lse": lse.unsqueeze(-1)}
    _run(library.forward, tensors, window, decay=decay, index=index, reach=reach, neighbors=neighbors)
    return y, lse


def flow_attention_backward_cpu(
    library: ctypes.CDLL,
    grad_y: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    lse: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`flow_attention.flow_attention_backward` without dropout.

    Raises:
        MemoryError: the temporary storage cannot be allocated.
    """
    query, key, value, grad_y = (_with_dense_features(x) for x in (query, key, value, grad_y))
    grads = [x.new_zeros(x.shape) for x in (query, key, value)]
    grad_decay = decay.new_zeros(query.shape[:2])
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "lse": lse.unsqueeze(-1),
        "grad_y": grad_y,
        "grad_lse": grad_lse.contiguous().unsqueeze(-1),
        **dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True)),
    }
    contiguous = {"decay": decay, "index": index, "reach": reach, "neighbors": neighbors, "grad_decay": grad_decay}
    _run(library.backward, tensors, window, **contiguous)
    return grads[0], grads[1], grads[2], grad_decay.sum(dim=0)


def _with_dense_features(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with features contiguous in memory and no broadcast dimension."""
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def _run(function, tensors: dict[str, torch.Tensor], window: int, **contiguous: torch.Tensor) -> None:
    """Call `function` on all rows and heads in parallel. Local variables keep the tensors alive during the call."""
    query, neighbors = tensors["query"], contiguous["neighbors"]
    batch, heads, length, features = query.shape
    call = _Call(heads, length, features, tensors["value"].shape[-1], neighbors.shape[-1], window)
    contiguous = {name: tensor.contiguous() for name, tensor in contiguous.items()}
    for name, tensor in tensors.items():
        setattr(call, name, _Tensor(tensor.data_ptr(), *tensor.stride()[:3]))
    for name, tensor in contiguous.items():
        setattr(call, name, tensor.data_ptr())

    def work(first: int, last: int) -> None:
        if function(ctypes.c_int64(first), ctypes.c_int64(last), ctypes.byref(call)):
            raise MemoryError(
                f"Flow attention could not allocate memory for window={window} and {neighbors.shape[-1]} neighbours."
            )

    in_threads(work, batch * heads, length)
