"""Checkpoints with random weights in an original's key layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dfn_hf.conversion.key_table import Table, evaluate, expand

SCALE = 0.3  # of weights: large enough that every part moves the output


def random_weights(table: Table, sizes: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Weights of the table's keys, the same ones each time.

    Args:
        sizes: of the table's letters.
        counts: of its placeholders.
    """
    generator = torch.Generator().manual_seed(0)
    return {
        key: SCALE * torch.randn([evaluate(word, sizes) for word in shape.split()], generator=generator)
        for key, (shape, _) in expand(table, counts).items()
    }


def save_checkpoint(path: Path, weights: Mapping[str, torch.Tensor], **beside: Any) -> Path:
    """Save as the originals' training scripts do, with what they keep beside the weights."""
    torch.save({"model_state_dict": dict(weights), "epoch": 3, **beside}, path)
    return path
