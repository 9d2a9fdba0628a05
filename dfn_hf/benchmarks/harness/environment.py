"""Machine description, clocks, peak memory, and measurements in a fresh process."""

import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

_isolated = ContextVar("isolated", default=True)


def describe_machine(device: str) -> str:
    """Return one line with the processor or GPU, the number of threads and the torch version."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{_processor_name()}, {threads} {'thread' if threads == 1 else 'threads'}; torch {torch.__version__}"


def set_up_device(device: str, threads: int) -> None:
    """Set the number of CPU threads and check that the device is usable.

    Raises:
        ValueError: the device is unavailable, or `threads` is less than 1.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}: choose at least 1")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error
    torch.set_num_threads(threads)


def dtype_named(name: str) -> torch.dtype:
    """Return the floating-point dtype with this name.

    Raises:
        ValueError: torch has no floating-point dtype with this name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {name!r}: choose float32, bfloat16, float16 or float64")
    return dtype


def synchronize(device: str) -> None:
    """Wait for all queued GPU work, so that a clock read afterwards includes it; does nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: str) -> float:
    """Return a monotonic time in seconds: processor time on one CPU thread, wall-clock time otherwise.

    Other processes on the machine do not lengthen processor time.
    """
    one_thread = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if one_thread else time.perf_counter()


def peak_memory_mib(device: str) -> float:
    """Return the peak memory so far in MiB: allocated memory on a GPU, resident memory of this process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss includes the memory of the parent at the time of the fork; VmHWM does not.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource  # not on Windows

    bytes_per_unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 2**20


def run_isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, run in a fresh process so that its peak memory includes no earlier work.

    Inside `without_isolation` the function runs in this process.

    Raises:
        MemoryError: the process was killed, most likely because memory ran out.
    """
    with fresh_process() as call:
        return call(function, *arguments)


@contextmanager
def fresh_process() -> Iterator[Callable[..., Any]]:
    """Yield a callable like `run_isolated` that sends every call to one process; the process ends with the context."""
    if not _isolated.get():
        yield lambda function, *arguments: function(*arguments)
        return
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:

        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return pool.submit(function, *arguments).result()
            except BrokenProcessPool as error:
                raise MemoryError(
                    f"the process of {function.__name__} ended without a result, most likely for lack of memory: "
                    "choose a smaller length"
                ) from error

        yield call


@contextmanager
def without_isolation() -> Iterator[None]:
    """Run `run_isolated` and `fresh_process` in this process; for tests of the output, where times do not matter."""
    before = _isolated.set(False)
    try:
        yield
    finally:
        _isolated.reset(before)


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
