"""All checkpoint formats, and the detection of the format of a checkpoint."""

from collections.abc import Mapping

import torch

from .format import CheckpointFormat
from .formats.dfn import DFN
from .formats.flow_transformer import FLOW_TRANSFORMERS
from .formats.flownetwork import FLOW_NETWORKS
from .formats.liquid import LIQUID
from .key_table import Difference, Match, compare_keys, expand, match_shapes

FORMATS: tuple[CheckpointFormat, ...] = (DFN, *FLOW_NETWORKS, *FLOW_TRANSFORMERS, *LIQUID)
MAX_KEY_DIFFERENCE = 0.5  # fraction of differing keys up to which the error names the nearest format


def detect_format(keys: set[str]) -> CheckpointFormat:
    """Return the format whose table has exactly these keys.

    Raises:
        ValueError: no format matches; the message names a missing or unexpected key if a format is near.
    """
    differences = [
        (checkpoint_format, compare_keys(checkpoint_format.table, keys)[1]) for checkpoint_format in FORMATS
    ]
    nearest, difference = min(differences, key=lambda pair: len(pair[1]))
    if not len(difference):
        return nearest
    if len(difference) > MAX_KEY_DIFFERENCE * len(keys):
        known = ", ".join(dict.fromkeys(checkpoint_format.name for checkpoint_format in FORMATS))
        raise ValueError(
            f"unknown checkpoint format (a key is {min(keys)!r}): use one of {known}, or Llama (--from llama)"
        )
    raise ValueError(describe_difference(nearest, difference))


def describe_difference(checkpoint_format: CheckpointFormat, difference: Difference) -> str:
    """Return an error message that names the first key in which a checkpoint differs from the format."""
    if difference.unexpected:
        others = f" and {len(difference.unexpected) - 1} more" if len(difference.unexpected) > 1 else ""
        return (
            f"the checkpoint has the unexpected key {difference.unexpected[0]!r}{others}; the nearest format is "
            f"{checkpoint_format.name}: remove the key, or save only the original's state_dict"
        )
    others = f" and {len(difference.missing) - 1} more" if len(difference.missing) > 1 else ""
    return (
        f"the checkpoint lacks {difference.missing[0]!r}{others} of the nearest format {checkpoint_format.name}: save "
        "the original's complete state_dict"
    )


def match_tensors(checkpoint_format: CheckpointFormat, tensors: Mapping[str, torch.Tensor]) -> Match:
    """Match tensors to a format whose keys they have.

    Raises:
        ValueError: a shape contradicts the other shapes; the message names its key.
    """
    counts, _ = compare_keys(checkpoint_format.table, set(tensors))
    lines = expand(checkpoint_format.table, counts)
    targets = {key: target for key, (_, target) in lines.items()}
    return Match(targets, {**counts, **match_shapes(lines, tensors)})
