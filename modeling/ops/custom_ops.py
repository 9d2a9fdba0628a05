"""Registers functions as torch.library operators, which `torch.compile` calls instead of tracing.

An operator's namespace contains a hash of the code. One process can therefore load several copies of this code from
the Hub: equal copies share their operators, different copies register different ones.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch


def custom_op(
    function: Callable,
    fake: Callable,
    *,
    mutates_args: tuple[str, ...] = (),
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Callable:
    """Register `function` as an operator with `torch.library.custom_op`, or return the one registered before.

    Args:
        function: the implementation; its name becomes the operator's name.
        fake: returns empty outputs with the shapes and dtypes of `function`.
        mutates_args: names of the arguments that `function` writes to.
        backward, setup_context: as for `torch.library.register_autograd`; None for an operator without gradient.
    """
    namespace, name = f"dfn_hf_{code_digest()}", function.__name__.strip("_")
    registered = getattr(torch.ops, namespace)
    if hasattr(registered, name):
        return getattr(registered, name)
    operator = torch.library.custom_op(f"{namespace}::{name}", function, mutates_args=mutates_args)
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=setup_context)
    return operator


@cache
def code_digest() -> str:
    """Return a hash of the Python and C files in this file's folder and its sub-folders."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".c", ".h")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def use_custom_ops() -> bool:
    """Return whether to call custom operators: while compiling.

    While exporting the functions are traced, because the exported program must run without this code.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()
