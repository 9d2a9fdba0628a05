"""Compares the weights of a saved model with its configuration before memory is allocated for them."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from .config_check import numbers
from .errors import explain_damage
from .model_files import find_file
from .weight_files import FILE_NAMES, Header, read_headers, warn_about_changes, weight_files

# Fields that count layers with weights of their own.
LAYERS = re.compile(r"(n|num)(_hidden|_encoder|_decoder|_lstm)?_layers?|(encoder|decoder)_layers")
SHOWN = 3  # names of weights in a message
REMEDY = "use the config.json and the weights of one save_pretrained call, or copy or download both again"


def check_weights(path: str, config: PreTrainedConfig, auto_class: Any) -> None:
    """Compare the headers of the weight files with a model without storage.

    transformers itself matches the names, so that its renamings, tied weights and ignored names count. The weights of
    a quantized model change their shapes and are not compared. A file that differs from its record in the manifest of
    the folder is logged.

    Args:
        path: a folder or a Hub id.
        config: the configuration at `path`.
        auto_class: the Auto class, or the model class, by which the model will be loaded.

    Raises:
        ValueError: the folder holds no weights; weights are missing, unexpected, of another shape or not
            floating-point; or a file is damaged.
    """
    explicit = getattr(config, "transformers_weights", None)
    files = weight_files(path, explicit)
    if not files and Path(path).is_dir() and find_file(path, "adapter_config.json") is None:
        name = explicit or FILE_NAMES[0]
        raise ValueError(f"{path} holds no weights ({name}): save, copy or download the model again")
    if files and getattr(config, "quantization_config", None) is None:
        compare_headers(path, files, config, auto_class)
    warn_about_changes(path, files)


def compare_headers(path: str, files: list[Path], config: PreTrainedConfig, auto_class: Any) -> None:
    """Raise ValueError unless the headers of `files` fit a model of this configuration; see `check_weights`."""
    headers = read_headers(files)
    place = str(files[0]) if len(files) == 1 else f"the {len(files)} weight files in {path}"
    check_layer_counts(config, len(headers), place)
    with explain_damage(f"{path}/config.json"), torch.device("meta"):
        is_auto_class = not issubclass(auto_class, PreTrainedModel)
        model_class = type(auto_class.from_config(config, trust_remote_code=False)) if is_auto_class else auto_class
    with explain_damage(f"{path}/config.json"), without_load_report():
        tensors = {name: torch.empty(header.shape, device="meta") for name, header in headers.items()}
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_loading_info(found, place)
    check_types(headers, model.state_dict(), place)


def check_layer_counts(config: PreTrainedConfig, num_weights: int, place: str) -> None:
    """Raise ValueError for more layers than weights, because a model with a thousand layers takes long to build.

    Args:
        config: the configuration.
        num_weights: number of stored weights.
        place: the file or the folder of the weights, for the message.
    """
    for field, value in numbers(config.to_dict()):
        if LAYERS.fullmatch(field.rpartition(".")[2]) and value > num_weights:
            raise ValueError(
                f"{place} does not fit config.json: it holds too few weights ({num_weights}) for {field} = {value}: "
                f"{REMEDY}"
            )


def check_loading_info(found: Mapping[str, Any], place: str) -> None:
    """Raise ValueError for missing, unexpected and mismatched weights.

    Args:
        found: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
        place: the file or the folder of the weights, for the message.
    """
    mismatched = [
        f"{name} is {list(stored)}, not {list(expected)}"
        for name, stored, expected in sorted(found["mismatched_keys"], key=lambda entry: str(entry[0]))
    ]
    problems = [
        describe(found["missing_keys"], "weight is missing", "weights are missing"),
        describe(found["unexpected_keys"], "weight is unexpected", "weights are unexpected"),
        describe(mismatched, "weight has another shape", "weights have other shapes"),
    ]
    if any(problems):
        raise ValueError(f"{place} does not fit config.json: {', '.join(filter(None, problems))}: {REMEDY}")


def describe(names: Iterable[str], singular: str, plural: str) -> str:
    """Return the number of weights, what is wrong with them and the first names; an empty string for no weights."""
    ordered = sorted(map(str, names))
    if not ordered:
        return ""
    first = ", ".join(name[:200] for name in ordered[:SHOWN]) + (", …" if len(ordered) > SHOWN else "")
    return f"{len(ordered)} {singular if len(ordered) == 1 else plural} ({first})"


def check_types(headers: Mapping[str, Header], expected: Mapping[str, torch.Tensor], place: str) -> None:
    """Raise ValueError if a weight that the model computes with is not stored as floating-point numbers."""
    wrong = [
        name
        for name, header in headers.items()
        if name in expected and expected[name].is_floating_point() and not header.is_float
    ]
    if wrong:
        verdict = describe(wrong, "weight is not a floating-point tensor", "weights are not floating-point tensors")
        raise ValueError(f"{place} does not fit config.json: {verdict}: {REMEDY}")


@contextmanager
def without_load_report() -> Iterator[None]:
    """Hide transformers' table of missing weights and its progress bar while the names are compared.

    `check_loading_info` raises an error for everything that the table would report.
    """
    logger, bar = logging.getLogger("transformers.modeling_utils"), is_progress_bar_enabled()
    disable_progress_bar()
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)
        if bar:
            enable_progress_bar()


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
