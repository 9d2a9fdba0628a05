"""Byte language models with dynamic chunking: DFNs with adaptive and fixed chunks, one entity per byte, and Llamas."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, set_seed

from dfn_hf import DFNConfig, DFNForCausalLM

from ..baselines.models import ModelSize, build_llama, build_model, count_parameters
from ..datasets.byte_windows import VOCAB_SIZE, corpus_windows
from ..harness.environment import describe_machine
from ..harness.flops import operations_per_token
from ..harness.lr_search import run_at_best_rates
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..harness.training_loop import fit
from .byte_lm import validate

SAMPLINGS = {"adaptive": "adaptive", "fixed spans": "uniform"}
EQUAL_COMPUTE = {"dfn of equal compute": "dfn", "llama of equal compute": "llama"}
MODELS = (*SAMPLINGS, "dfn", "llama", *EQUAL_COMPUTE)
EQUAL_COMPUTE_LAYERS = 3  # of the models of equal compute
LETTERS = torch.tensor([byte for byte in range(256) if chr(byte).isascii() and chr(byte).isalpha()])


@dataclass(frozen=True)
class ByteChunkingSettings:
    """One training run.

    The sizes are those of the DFN with one entity per byte; the other models match its number of parameters.
    `entity_rate` to `sampling_local_window` apply to the DFNs with chunks.
    """

    model: str = "adaptive"
    seed: int = 0
    learning_rate: float = 6e-3
    steps: int = 800
    batch_size: int = 4
    length: int = 512
    hidden_size: int = 128
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    intermediate_size: int = 384
    entity_rate: float = 0.18
    sampling_hidden_size: int = 120
    num_entity_layers: int = 2
    num_sample_layers: int = 3
    sample_intermediate_size: int = 16
    sampling_local_window: int = 16
    evaluation_windows: int = 128
    device: str = "cpu"


@dataclass(frozen=True)
class ByteChunkingResult:
    """Measurements on evenly spaced windows of the validation split.

    Attributes:
        parameters: number of trainable parameters.
        operations: floating-point operations of a forward pass per byte; see `operations_per_token`.
        loss: nats per byte.
        top1: top-1 accuracy.
        bytes_per_entity: 1 for models without chunks.
        word_starts: fraction of the first bytes of words that begin an entity.
        word_insides: fraction of the other bytes of words that begin an entity.
        training_seconds: processor time.
        wall_seconds: wall-clock time of the training.
    """

    parameters: int
    operations: float
    loss: float
    top1: float
    bytes_per_entity: float
    word_starts: float
    word_insides: float
    training_seconds: float
    wall_seconds: float
    machine: str


def measure_byte_chunking(
    settings: ByteChunkingSettings, report: Callable[[str], None] = lambda line: None
) -> ByteChunkingResult:
    """Train a model on random windows of the train split and evaluate it on the validation split."""
    set_seed(settings.seed)
    model = build(settings)
    started = time.perf_counter()

    def announce(step: int) -> None:
        report(
            f"{settings.model}, learning rate {settings.learning_rate:g}, seed {settings.seed}: "
            f"step {step} of {settings.steps}, {time.perf_counter() - started:.0f} s"
        )

    trained = fit(
        model,
        corpus_windows("train", settings.length).random_batches(settings.batch_size, settings.seed),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        evaluate=announce,
    )
    windows = corpus_windows("validation", settings.length)
    held_out = list(windows.evenly_spaced_batches(settings.evaluation_windows, settings.batch_size))
    validation = validate(model, iter(held_out))
    rate, word_starts, word_insides = np.mean([placement(model, batch["input_ids"]) for batch in held_out], axis=0)
    operations = [operations_per_token(model, batch["input_ids"].to(settings.device)) for batch in held_out]
    return ByteChunkingResult(
        parameters=count_parameters(model),
        operations=round(np.mean(operations)),
        loss=validation.loss,
        top1=validation.top1,
        bytes_per_entity=round(1 / rate, 3),
        word_starts=round(word_starts, 4),
        word_insides=round(word_insides, 4),
        training_seconds=round(trained.seconds, 1),
        wall_seconds=round(trained.wall_seconds, 1),
        machine=describe_machine(settings.device),
    )


def build(settings: ByteChunkingSettings) -> PreTrainedModel:
    """Build a randomly initialised model; the caller sets the random seed.

    Raises:
        ValueError: the model is unknown, or no width matches the target parameters or operations.
    """
    size = ModelSize(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
    )
    if settings.model in ("dfn", "llama"):
        return build_model(settings.model, size, device=settings.device)
    if settings.model not in MODELS:
        raise ValueError(f"model is {settings.model!r}: choose one of {', '.join(MODELS)}")
    with torch.device("meta"):
        parameters = count_parameters(build_model("dfn", size, device="meta"))
    sampling = SAMPLINGS.get(settings.model, "uniform")
    options = {
        "entity_sampling": sampling,
        # Fixed chunks have a whole number of bytes; rounding down gives at least the entity rate of adaptive chunks.
        "entity_rate": settings.entity_rate if sampling == "adaptive" else 1 / math.floor(1 / settings.entity_rate),
        "hidden_size": settings.sampling_hidden_size,
        "num_hidden_layers": settings.num_entity_layers,
        "num_sample_layers": settings.num_sample_layers,
        "sample_intermediate_size": settings.sample_intermediate_size,
        "local_window": settings.sampling_local_window,
    }

    def sampling_dfn(width: int) -> PreTrainedModel:
        return DFNForCausalLM(DFNConfig(**vars(size) | options | {"intermediate_size": width}))

    sampled = match_width(sampling_dfn, parameters, count_parameters)
    if settings.model in SAMPLINGS:
        return torch.nn.Module.to(sampled, settings.device)

    ids = torch.zeros(1, settings.length, dtype=torch.long)

    def operations(model: PreTrainedModel) -> float:
        return operations_per_token(model, ids)

    def cheap(width: int) -> PreTrainedModel:
        narrow = replace(size, num_hidden_layers=EQUAL_COMPUTE_LAYERS, intermediate_size=width)
        if EQUAL_COMPUTE[settings.model] == "llama":
            return build_llama(narrow)
        return DFNForCausalLM(DFNConfig(**vars(narrow)))

    return torch.nn.Module.to(match_width(cheap, operations(sampled), operations), settings.device)


def match_width(
    make: Callable[[int], PreTrainedModel], target: float, measure: Callable[[PreTrainedModel], float]
) -> PreTrainedModel:
    """Build the model whose width brings a measure closest to its target; the measure is linear in the width.

    Args:
        make: builds the model for a width.
        target: target value of the measure.
        measure: number of parameters or operations of a model.

    Raises:
        ValueError: the model of width 1 exceeds the target.
    """
    minimum, second = (measure(make(width)) for width in (1, 2))
    width = 1 + round((target - minimum) / (second - minimum))
    if width < 1:
        raise ValueError(
            f"the model of width 1 has {minimum:,.0f} parameters or operations, the target is {target:,.0f}: choose "
            "larger sizes"
        )
    return make(width)


@torch.no_grad()
def placement(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[float, float, float]:
    """Return entities per byte, and the fractions of words' first bytes and other bytes that begin an entity.

    Args:
        model: a byte language model.
        input_ids: int64 `[batch, length]`.
    """
    outputs = model(input_ids.to(model.device), use_cache=False)
    boundary_mask = getattr(outputs, "boundary_mask", None)
    if boundary_mask is None:
        return 1.0, 1.0, 1.0
    boundary_mask = boundary_mask.bool().cpu()
    begins = pad(boundary_mask, (1, 0), value=True)[:, :-1]
    letters = torch.isin(input_ids, LETTERS)
    inside = letters & pad(letters, (1, 0))[:, :-1]
    starts = letters & ~inside
    shares = (boundary_mask.float().mean(), begins[starts].float().mean(), begins[inside].float().mean())
    return shares[0].item(), shares[1].item(), shares[2].item()


def run_byte_chunking(
    settings: ByteChunkingSettings,
    *,
    models: Sequence[str],
    seeds: Iterable[int],
    learning_rates: Sequence[float],
    search_steps: int,
    path: Path,
    report: Callable[[str], None] = lambda line: None,
) -> list[tuple[ByteChunkingSettings, ByteChunkingResult]]:
    """Measure every model with every seed on the same batches, at its best learning rate; see `run_at_best_rates`.

    Finished runs are read from the CSV at `path`.
    """
    return run_at_best_rates(
        ResultsFile(path, ByteChunkingSettings, ByteChunkingResult),
        settings,
        measure_byte_chunking,
        models=models,
        seeds=seeds,
        learning_rates=learning_rates,
        search_steps=search_steps,
        report=report,
    )


def byte_chunking_table(results: list[tuple[ByteChunkingSettings, ByteChunkingResult]]) -> str:
    """Return a table with one row per model: mean ± standard error over seeds."""
    header = (
        "model",
        "parameters",
        "learning rate",
        "million operations per byte",
        "bytes per entity",
        "seeds",
        "bits per byte",
        "top-1",
        "boundary at word start",
        "boundary inside word",
        "CPU ms per step",
    )
    lines = []
    for name in dict.fromkeys(run.model for run, _ in results):
        runs = [(run, result) for run, result in results if run.model == name]
        found = [result for _, result in runs]
        sampled = name in SAMPLINGS
        lines.append(
            (
                name,
                f"{found[0].parameters:,}",
                f"{runs[0][0].learning_rate:g}",
                mean_with_error([one.operations / 1e6 for one in found]),
                mean_with_error([one.bytes_per_entity for one in found], digits=2) if sampled else "–",
                str(len(found)),
                mean_with_error([one.loss / math.log(2) for one in found]),
                mean_with_error([one.top1 for one in found]),
                mean_with_error([one.word_starts for one in found]) if sampled else "–",
                mean_with_error([one.word_insides for one in found]) if sampled else "–",
                mean_with_error([1000 * one.training_seconds / run.steps for run, one in runs], digits=0),
            )
        )
    return markdown_table(header, lines)
