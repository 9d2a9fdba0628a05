"""Checkpoints with random weights in an original's key layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dfn_hf.conversion.detect import LAYOUTS
from dfn_hf.conversion.key_table import Table, evaluate, expand

SCALE = 0.3  # of weights: large enough that every part moves the output
SIZES = {
    "dfn": {"D": 12, "F": 8, "I": 10, "M": 5, "R": 50},
    "flownetwork": {"V": 11, "D": 9, "M": 20, "P": 7, "G": 6, "L": 5, "K": 8, "Y": 18, "C": 2, "X": 9},
    "liquid": {"V": 29, "E": 16, "L": 24, "F": 20, "X": 3, "Q": 10, "K": 8, "D": 2, "R": 1, "P": 9},
}
COUNTS = dict.fromkeys(("layer", "encoder_layer", "decoder_layer", "encoder_expert", "lstm_layer"), 2) | {"expert": 3}
NAMES_IN_DOCS = {"dfn_pure_epoch_010.pt": "dfn", "best_model.pth": "liquid-L6", "flow.pt": "flownetwork-F5"}


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


def random_checkpoint(path: Path, name: str) -> Path:
    """A small checkpoint of the first layout of that name."""
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    weights = random_weights(layout.table, SIZES[name.partition("-")[0]], COUNTS)
    return save_checkpoint(path, weights, stoi={letter: number for number, letter in enumerate("\n abcdefgh")})


def save_those_in_docs(folder: Path, text: str) -> None:
    """The files that a page's commands take for granted, of those that `text` names."""
    for file_name, layout in NAMES_IN_DOCS.items():
        if file_name in text:
            random_checkpoint(folder / file_name, layout)
