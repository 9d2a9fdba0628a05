"""Compiles C code at first use and keeps the library for later processes.

Where no compiler works, the library that the wheel carries is used, if it carries one.

The C functions take pointers and sizes, so they need a C compiler but no Python or torch headers. The key of a library
is a hash of its source, compiler, flags and processor, and a library is moved into the folder when it is complete.
Several processes and several copies of this code from the Hub can therefore share the folder.
"""

import ctypes
import errno
import hashlib
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from transformers.utils import logging

from .library_cache import build_folder, find_library, library_folder, load_library, store_library

logger = logging.get_logger(__name__)

SWITCH = "DFN_HF_KERNELS"  # environment variable; 0 disables the C and Triton kernels
ITEMS_PER_THREAD = 1024  # for fewer items starting a thread takes longer than the work
COMPILE_SECONDS = 120


def kernels_enabled() -> bool:
    """Return whether C and Triton kernels may run.

    They may not if the environment variable `DFN_HF_KERNELS` is 0, or while a program is exported.
    """
    return not torch.compiler.is_exporting() and os.environ.get(SWITCH, "1") != "0"


@cache
def compiled_library(
    source: str, *flags: str, functions: tuple[str, ...] = (), carried: str = ""
) -> ctypes.CDLL | None:
    """Compile C code, or load the library compiled before.

    Args:
        source: the C code.
        flags: compiler flags.
        functions: names of the functions that the library must have.
        carried: start of the file name of the library that a wheel may carry beside this module.

    Returns:
        The library; None if it cannot be compiled, with the reason logged once.
    """
    if os.name != "posix":
        logger.warning_once("C kernels need Linux or macOS: torch operations run instead, which are slower.")
        return None
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return carried_library(carried, source, functions, "No C compiler was found. Install gcc.")
    compiler = os.path.abspath(compiler)
    try:
        # -march=native only if the key can tell this processor from others that share the folder.
        tuning = ["-march=native"] if processor() else []
        try:
            return build_library(source, [compiler, *tuning, *flags], functions)
        except subprocess.CalledProcessError:  # some compilers do not support -march=native
            return build_library(source, [compiler, *flags], functions)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return carried_library(carried, source, functions, failure(error))


def failure(error: Exception) -> str:
    """Return why a library could not be compiled and what to do.

    The text is the same for all libraries, so that it is logged once."""
    remedy = "Set CC to another compiler, or XDG_CACHE_HOME to a folder with free space."
    if isinstance(error, subprocess.CalledProcessError):
        output = (error.stderr or b"").decode(errors="replace").strip()[:500] or f"exit status {error.returncode}"
        full_disk = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
        output = next((text for text in full_disk if text in output), output)  # without names of temporary files
        return f"{error.cmd[0]} failed: {output.rstrip('.')}. {remedy}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} did not finish in {error.timeout} seconds. {remedy}"
    from_system = not isinstance(error, OSError) or error.errno is not None
    return f"{str(error).rstrip('.')}. {remedy}" if from_system else str(error)


def carried_library(name: str, source: str, functions: tuple[str, ...], reason: str) -> ctypes.CDLL | None:
    """Load the library that the wheel carries, compiled for any processor of its platform.

    Returns:
        The library; None, with `reason` logged once, if the wheel carries none of this source or it cannot be used.
    """
    key = f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}"  # setup.py writes the same
    for path in Path(__file__).parent.glob(f"{key}-*-*.so") if name else ():
        try:
            return load_library(path, functions)
        except OSError as error:
            reason = f"{reason} The library of the installed package cannot be used: {error} Reinstall dfn-hf."
    logger.warning_once(f"Torch operations run instead of C, which are slower. {reason}")
    return None


def build_library(source: str, command: list[str], functions: tuple[str, ...]) -> ctypes.CDLL:
    """Load the library from the folder; compile it with `command` if it is not there.

    Raises:
        OSError: the folder or the compiled library cannot be used.
        RuntimeError: the home folder is unknown.
        subprocess.SubprocessError: the compiler failed.
    """
    command = [*command, "-O3", "-std=gnu11", "-fPIC", "-shared"]
    folder = library_folder()
    content = "\0".join([source, *command, compiler_version(command[0]), platform.machine(), processor()])
    key = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()[:32]
    library = find_library(folder, key, functions)
    if library is None:
        with build_folder(folder) as temporary:
            library = store_library(compile_code(source, command, temporary), folder, key, functions)
    return library


def compile_code(source: str, command: list[str], folder: Path) -> Path:
    """Compile C code in a temporary folder, which also takes the compiler's own temporary files.

    Returns:
        The library.

    Raises:
        OSError: a file cannot be written.
        subprocess.SubprocessError: the compiler failed.
    """
    (folder / "code.c").write_text(source, encoding="utf-8")
    subprocess.run(
        [*command, "-o", "library.so", "code.c", "-lm"],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder), "LC_ALL": "C"},
        check=True,
        capture_output=True,
        timeout=COMPILE_SECONDS,
    )
    return folder / "library.so"


def compiler_version(compiler: str) -> str:
    """Return the output of `compiler --version`."""
    output = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=30).stdout
    return output.decode(errors="replace")


def processor() -> str:
    """Return the processor properties that `-march=native` depends on; empty if they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
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
