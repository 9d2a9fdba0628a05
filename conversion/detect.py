"""All layouts, and which of them a checkpoint has."""

from collections.abc import Mapping

import torch

from .format import Layout
from .formats.dfn import DFN
from .formats.flow_transformer import FLOW_TRANSFORMERS
from .formats.flownetwork import FLOW_NETWORKS
from .formats.liquid import LIQUID
from .key_table import Difference, Match, compare_keys, expand, match_shapes

LAYOUTS: tuple[Layout, ...] = (DFN, *FLOW_NETWORKS, *FLOW_TRANSFORMERS, *LIQUID)
LIKE = 0.5  # share of the keys in which a checkpoint may differ from a layout and still be a damaged one of it


def detect_layout(keys: set[str]) -> Layout:
    """The layout whose table has exactly these keys.

    Raises:
        ValueError: no layout has; the message names a missing or unexpected key where one is near.
    """
    differences = [(layout, compare_keys(layout.table, keys)[1]) for layout in LAYOUTS]
    nearest, difference = min(differences, key=lambda pair: len(pair[1]))
    if not len(difference):
        return nearest
    if len(difference) > LIKE * len(keys):
        known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
        raise ValueError(f"unknown layout (a key is {min(keys)!r}): known are {known}, and Llama's (--from llama)")
    raise ValueError(describe(nearest, difference))


def describe(layout: Layout, difference: Difference) -> str:
    """A sentence that names the first key in which a checkpoint differs from `layout`."""
    if difference.unexpected:
        others = f" and {len(difference.unexpected) - 1} more" if len(difference.unexpected) > 1 else ""
        return (
            f"{difference.unexpected[0]!r}{others} in the checkpoint is no key of {layout.name}, which it is nearest "
            "to: remove it, or save the original's state_dict alone"
        )
    others = f" and {len(difference.missing) - 1} more" if len(difference.missing) > 1 else ""
    return (
        f"the checkpoint lacks {difference.missing[0]!r}{others}, which {layout.name} has: save the original's whole "
        "state_dict"
    )


def match(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Match:
    """Targets, counts and sizes of `tensors`, whose keys are those of `layout`.

    Raises:
        ValueError: a shape that contradicts the others; the message names its key.
    """
    counts, _ = compare_keys(layout.table, set(tensors))
    lines = expand(layout.table, counts)
    targets = {key: target for key, (_, target) in lines.items()}
    return Match(targets, {**counts, **match_shapes(lines, tensors)})
