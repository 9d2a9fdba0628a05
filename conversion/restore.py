"""Conversion of a converted folder back to the keys of the original."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checkpoint_file import common_prefix
from .detect import FORMATS
from .key_table import compare_keys, expand, restore_target
from .report import read_report


def restore_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the weights of a folder that `dfn-hf convert` wrote, under the keys of the original.

    Args:
        folder: converted folder with its `conversion_report.json`; the weights may have been trained since.

    Returns:
        Weights by key of the original, without the prefixes of wrappers. A native model restores all keys. Other
        models restore the keys whose values were converted completely; load them with `strict=False`.

    Raises:
        ValueError: the folder contains no report, or was not converted from an original.
    """
    folder = Path(folder)
    report = read_report(folder)
    keys = {*report.mapped, *report.dropped}
    prefix = common_prefix(keys)
    keys = {key.removeprefix(prefix) for key in keys}
    candidates = [one for one in FORMATS if one.name == report.layout and not len(compare_keys(one.table, keys)[1])]
    if not candidates:
        raise ValueError(
            f"{folder} was converted from {report.layout}, which cannot be restored: pass a folder that was converted "
            "from an original checkpoint"
        )
    source_format = candidates[0]
    native = source_format.native is not None and report.model == source_format.native.model.__name__
    lines = expand(source_format.table, compare_keys(source_format.table, keys)[0])
    weights = read_weights(folder)
    restored = {key: restore_target(key if native else target, weights) for key, (_, target) in lines.items()}
    return {key: tensor for key, tensor in restored.items() if tensor is not None}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a transformers folder.

    Raises:
        ValueError: the folder contains no weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} contains neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}: pass a converted folder"
        )
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}
    return weights
