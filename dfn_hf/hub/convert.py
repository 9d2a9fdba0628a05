"""Conversion of checkpoints of the original implementations, and of Llama models, to transformers folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from ..conversion.llama import llama_to_dfn
from ..conversion.plan import plan_conversion
from ..conversion.report import ConversionReport
from ..loading.config_check import load_checked_config
from ..loading.errors import explain_hub_errors
from ..loading.model_path import resolve_source
from ..loading.tokenizer_files import check_tokenizer_files, load_checked_tokenizer
from ..loading.weights_check import check_weights
from ..registration import register_families
from ..storage.output_folder import atomic_output_dir, prepare_new_folder
from .model_card import conversion_card

LLAMA_SETTINGS = ("position_dim", "num_neighbors", "local_window")


def convert(
    source: str | Path, output: str | Path, *, native: bool = False, settings: Mapping[str, Any] | None = None
) -> ConversionReport:
    """Convert an original checkpoint of DFN, Liquid or FlowNetwork to a transformers folder.

    The folder is written completely or not at all.

    Args:
        source: file that an original implementation saved: `.pt`, `.pth`, `.bin` or `.safetensors`. No code in it is
            executed.
        output: new or empty folder.
        native: write a model that computes the original function, instead of the causal model of this package.
        settings: arguments of the original constructor that the weights do not determine, such as
            `{"num_heads": 8}`; the defaults are the values in the file, then those of the original implementation.

    Returns:
        The mapping of every key; also saved in the folder as `conversion_report.json`.

    Raises:
        ValueError: the source cannot be read or has no known layout, a setting is unknown, or `output` is not empty.
        OSError: the disk is full.
    """
    source, output = Path(source), Path(output)
    prepare_new_folder(output)
    register_families()
    conversion = plan_conversion(source, native=native, settings=settings)
    with atomic_output_dir(output) as folder:
        conversion.write(folder)
        card = conversion_card(conversion.config, conversion.report, name=output.resolve().name, source=source.name)
        card.save(folder / "README.md")
    return conversion.report


def convert_llama(
    source: str | Path, output: str | Path, *, settings: Mapping[str, int] | None = None
) -> ConversionReport:
    """Convert a Llama, Mistral or Qwen3 model to a DFN with the same weights outside attention.

    The folder is written completely or not at all. `dfn_hf.training.distillation.distill_model` then fits the
    attention of the DFN to the source.

    Args:
        source: a transformers folder, the name of a bundled checkpoint, or a Hub id; the tokenizer is copied.
        output: new or empty folder.
        settings: `position_dim`, `num_neighbors`, `local_window`: fields of `DFNConfig`.

    Returns:
        The mapping of every weight; also saved in the folder as `conversion_report.json`.

    Raises:
        ValueError: the source is of another family or has parts that a DFN lacks, a setting is unknown, or `output` is
            not empty.
        OSError: the disk is full.
    """
    output, settings = Path(output), dict(settings or {})
    prepare_new_folder(output)
    for name in settings:
        if name not in LLAMA_SETTINGS:
            raise ValueError(f"{name} is not a setting of convert --from llama: use {', '.join(LLAMA_SETTINGS)}")
    path = resolve_source(str(source))
    check_tokenizer_files(path, str(source))
    register_families()
    with explain_hub_errors(path):
        config = load_checked_config(path)  # before the tokenizer, which reads it too
        tokenizer = load_checked_tokenizer(path)
        check_weights(path, config, AutoModelForCausalLM)
        model, report = llama_to_dfn(path, **settings)
    with atomic_output_dir(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report.save(folder)
        card = conversion_card(model.config, report, name=output.resolve().name, source=str(source))
        card.save(folder / "README.md")
    return report
