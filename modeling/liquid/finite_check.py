"""What is done about infinite and undefined values (Liquid, chapter 4)."""

import torch


def check_finite(x: torch.Tensor, mode: str, where: str) -> torch.Tensor:
    """x as `mode` wants it.

    Args:
        mode: "off" leaves x as it is, "zero" puts 0 in the place of what is not finite, "raise" refuses it.
        where: the place in words, for the error.

    Raises:
        FloatingPointError: x is not finite, and `mode` is "raise".
    """
    if mode == "zero":
        return torch.where(x.isfinite(), x, x.new_zeros(()))
    if mode == "raise" and not x.isfinite().all():
        raise FloatingPointError(
            f"{where}: {int((~x.isfinite()).sum())} of {x.numel()} values are not finite. Lower the learning rate, or "
            'train in float32 or bfloat16; `finite_check="zero"` goes on with zeros in their place.'
        )
    return x
