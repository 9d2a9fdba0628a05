"""Retrieval of key-value pairs planted in contexts of up to a million random tokens, with a small DFN."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from transformers import DynamicCache

from dfn_hf import DFNForCausalLM
from dfn_hf.modeling.modules.cache import state_layers

from ..datasets.mqar import IGNORED
from ..harness.environment import clock, describe_machine, peak_memory_mib, run_isolated, set_up_device
from ..harness.results import ResultsFile, markdown_table
from ..harness.training_loop import fit
from .associative_recall import DECAY_RATIO, FINE_TUNING_SEED, RecallSettings, train_recall

DEPTHS = (0.01, 0.5, 0.99)
PAIRS_PER_DEPTH = 5
GAP = 8  # tokens between two pairs at one depth
MIN_LENGTH = round(PAIRS_PER_DEPTH * GAP / (1 - max(DEPTHS)))  # room for the pairs at the last depth
CONTEXT_SEED = 70_000


@dataclass(frozen=True)
class RetrievalSettings:
    """One context and the model that reads it. `PAIRS_PER_DEPTH` pairs are planted at each of `DEPTHS`.

    Attributes:
        context: seed offset of the context's tokens.
        num_neighbors: 0 is the control, the same weights without far neighbours.
        num_leaves: leaves of the tree that the search reads, in training and reading.
        steps: training steps of `train_recall`.
        tuning_steps: steps of fine-tuning on `planted_batch`; likewise the other fields with this prefix.
    """

    length: int
    context: int = 0
    num_neighbors: int = 16
    num_leaves: int = RecallSettings.num_leaves
    position_dim: int = 8
    chunk_length: int = 2**16
    seed: int = 0
    vocab_size: int = 64
    steps: int = 600
    tuning_steps: int = 250
    tuning_batch_size: int = 8
    tuning_length: int = 1024
    tuning_num_pairs: int = 8
    tuning_learning_rate: float = 1e-3
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class RetrievalResult:
    """Retrieval from one context.

    Attributes:
        found: number of correct values at each of `DEPTHS`, out of `PAIRS_PER_DEPTH`.
        seconds: time to read the context, without the queries.
        peak_mib: peak memory during reading and queries.
        cache_mib: size of the cache after the context.
    """

    found: list[int]
    seconds: float
    peak_mib: float
    cache_mib: float
    machine: str


def planted_batch(
    generator: torch.Generator, *, batch_size: int, length: int, num_pairs: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """Draw a batch like `mqar.recall_batch` with each pair at a random position and its query at a later one.

    In `mqar.recall_batch` the pairs are adjacent, so a model can tell them from filler by their position.

    Returns:
        `input_ids` and `labels`, `[batch_size, length]` int64, as in `mqar.recall_batch`.
    """
    half = vocab_size // 2

    def draw(count: int, chosen: int) -> torch.Tensor:
        return torch.rand(batch_size, count, generator=generator).argsort(dim=1)[:, :chosen]

    keys, values = draw(half, num_pairs), half + draw(half, num_pairs)
    places = 2 * draw(length // 2, 2 * num_pairs).view(batch_size, num_pairs, 2)
    pairs, queries = places.amin(dim=2), places.amax(dim=2)
    is_filler = torch.ones(batch_size, vocab_size).scatter_(1, keys, 0.0)
    input_ids = is_filler.multinomial(length, replacement=True, generator=generator)
    input_ids.scatter_(1, pairs, keys).scatter_(1, pairs + 1, values).scatter_(1, queries, keys)
    labels = torch.full_like(input_ids, IGNORED).scatter_(1, queries + 1, values)
    return {"input_ids": input_ids, "labels": labels}


def planted_batches(seed: int, **task: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield endless batches of one seed; `task` holds the arguments of `planted_batch`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield planted_batch(generator, **task)


def planted_context(
    generator: torch.Generator, length: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw random tokens with `PAIRS_PER_DEPTH` key-value pairs at each of `DEPTHS`.

    Keys come from the lower half of the vocabulary and values from the upper half. The filler contains all tokens
    except the keys of the context.

    Returns:
        The context, int64 `[length]`; keys and values, `[depths, PAIRS_PER_DEPTH]`.

    Raises:
        ValueError: the vocabulary has too few keys, or the context is too short for its pairs.
    """
    half, num_pairs = vocab_size // 2, len(DEPTHS) * PAIRS_PER_DEPTH
    if num_pairs >= half:
        raise ValueError(
            f"vocab_size is {vocab_size}: {num_pairs} pairs need a vocabulary of more than {2 * num_pairs} tokens"
        )
    check_length(length)
    starts = [int(depth * length) + GAP * pair for depth in DEPTHS for pair in range(PAIRS_PER_DEPTH)]
    keys = torch.randperm(half, generator=generator)[:num_pairs]
    values = half + torch.randperm(half, generator=generator)[:num_pairs]
    is_filler = torch.ones(vocab_size).scatter_(0, keys, 0.0)
    context = is_filler.multinomial(length, replacement=True, generator=generator)
    context[starts] = keys
    context[[start + 1 for start in starts]] = values
    return context, keys.view(len(DEPTHS), -1), values.view(len(DEPTHS), -1)


def check_length(length: int) -> None:
    """Raise a ValueError if a context of this length is too short for its pairs."""
    if length < MIN_LENGTH:
        raise ValueError(f"length is {length}: the pairs need a context of at least {MIN_LENGTH} tokens")


@torch.no_grad()
def read_context(model: DFNForCausalLM, context: torch.Tensor, chunk_length: int) -> DynamicCache:
    """Read `context` `[length]` in chunks and return the cache."""
    state = DynamicCache(config=model.config)
    for chunk in context[None].split(chunk_length, dim=1):
        model(input_ids=chunk, past_key_values=state, logits_to_keep=1)
    return state


@torch.no_grad()
def answer_queries(model: DFNForCausalLM, state: DynamicCache, keys: torch.Tensor) -> torch.Tensor:
    """Return the top-1 prediction after each of `keys` `[num_keys]`; each key is removed from the cache again."""
    state.activate_past_recording()
    answers = []
    for key in keys.view(-1, 1, 1):
        answers.append(model(input_ids=key, past_key_values=state).logits[0, -1].argmax())
        state.crop(-1)
    return torch.stack(answers)


def cache_mib(state: DynamicCache) -> float:
    """Return the size of the tensors in a cache in MiB."""
    layers = state_layers(state, len(state.layers))
    tensors = [held.data for layer in layers for held in layer.states.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def measure_retrieval(settings: RetrievalSettings, report: Callable[[str], None]) -> RetrievalResult:
    """Train the model once per process, and read one context in a fresh process."""
    unread = replace(settings, length=0, context=0, num_neighbors=RetrievalSettings.num_neighbors)
    return run_isolated(_measure_context, trained_model(unread, report), settings)


@cache
def trained_model(settings: RetrievalSettings, report: Callable[[str], None]) -> DFNForCausalLM:
    """Train the model of these settings; fields of the context have no effect."""
    recall = RecallSettings(
        seed=settings.seed,
        vocab_size=settings.vocab_size,
        steps=settings.steps,
        num_leaves=settings.num_leaves,
        device=settings.device,
    )
    dfn_options = {"position_dim": settings.position_dim, "num_neighbors": settings.num_neighbors}
    model = train_recall(recall, report, **dfn_options).model
    report(f"fine-tuning: {settings.tuning_steps} steps of {settings.tuning_batch_size} x {settings.tuning_length:,}")
    fine_tune(model, settings)
    return model


def fine_tune(model: DFNForCausalLM, settings: RetrievalSettings) -> None:
    """Train `model` on batches of `planted_batch`, whose pairs lie anywhere in a longer row."""
    if settings.tuning_steps == 0:
        return
    batches = planted_batches(
        FINE_TUNING_SEED + settings.seed,
        batch_size=settings.tuning_batch_size,
        length=settings.tuning_length,
        num_pairs=settings.tuning_num_pairs,
        vocab_size=settings.vocab_size,
    )
    fit(
        model,
        batches,
        steps=settings.tuning_steps,
        learning_rate=settings.tuning_learning_rate,
        weight_decay=RecallSettings.weight_decay,
        decay_ratio=DECAY_RATIO,
    )


def run_retrieval(
    runs: Iterable[RetrievalSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[RetrievalSettings, RetrievalResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`.

    Raises:
        ValueError: a context is too short for its pairs; raised before any training.
    """
    runs = list(runs)
    for run in runs:
        check_length(run.length)
    results = ResultsFile(path, RetrievalSettings, RetrievalResult)

    def measure(settings: RetrievalSettings) -> RetrievalResult:
        result = measure_retrieval(settings, report)
        report(
            f"{settings.length:,} tokens, K = {settings.num_neighbors}, context {settings.context}: "
            f"{result.found} of {PAIRS_PER_DEPTH}, {result.seconds:.0f} s"
        )
        return result

    return [(run, results.run(run, measure)) for run in runs]


def retrieval_table(results: list[tuple[RetrievalSettings, RetrievalResult]]) -> str:
    """Return a table with one row per length and number of neighbours: accuracy per depth, time and memory."""
    header = (
        "tokens",
        "K",
        "trainings",
        "trials per depth",
        *(f"depth {depth:.0%}" for depth in DEPTHS),
        "s per context",
        "peak MiB",
        "cache MiB",
    )
    lines = []
    for length, num_neighbors in dict.fromkeys((run.length, run.num_neighbors) for run, _ in results):
        chosen = [(run, one) for run, one in results if (run.length, run.num_neighbors) == (length, num_neighbors)]
        found = [one for _, one in chosen]
        trials = PAIRS_PER_DEPTH * len(found)
        accuracies = [sum(one.found[depth] for one in found) / trials for depth in range(len(DEPTHS))]
        lines.append(
            (
                f"{length:,}",
                str(num_neighbors),
                str(len({run.seed for run, _ in chosen})),
                str(trials),
                *(f"{accuracy:.2f}" for accuracy in accuracies),
                f"{sum(one.seconds for one in found) / len(found):.1f}",
                f"{max(one.peak_mib for one in found):,.0f}",
                f"{max(one.cache_mib for one in found):,.0f}",
            )
        )
    return markdown_table(header, lines)


def _measure_context(model: DFNForCausalLM, settings: RetrievalSettings) -> RetrievalResult:
    set_up_device(settings.device, settings.threads)
    model.config.num_neighbors = settings.num_neighbors
    generator = torch.Generator().manual_seed(CONTEXT_SEED + settings.context)
    context, keys, values = planted_context(generator, settings.length, settings.vocab_size)
    started = clock(settings.device)
    state = read_context(model, context.to(model.device), settings.chunk_length)
    seconds, mib = clock(settings.device) - started, cache_mib(state)
    answers = answer_queries(model, state, keys.flatten().to(model.device)).cpu()
    return RetrievalResult(
        found=(answers.view_as(values) == values).sum(dim=1).tolist(),
        seconds=round(seconds, 1),
        peak_mib=round(peak_memory_mib(settings.device), 1),
        cache_mib=round(mib, 1),
        machine=describe_machine(settings.device),
    )
