"""Second derivatives and `vmap` of autograd functions with kernels of their own.

Such a function and its backward pass are two `KernelFunction`s. The backward pass of the second one
differentiates a plain composition of torch operations that computes the same as the first one, so that derivatives of
every order are right. Under `torch.func.vmap` the kernels run once per entry.
"""

from collections.abc import Callable

import torch


class KernelFunction(torch.autograd.Function):
    """An autograd function whose kernels know nothing of `torch.func`: mapped entries are computed one by one."""

    @classmethod
    def vmap(cls, info, in_dims, *inputs):
        results = []
        for entry in range(info.batch_size):
            chosen = (x if dim is None else x.select(dim, entry) for x, dim in zip(inputs, in_dims, strict=True))
            results.append(cls.apply(*chosen))
        if isinstance(results[0], tuple):
            return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0,) * len(results[0])
        return torch.stack(results), 0

    @classmethod
    def jvp(cls, ctx, *tangents):
        raise RuntimeError(f"{cls.__name__.strip('_')} has no forward-mode derivative: use reverse mode.")


def differentiate_backward(
    function: Callable,
    gradients: tuple[torch.Tensor, ...],
    inputs: tuple[torch.Tensor, ...],
    cotangents: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of `gradients` and `inputs` in the backward pass of `function`.

    Args:
        function: maps `inputs` to one tensor or a tuple of tensors; made of differentiable operations.
        gradients: of the outputs of `function`.
        inputs: of `function`.
        cotangents: gradients of the results of the backward pass, which are the gradients of `inputs`.
    """
    count = len(gradients)

    def backward(*arguments):
        outputs, pull = torch.func.vjp(function, *arguments[count:])[:2]
        return pull(arguments[:count] if isinstance(outputs, tuple) else arguments[0])

    pull = torch.func.vjp(backward, *gradients, *inputs)[1]
    return pull(cotangents)


def is_vmapped(x: torch.Tensor) -> bool:
    """Return whether `x` is mapped by `torch.func.vmap`."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def holds_values(x: torch.Tensor) -> bool:
    """Return whether the values of `x` can be read: not while compiling, and not under `torch.func.vmap`."""
    return not torch.compiler.is_compiling() and not is_vmapped(x)
