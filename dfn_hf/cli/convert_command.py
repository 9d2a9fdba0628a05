"""Checkpoints of other makers as transformers folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..conversion.llama import llama_to_dfn
from ..conversion.plan import plan_conversion
from ..conversion.report import ConversionReport
from ..hub.loading import check_tokenizer_files, clear_hub_errors, resolve_source
from ..hub.model_card import conversion_card
from ..hub.output_folder import whole_folder

LLAMA_SETTINGS = ("position_dim", "num_neighbors", "local_window")


def convert(
    source: str | Path, output: str | Path, *, native: bool = False, settings: Mapping[str, Any] | None = None
) -> ConversionReport:
    """Write a native checkpoint of DFN, Liquid or FlowNetwork as a transformers folder, whole or not at all.

    Args:
        source: file that an original saved: `.pt`, `.pth`, `.bin` or `.safetensors`. No code in it is run.
        output: a folder that does not exist, or an empty one.
        native: write a model that computes the original's function, not this package's causal one.
        settings: arguments of the original's constructor that its weights don't show, such as `{"num_heads": 8}`;
            without them as in the file, or the original's defaults.

    Returns:
        What became of every key; saved beside the model as `conversion_report.json`.

    Raises:
        ValueError: the source cannot be read, or fits no known layout; a setting without meaning; or `output` holds
            something.
        OSError: the disk is full.
    """
    source, output = Path(source), Path(output)
    check_new(output)
    conversion = plan_conversion(source, native=native, settings=settings)
    with whole_folder(output) as folder:
        conversion.write(folder)
        card = conversion_card(conversion.config, conversion.report, name=output.resolve().name, source=source.name)
        card.save(folder / "README.md")
    return conversion.report


def convert_llama(
    source: str | Path, output: str | Path, *, settings: Mapping[str, int] | None = None
) -> ConversionReport:
    """Write the DFN that starts from a Llama, a Mistral or a Qwen3 as a transformers folder, whole or not at all.

    `dfn_hf.training.distillation.distill_model` then fits its attention to the source's.

    Args:
        source: a transformers folder, an embedded checkpoint's name, or a Hub id; its tokenizer comes along.
        output: a folder that does not exist, or an empty one.
        settings: `position_dim`, `num_neighbors`, `local_window`: fields of `DFNConfig`.

    Returns:
        What became of every weight; saved beside the model as `conversion_report.json`.

    Raises:
        ValueError: another family, parts that a DFN has no place for, an unknown setting, or `output` holds something.
        OSError: the disk is full.
    """
    output, settings = Path(output), dict(settings or {})
    check_new(output)
    for name in settings:
        if name not in LLAMA_SETTINGS:
            raise ValueError(f"{name} has no meaning for a Llama: it takes {', '.join(LLAMA_SETTINGS)}")
    path = resolve_source(str(source))
    check_tokenizer_files(path, str(source))
    with clear_hub_errors(path):
        model, report = llama_to_dfn(path, **settings)
        tokenizer = AutoTokenizer.from_pretrained(path)
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report.save(folder)
        conversion_card(model.config, report, name=output.resolve().name, source=str(source)).save(
            folder / "README.md"
        )
    return report


def check_new(output: Path) -> None:
    """Raise ValueError unless a model may be written to `output`."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise ValueError(f"{output} exists already: choose a new folder, or remove it")
