"""Language modelling on long windows of contiguous text: loss by position for models of equal size."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from dfn_hf.assets.corpus import load_corpus
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.data.text import load_text
from dfn_hf.data.tokens import token_ids

from ..baselines.models import ModelSize, build_model, count_parameters
from ..datasets.token_windows import TokenWindows
from ..harness.environment import describe_machine
from ..harness.lr_search import run_at_best_rates
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..harness.training_loop import fit

BUNDLED_CORPUS = "corpus"
TOKENIZERS = ("bpe", "byte")  # byte-level tokenizers: the number of bytes per token is known
INITIAL_BUCKET = 256
HELD_OUT_FRACTION = 0.05
REPORT_EVERY = 20


@dataclass(frozen=True)
class LongLMSettings:
    """One training run. Weights are initialised with standard deviation 1/sqrt(hidden_size).

    Attributes:
        intermediate_size: of the DFN; the other models match its number of parameters.
        evaluation_windows: maximum number of held-out windows, evenly spaced.
        data: a file or folder of texts, or "corpus" for the bundled corpus.
    """

    model: str = "dfn"
    seed: int = 0
    learning_rate: float = 3e-3
    steps: int = 600
    batch_size: int = 1
    length: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 384
    evaluation_windows: int = 64
    tokenizer: str = "bpe"
    data: str = BUNDLED_CORPUS
    device: str = "cpu"


@dataclass(frozen=True)
class LongLMResult:
    """Held-out loss by position, and training time in seconds.

    Attributes:
        loss: nats per token over all positions.
        bits_per_byte: bits per byte over all positions.
        bucket_losses: nats per token for each of `position_buckets(length)`.
        bucket_bits_per_byte: bits per byte for each bucket.
        bucket_losses_without_far: nats per token for each bucket with `num_neighbors` 0; None for other models.
        windows: number of held-out windows.
    """

    parameters: int
    loss: float
    bits_per_byte: float
    bucket_losses: list[float]
    bucket_bits_per_byte: list[float]
    bucket_losses_without_far: list[float] | None
    windows: int
    largest_gradient_norm: float
    training_seconds: float
    wall_seconds: float
    machine: str


def measure_long_lm(settings: LongLMSettings, report: Callable[[str], None] = lambda line: None) -> LongLMResult:
    """Train a model on random windows of the training text; evaluate it on non-overlapping held-out windows.

    Raises:
        ValueError: the tokenizer is unknown, there is only one document, or every document is shorter than `length`.
    """
    train, held_out = token_documents(settings.data, settings.tokenizer)
    train_windows, held_out_windows = (TokenWindows(documents, settings.length) for documents in (train, held_out))
    tokenizer = load_tokenizer(settings.tokenizer)
    set_seed(settings.seed)
    size = ModelSize(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
    )
    model = build_model(settings.model, size, device=settings.device)
    started = time.perf_counter()

    def announce(step: int) -> None:
        report(
            f"{settings.model}, learning rate {settings.learning_rate:g}, seed {settings.seed}: "
            f"step {step} of {settings.steps}, {time.perf_counter() - started:.0f} s"
        )

    trained = fit(
        model,
        train_windows.random_batches(settings.batch_size, settings.seed),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        evaluate_every=REPORT_EVERY,
        evaluate=announce,
    )
    losses, targets = held_out_losses(
        model, held_out_windows.consecutive_batches(settings.evaluation_windows, settings.batch_size)
    )
    num_bytes = token_bytes(tokenizer)[targets]
    buckets = position_buckets(settings.length)
    return LongLMResult(
        parameters=count_parameters(model),
        loss=losses.mean().item(),
        bits_per_byte=bits_per_byte(losses, num_bytes),
        bucket_losses=[losses[:, bucket].mean().item() for bucket in buckets],
        bucket_bits_per_byte=[bits_per_byte(losses[:, bucket], num_bytes[:, bucket]) for bucket in buckets],
        bucket_losses_without_far=_bucket_losses_without_far(model, held_out_windows, settings),
        windows=len(losses),
        largest_gradient_norm=round(trained.largest_gradient_norm, 3),
        training_seconds=round(trained.seconds, 1),
        wall_seconds=round(trained.wall_seconds, 1),
        machine=describe_machine(settings.device),
    )


@torch.no_grad()
def held_out_losses(
    model: PreTrainedModel, batches: Iterator[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss in nats and the id of each predicted token, float64 and int64 `[windows, length - 1]`."""
    losses, targets = [], []
    for batch in batches:
        input_ids = batch["input_ids"].to(model.device)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].transpose(1, 2).float()
        losses.append(torch.nn.functional.cross_entropy(logits, input_ids[:, 1:], reduction="none").double().cpu())
        targets.append(batch["input_ids"][:, 1:])
    return torch.cat(losses), torch.cat(targets)


def position_buckets(length: int) -> list[slice]:
    """Return slices of `held_out_losses` for the positions 1 to 255, 256 to 511, 512 to 1,023, … of a window."""
    edges = [1, *(edge for power in range(20) if (edge := INITIAL_BUCKET << power) < length), length]
    return [slice(first - 1, end - 1) for first, end in itertools.pairwise(edges)]


def bits_per_byte(losses: torch.Tensor, num_bytes: torch.Tensor) -> float:
    """Convert losses in nats per token to bits per byte; `num_bytes` has the shape of `losses`."""
    return (losses.sum() / num_bytes.sum()).item() / math.log(2)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the number of bytes of each token of a byte-level tokenizer, int64 `[vocab_size]`."""
    # A byte-level tokenizer maps each byte to one printable character.
    return torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])


@cache
def token_documents(data: str, tokenizer_name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the tokens of the training documents and of the held-out documents, int32 arrays.

    The bundled corpus (`data` "corpus") holds out its validation split; other texts hold out the last documents, at
    least 5 % of all tokens.

    Raises:
        ValueError: the tokenizer is unknown, or there is only one document.
    """
    if tokenizer_name not in TOKENIZERS:
        raise ValueError(f"tokenizer is {tokenizer_name!r}: choose one of {', '.join(TOKENIZERS)}")
    tokenizer = load_tokenizer(tokenizer_name)

    def tokens(texts: Iterable[str]) -> list[np.ndarray]:
        return [np.array(token_ids(text, tokenizer), dtype=np.int32) for text in texts]

    if data == BUNDLED_CORPUS:
        return tokens(load_corpus("train")["text"]), tokens(load_corpus("validation")["text"])
    documents = tokens(load_text(data)["text"])
    if len(documents) < 2:
        raise ValueError(
            f"data {data!r} has one document, but one more is needed as held-out text: pass several documents"
        )
    sizes = np.cumsum([len(document) for document in documents])
    kept = max(1, int(np.searchsorted(sizes, (1 - HELD_OUT_FRACTION) * sizes[-1], side="right")))
    return documents[:kept], documents[kept:]


def run_long_lm(
    settings: LongLMSettings,
    *,
    models: Sequence[str],
    seeds: Iterable[int],
    learning_rates: Sequence[float],
    search_steps: int,
    path: Path,
    report: Callable[[str], None] = lambda line: None,
) -> list[tuple[LongLMSettings, LongLMResult]]:
    """Measure every model with every seed on the same batches, at its best learning rate; see `run_at_best_rates`.

    Finished runs are read from the CSV at `path`.
    """
    return run_at_best_rates(
        ResultsFile(path, LongLMSettings, LongLMResult),
        settings,
        measure_long_lm,
        models=models,
        seeds=seeds,
        learning_rates=learning_rates,
        search_steps=search_steps,
        report=report,
    )


def long_lm_table(results: list[tuple[LongLMSettings, LongLMResult]]) -> str:
    """Return a table of the loss by position and a table of the runs: mean ± standard error over seeds."""
    settings = results[0][0]
    buckets = position_buckets(settings.length)
    positions = [f"{bucket.start + 1 if bucket.start else 0:,}–{bucket.stop:,}" for bucket in buckets]
    names = list(dict.fromkeys(run.model for run, _ in results))
    found = {name: [result for run, result in results if run.model == name] for name in names}

    def per_bucket(unit: str, values: Callable[[LongLMResult], list[float] | None]) -> list[tuple[str, ...]]:
        lines = []
        for name in names:
            measured = [values(one) for one in found[name]]
            if all(value is not None for value in measured):
                columns = zip(*measured, strict=True)
                lines.append((name, unit, *(mean_with_error(list(column)) for column in columns)))
        return lines

    lines = per_bucket("nats per token", lambda one: [*one.bucket_losses, one.loss])
    lines += per_bucket("bits per byte", lambda one: [*one.bucket_bits_per_byte, one.bits_per_byte])
    without_far = per_bucket("nats per token, K = 0", lambda one: one.bucket_losses_without_far)
    lines += [(*line, "") for line in without_far]
    by_position = markdown_table(("model", "metric by position", *positions, "all"), lines)
    header = ("model", "parameters", "learning rate", "seeds", "million tokens", "CPU ms per step")
    of_runs = []
    for name in names:
        runs = [run for run, _ in results if run.model == name]
        tokens = runs[0].steps * runs[0].batch_size * runs[0].length
        of_runs.append(
            (
                name,
                f"{found[name][0].parameters:,}",
                f"{runs[0].learning_rate:g}",
                str(len(runs)),
                f"{tokens / 1e6:.2f}",
                mean_with_error([1000 * one.training_seconds / runs[0].steps for one in found[name]], digits=0),
            )
        )
    return f"{by_position}\n\n{markdown_table(header, of_runs)}"


def _bucket_losses_without_far(
    model: PreTrainedModel, held_out: TokenWindows, settings: LongLMSettings
) -> list[float] | None:
    if not hasattr(model.config, "num_neighbors"):
        return None
    model.config.num_neighbors = 0
    losses, _ = held_out_losses(model, held_out.consecutive_batches(settings.evaluation_windows, settings.batch_size))
    return [losses[:, bucket].mean().item() for bucket in position_buckets(settings.length)]
