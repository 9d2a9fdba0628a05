"""Checkpoints with random weights in the key layouts of the original models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dfn_hf.conversion.detect import FORMATS
from dfn_hf.conversion.key_table import Table, evaluate, expand

SCALE = 0.3  # standard deviation of weights, large enough that every module changes the output
SIZES = {
    "dfn": {"D": 12, "F": 8, "I": 10, "M": 5, "R": 50},
    "flownetwork": {"V": 11, "D": 9, "M": 20, "P": 7, "G": 6, "L": 5, "K": 8, "Y": 18, "C": 2, "X": 9},
    "liquid": {"V": 29, "E": 16, "L": 24, "F": 20, "X": 3, "Q": 10, "K": 8, "D": 2, "R": 1, "P": 9},
}
COUNTS = dict.fromkeys(("layer", "encoder_layer", "decoder_layer", "encoder_expert", "lstm_layer"), 2) | {"expert": 3}
NAMES_IN_DOCS = {"dfn_pure_epoch_010.pt": "dfn", "best_model.pth": "liquid-L6", "flow.pt": "flownetwork-F5"}


def random_weights(table: Table, sizes: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return weights for the table's keys, the same each time.

    Args:
        table: shapes by key.
        sizes: value of each size letter of the table.
        counts: number of values of each placeholder of the table.
    """
    generator = torch.Generator().manual_seed(0)
    return {
        key: SCALE * torch.randn([evaluate(word, sizes) for word in shape.split()], generator=generator)
        for key, (shape, _) in expand(table, counts).items()
    }


def save_checkpoint(path: Path, weights: Mapping[str, torch.Tensor], **beside: Any) -> Path:
    """Save a checkpoint like the original training scripts, with additional entries `beside`."""
    torch.save({"model_state_dict": dict(weights), "epoch": 3, **beside}, path)
    return path


def random_checkpoint(path: Path, name: str) -> Path:
    """Write a small checkpoint of the first layout with this name; returns its path."""
    layout = next(layout for layout in FORMATS if layout.name == name)
    weights = random_weights(layout.table, SIZES[name.partition("-")[0]], COUNTS)
    return save_checkpoint(path, weights, stoi={letter: number for number, letter in enumerate("\n abcdefgh")})


def save_those_in_docs(folder: Path, text: str) -> None:
    """Write the checkpoints that the commands of a documentation page `text` refer to."""
    for file_name, layout in NAMES_IN_DOCS.items():
        if file_name in text:
            random_checkpoint(folder / file_name, layout)
