"""Optional outputs of a forward pass, and terms that change gradients but not values."""

from typing import Any

import torch

from .row_layout import RowLayout


class OutputCollector:
    """Collects the optional outputs of one forward pass, layer by layer.

    Args:
        rows: layout of the call's rows, with which `add_hidden_states` scatters states back to the input's columns.
        kept: for each output by name, whether to keep it.
    """

    def __init__(self, rows: RowLayout, **kept: bool):
        self.rows = rows
        self._collected: dict[str, list[Any]] = {name: [] for name, keep in kept.items() if keep}

    def keeps(self, name: str) -> bool:
        """Whether the output is kept. Check this before computing an expensive one."""
        return name in self._collected

    def add(self, **values: Any) -> None:
        """Append one layer's outputs; those that are not kept are ignored."""
        for name, value in values.items():
            if name in self._collected:
                self._collected[name].append(value)

    def add_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Append states `[B, M, D]`, padded, as `hidden_states`.

        Returns:
            The states to continue with. They are gathered back from the padded ones if those are kept, so that a loss
            on a later layer has a gradient at the returned hidden states.
        """
        if not self.keeps("hidden_states"):
            return hidden_states
        columns, hidden_states = self.rows.pad_with_grad(hidden_states)
        self.add(hidden_states=columns)
        return hidden_states

    def get(self, name: str) -> tuple[Any, ...] | None:
        """All layers' values of one output; None if it is not kept."""
        return tuple(self._collected[name]) if name in self._collected else None


def add_grad_only(value: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """`value + x - x.detach()`: equal to `value` up to rounding, with the gradient of `value + x`.

    Used for losses that train a part of the model without changing the reported loss, and for straight-through
    estimators.
    """
    return value + x - x.detach()
