"""Checks of a DFN's neighbour search before each call."""

import torch

from .configuration_dfn import SEARCHES, DFNConfig


def check_search(config: DFNConfig) -> None:
    """Check that `search_implementation`, which may change between calls, is known and fits an export.

    Raises:
        ValueError: the value is unknown, or the model cannot be exported.
    """
    if config.search_implementation not in SEARCHES:
        raise ValueError(f"`search_implementation` must be one of {SEARCHES}, got {config.search_implementation!r}.")
    if torch.compiler.is_exporting():
        check_export(config)


def check_export(config: DFNConfig) -> None:
    """Check that the model can be exported.

    Raises:
        ValueError: an ONNX export, `entity_sampling` other than "token", or a search other than "exact".
    """
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            "A DFN cannot be exported to ONNX, which has no operator for reading the bits of a distance: use "
            "`torch.export.export`."
        )
    if config.entity_sampling != "token":
        raise ValueError(
            f"A DFN with `entity_sampling={config.entity_sampling!r}` cannot be exported, because the number of "
            "entities depends on the input: export a model with `entity_sampling='token'`."
        )
    if config.search_implementation != "exact":
        raise ValueError(
            f"A DFN with `search_implementation={config.search_implementation!r}` cannot be exported, because the "
            "control flow of its search depends on the input: set "
            "`model.config.search_implementation = 'exact'` first."
        )
