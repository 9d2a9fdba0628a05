"""What a benchmark ran on, how much memory it took, and a fresh process to measure it in."""

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
    """One line: the processor or GPU, the threads, and the version of torch."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{_processor_name()}, {threads} {'thread' if threads == 1 else 'threads'}; torch {torch.__version__}"


def set_up_device(device: str, threads: int) -> None:
    """Fix the number of CPU threads and see that the device is there.

    Raises:
        ValueError: no such device here, or fewer than one thread.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}: at least 1 is needed")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    torch.set_num_threads(threads)


def dtype_named(name: str) -> torch.dtype:
    """The floating-point dtype of that name.

    Raises:
        ValueError: there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {name!r}: choose float32, bfloat16, float16 or float64")
    return dtype


def synchronize(device: str) -> None:
    """Wait until the device has finished what was asked of it, so that a clock read afterwards is right."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: str) -> float:
    """Seconds from some moment: processor time of one CPU thread, which others do not lengthen; else wall time."""
    one_thread = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if one_thread else time.perf_counter()


def peak_memory_mib(device: str) -> float:
    """Most memory held so far, in MiB: allocated on the GPU, or resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss also counts what the parent held when it started this process; VmHWM does not.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource  # not on Windows

    bytes_per_unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 2**20


def run_isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a fresh process, so that its peak memory is its own; see `without_isolation`.

    Raises:
        MemoryError: the process was killed, as systems do when memory runs out.
    """
    with fresh_process() as call:
        return call(function, *arguments)


@contextmanager
def fresh_process() -> Iterator[Callable[..., Any]]:
    """A `run_isolated` whose calls all go to one process, which ends with the context."""
    if not _isolated.get():
        yield lambda function, *arguments: function(*arguments)
        return
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:

        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return pool.submit(function, *arguments).result()
            except BrokenProcessPool as error:
                raise MemoryError(
                    f"the process of {function.__name__} ended without a result, most likely killed for lack of memory"
                ) from error

        yield call


@contextmanager
def without_isolation() -> Iterator[None]:
    """Where only what is printed counts, not what is measured: no process is started."""
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
