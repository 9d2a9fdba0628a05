"""The way back: a converted folder under the original's keys."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checkpoint_file import common_prefix
from .detect import LAYOUTS
from .key_table import compare_keys, expand, restore_target
from .report import read_report


def restore_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Weights of a folder that `dfn-hf convert` wrote, as the original's `load_state_dict` takes them.

    Args:
        folder: with its `conversion_report.json`; the weights may have been trained since.

    Returns:
        By the original's key, without the prefix of a wrapper: all keys of a native model; of another those whose
        numbers were taken over whole, for `strict=False`.

    Raises:
        ValueError: the folder holds no report, or not the weights that it names.
    """
    folder = Path(folder)
    report = read_report(folder)
    keys = {*report.mapped, *report.dropped}
    prefix = common_prefix(keys)
    keys = {key.removeprefix(prefix) for key in keys}
    layouts = [one for one in LAYOUTS if one.name == report.layout and not len(compare_keys(one.table, keys)[1])]
    if not layouts:
        raise ValueError(f"{folder} was converted from {report.layout}: only native layouts have keys to go back to")
    layout = layouts[0]
    native = layout.native is not None and report.model == layout.native.model.__name__
    lines = expand(layout.table, compare_keys(layout.table, keys)[0])
    weights = read_weights(folder)
    restored = {key: restore_target(key if native else target, weights) for key, (_, target) in lines.items()}
    return {key: tensor for key, tensor in restored.items() if tensor is not None}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a transformers folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}")
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}
    return weights
