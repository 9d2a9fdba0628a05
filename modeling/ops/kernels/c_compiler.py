"""Compiles C code at first use and keeps the library for later processes.

Where no compiler works, the library that the wheel carries is used, if it carries one.

The C functions take pointers and sizes, so they need a C compiler but no Python or torch headers. A library's file
name is a hash of its source, compiler, flags and processor, and the file is moved into place complete. Several
processes and several copies of this code from the Hub can therefore share the folder.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

SWITCH = "DFN_HF_KERNELS"  # environment variable; 0 disables the C and Triton kernels
ITEMS_PER_THREAD = 1024  # for fewer items starting a thread takes longer than the work


def kernels_enabled() -> bool:
    """Return whether C and Triton kernels may run.

    They may not if the environment variable `DFN_HF_KERNELS` is 0, or while a program is exported.
    """
    return not torch.compiler.is_exporting() and os.environ.get(SWITCH, "1") != "0"


@cache
def compiled_library(source: str, *flags: str, carried: str = "") -> ctypes.CDLL | None:
    """Compile C code, or load the library compiled before.

    Args:
        source: the C code.
        flags: compiler flags.
        carried: file name of the library that a wheel may carry beside this module.

    Returns:
        The library; None if it cannot be compiled, with the reason logged once.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if os.name != "posix":
        logger.warning_once("C kernels need Linux or macOS: torch operations run instead, which are slower.")
        return None
    if compiler is None:
        return carried_library(carried, "No C compiler was found. Install gcc.")
    try:
        # -march=native only if the file name can tell this processor from others that share the folder.
        tuning = ["-march=native"] if processor() else []
        try:
            return build_library(source, [compiler, *tuning, *flags])
        except subprocess.CalledProcessError:  # some compilers do not support -march=native
            return build_library(source, [compiler, *flags])
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        return carried_library(carried, f"The C code did not compile: {reason}")


def carried_library(name: str, reason: str) -> ctypes.CDLL | None:
    """Load the library that the wheel carries, compiled for any processor of its platform.

    Returns:
        The library; None, with `reason` logged once, if the wheel carries none or the file cannot be loaded.
    """
    path = Path(__file__).with_name(name) if name else None
    if path is not None and path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            reason = f"{reason} {path} cannot be loaded: {error}."
    logger.warning_once(f"Torch operations run instead of C, which are slower. {reason}")
    return None


def build_library(source: str, command: list[str]) -> ctypes.CDLL:
    """Load the library from the folder; compile it with `command` if it is not there."""
    command = [*command, "-O3", "-std=gnu11", "-fPIC", "-shared"]
    content = "\0".join([source, *command, compiler_version(command[0]), platform.machine(), processor()])
    folder = library_folder()
    path = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            code, built = Path(temporary, "code.c"), Path(temporary, "library.so")
            code.write_text(source)
            subprocess.run(
                [*command, "-o", str(built), str(code), "-lm"], check=True, capture_output=True, timeout=120
            )
            built.replace(path)
    return ctypes.CDLL(str(path))


def library_folder() -> Path:
    """Return the folder of compiled libraries, which only this user may write to, because its files are executed.

    Raises:
        PermissionError: another user owns the folder or can write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base if os.path.isabs(base) else Path.home() / ".cache") / "dfn_hf" / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"Other users can write to {folder}: restrict it with `chmod 700` or delete it.")
    return folder


def compiler_version(compiler: str) -> str:
    """Return the output of `compiler --version`."""
    output = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=30).stdout
    return output.decode(errors="replace")


def processor() -> str:
    """Return the processor properties that `-march=native` depends on; empty if they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    names = ("model name", "flags", "features", "isa", "cpu part", "cpu variant")
    return "\n".join(sorted({line for line in lines if line.lower().startswith(names)}))


def in_threads(work: Callable[[int, int], None], rows: int, items_per_row: int) -> None:
    """Call `work(first, last)` on ranges of rows in parallel threads.

    Args:
        work: processes rows first … last − 1.
        rows: number of rows.
        items_per_row: size of a row. There is at most one thread per `ITEMS_PER_THREAD` items, and no more threads
            than `torch.get_num_threads()`.

    Raises:
        BaseException: the first error of any thread.
    """
    threads = max(1, min(torch.get_num_threads(), rows, rows * items_per_row // ITEMS_PER_THREAD))
    bounds = [rows * thread // threads for thread in range(threads + 1)]
    errors: list[BaseException] = []

    def part(first: int, last: int) -> None:
        try:
            work(first, last)
        except BaseException as error:
            errors.append(error)

    # New threads instead of a pool: a pool does not survive a fork.
    others = [threading.Thread(target=part, args=bounds[i : i + 2]) for i in range(1, threads)]
    for thread in others:
        thread.start()
    part(*bounds[:2])
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Return the address of a CPU tensor's data; NULL for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
