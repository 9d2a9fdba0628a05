"""Functions that `torch.compile` calls as they are, as operators of torch.library, in the place of tracing them.

An operator is named after the code that it runs: copies of this code from the Hub that differ have operators of their
own in one process, copies that are alike share them.
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
    """`function` as an operator; see `torch.library.custom_op`.

    Args:
        fake: what `function` gives, by shape and type alone.
        mutates_args: arguments that it writes to.
        backward, setup_context: as for `torch.library.register_autograd`; None where there is no gradient.
    """
    namespace, name = f"dfn_hf_{code_digest()}", function.__name__.strip("_")
    registered = getattr(torch.ops, namespace)
    if hasattr(registered, name):
        return getattr(registered, name)
    made = torch.library.custom_op(f"{namespace}::{name}", function, mutates_args=mutates_args)
    made.register_fake(fake)
    if backward is not None:
        made.register_autograd(backward, setup_context=setup_context)
    return made


@cache
def code_digest() -> str:
    """Hash of the Python and C files in the folder of this file and below it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".c")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def use_custom_ops() -> bool:
    """Whether the code at hand is being compiled; a program to be exported is traced to the end, for others to run."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()
