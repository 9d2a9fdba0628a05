"""Effect of quantization on the loss of the bundled checkpoints."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)

from dfn_hf.assets.corpus import load_corpus
from dfn_hf.assets.verses import load_verses
from dfn_hf.data.pairs import encode_pairs
from dfn_hf.evaluation.language_model import evaluate_causal_lm
from dfn_hf.loading.bundled import checkpoint_path
from dfn_hf.loading.models import load_config

from ..harness.environment import describe_machine
from ..harness.results import ResultsFile, markdown_table
from .translation import validation_loss

CHECKPOINTS = ("dfn-tiny", "flownetwork-tiny", "liquid-tiny")
FORMATS = ("bfloat16", "bitsandbytes int8", "bitsandbytes NF4", "torchao int8 weights", "torchao int8 dynamic")


@dataclass(frozen=True)
class QuantizationSettings:
    """One checkpoint in one of `FORMATS` or in float32.

    Attributes:
        documents: number of validation texts of a language model.
        pairs: number of validation pairs of an encoder-decoder.
    """

    checkpoint: str = "dfn-tiny"
    format: str = "float32"
    documents: int = 64
    pairs: int = 256


@dataclass(frozen=True)
class QuantizationResult:
    """Loss in nats per token, number of quantized linear layers, and number of linear layers."""

    loss: float
    quantized: int
    linear: int
    machine: str


def loading_options(name: str, checkpoint: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a format.

    Raises:
        ValueError: the format is unknown.
    """
    if name == "float32":
        return {}
    if name == "bfloat16":
        return {"dtype": torch.bfloat16}
    if name == "bitsandbytes int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if name == "bitsandbytes NF4":
        skipped = four_bit_exceptions(checkpoint)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
        return {"quantization_config": nf4}
    if name.startswith("torchao int8 "):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

        dynamic = name.endswith("dynamic")
        return {
            "quantization_config": TorchAoConfig(
                Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
            )
        }
    raise ValueError(f"format is {name!r}: choose one of float32, {', '.join(FORMATS)}")


def four_bit_exceptions(checkpoint: str) -> list[str] | None:
    """Return the modules to leave unquantized: 4-bit CPU kernels need inputs in multiples of 64, outputs of 32."""
    maps = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "lm_head"]
    return maps if load_config(checkpoint).intermediate_size % 64 else None


def measure_quantization(settings: QuantizationSettings) -> QuantizationResult:
    """Load the checkpoint in the format and evaluate its loss on the validation split."""
    path = checkpoint_path(settings.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(path)
    seq2seq = load_config(settings.checkpoint).is_encoder_decoder
    auto_class = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = auto_class.from_pretrained(path, **loading_options(settings.format, settings.checkpoint)).eval()
    if seq2seq:
        loss = loss_on_verses(model, tokenizer, settings.pairs)
    else:
        loss = loss_on_corpus(model, tokenizer, settings.documents)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return QuantizationResult(
        loss=loss,
        quantized=sum(is_quantized(module) for module in linear),
        linear=len(linear),
        machine=describe_machine("cpu"),
    )


def loss_on_corpus(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> float:
    documents = load_corpus("validation")[:count]["text"]
    return evaluate_causal_lm(model, tokenizer, documents).loss


def loss_on_verses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> float:
    verses = load_verses("validation")
    pairs = encode_pairs(verses.select(range(min(count, len(verses)))), tokenizer, max_length=80)
    return validation_loss(model, pairs, DataCollatorForSeq2Seq(tokenizer, model))


def is_quantized(linear: nn.Linear) -> bool:
    """Return whether the module is of bitsandbytes or its weight of torchao."""
    return type(linear) is not nn.Linear or type(linear.weight.data) is not torch.Tensor


def run_quantization(
    runs: Iterable[QuantizationSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[QuantizationSettings, QuantizationResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, QuantizationSettings, QuantizationResult)

    def measure(settings: QuantizationSettings) -> QuantizationResult:
        report(f"{settings.checkpoint} in {settings.format}")
        return measure_quantization(settings)

    return [(run, results.run(run, measure)) for run in runs]


def quantization_table(results: list[tuple[QuantizationSettings, QuantizationResult]]) -> str:
    """Return a table with one row per checkpoint: its float32 loss and the increase of each format."""
    found = {(run.checkpoint, run.format): result for run, result in results}
    formats = [name for name in FORMATS if any(run.format == name for run, _ in results)]
    lines = []
    for checkpoint in dict.fromkeys(run.checkpoint for run, _ in results):
        whole = found[checkpoint, "float32"]
        cells = []
        for name in formats:
            result = found[checkpoint, name]
            share = f" ({result.quantized} of {result.linear})" if result.quantized else ""
            cells.append(f"{result.loss - whole.loss:+.4f}{share}")
        lines.append((checkpoint, f"{whole.loss:.4f}", *cells))
    return markdown_table(("checkpoint", "float32", *formats), lines)
