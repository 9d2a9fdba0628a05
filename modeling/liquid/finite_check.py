"""Treatment of infinite and NaN values (Liquid paper, chapter 4)."""

import torch


def check_finite(x: torch.Tensor, mode: str, where: str) -> torch.Tensor:
    """Check x for infinite and NaN values.

    Args:
        x: any tensor.
        mode: "off" returns x unchanged, "zero" replaces infinite and NaN values by 0, "raise" raises an error.
        where: name of the sub-block, for the error.

    Raises:
        FloatingPointError: x has a value that is not finite, and `mode` is "raise".
    """
    if mode == "zero":
        return torch.where(x.isfinite(), x, x.new_zeros(()))
    if mode == "raise" and not x.isfinite().all():
        raise FloatingPointError(
            f"{where}: {int((~x.isfinite()).sum())} of {x.numel()} values are not finite; lower the learning rate, "
            'train in float32 or bfloat16, or set `finite_check="zero"` to replace them by zeros.'
        )
    return x
