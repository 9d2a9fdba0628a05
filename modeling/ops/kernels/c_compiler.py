"""C code built on first use into a library that is kept for the next process; without a compiler there is none.

The code is plain C behind pointers and sizes: it needs a C compiler, and no headers of Python or torch. Libraries are
named by what they were built from and for, and put in place whole, so that any number of processes, and any number of
copies of this code from the Hub, can share a folder.
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

SWITCH = "DFN_HF_KERNELS"  # set to 0 for torch operations alone
ITEMS_PER_THREAD = 1024  # fewer are done before a thread has started


def kernels_enabled() -> bool:
    """Whether native code may be used: unless the environment variable DFN_HF_KERNELS is 0 or a program is exported."""
    return not torch.compiler.is_exporting() and os.environ.get(SWITCH, "1") != "0"


@cache
def compiled_library(source: str, *flags: str) -> ctypes.CDLL | None:
    """The library built from C `source` with `flags`, or None where it cannot be built; the reason is logged once."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.name != "posix":
        logger.info("No C compiler was found: going on with torch operations, which are slower.")
        return None
    try:
        # Tuned to this processor where it can be told from others that share the folder.
        tuning = ["-march=native"] if processor() else []
        try:
            return build_library(source, [compiler, *tuning, *flags])
        except subprocess.CalledProcessError:  # some compilers know no such tuning
            return build_library(source, [compiler, *flags])
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning_once(f"Native code was not built: going on with torch operations, which are slower. {reason}")
        return None


def build_library(source: str, command: list[str]) -> ctypes.CDLL:
    """The library from the folder, or else built there."""
    command = [*command, "-O3", "-std=gnu11", "-fPIC", "-shared"]
    made_of = "\0".join([source, *command, compiler_version(command[0]), platform.machine(), processor()])
    folder = library_folder()
    path = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as workplace:
            code, built = Path(workplace, "code.c"), Path(workplace, "library.so")
            code.write_text(source)
            subprocess.run(
                [*command, "-o", str(built), str(code), "-lm"], check=True, capture_output=True, timeout=120
            )
            built.replace(path)
    return ctypes.CDLL(str(path))


def library_folder() -> Path:
    """A folder of this user's own: what is in it gets executed."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base if os.path.isabs(base) else Path.home() / ".cache") / "dfn_hf" / "native"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is open to other users: make it yours alone.")
    return folder


def compiler_version(compiler: str) -> str:
    """What the compiler says of itself."""
    said = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=30).stdout
    return said.decode(errors="replace")


def processor() -> str:
    """What `-march=native` looks at; empty where it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    told = ("model name", "flags", "features", "isa", "cpu part", "cpu variant")
    return "\n".join(sorted({line for line in lines if line.lower().startswith(told)}))


def in_threads(work: Callable[[int, int], None], rows: int, items_per_row: int) -> None:
    """`work(first, last)` over all rows, in as many threads as torch uses and the work is worth."""
    threads = max(1, min(torch.get_num_threads(), rows, rows * items_per_row // ITEMS_PER_THREAD))
    bounds = [rows * thread // threads for thread in range(threads + 1)]
    errors: list[BaseException] = []

    def part(first: int, last: int) -> None:
        try:
            work(first, last)
        except BaseException as error:
            errors.append(error)

    # Threads of their own, not a pool: a pool that is kept does not survive a fork.
    others = [threading.Thread(target=part, args=bounds[i : i + 2]) for i in range(1, threads)]
    for thread in others:
        thread.start()
    part(*bounds[:2])
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Where the data of a CPU tensor starts; NULL for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
