"""Recall with FlowNetwork's memory: an answer beyond the reach of its windows, queried later in the row."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed

from dfn_hf import FlowNetworkConfig, FlowNetworkForCausalLM

from ..datasets.mqar import IGNORED
from ..harness.environment import describe_machine
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..harness.training_loop import fit

EVALUATION_SEED = 60_000
ANSWER_POSITIONS = 4  # the answer is at one of the first four positions
QUERIES = 16


@dataclass(frozen=True)
class MemoryRecallSettings:
    """One training run. The answer is at the start of a row, the queries are in its second half."""

    memory_size: int = 8
    seed: int = 0
    answers: int = 64
    fillers: int = 16
    length: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 128
    flow_window: int = 4
    memory_chunk: int = 8
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    decay_ratio: float = 0.3
    device: str = "cpu"

    @property
    def reach(self) -> int:
        """Receptive field in tokens of flow and attention through all layers."""
        return 2 * self.num_hidden_layers * (self.flow_window - 1)

    @property
    def distance(self) -> int:
        """Minimum distance in tokens from the answer to a query."""
        return self.length // 2 - ANSWER_POSITIONS + 1


@dataclass(frozen=True)
class MemoryRecallResult:
    """Top-1 accuracy on the queries of unseen rows, and wall-clock seconds."""

    accuracy: float
    seconds: float
    machine: str


def memory_recall_batches(settings: MemoryRecallSettings, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield endless batches of `input_ids` and `labels`, each int64 `[batch_size, length]`.

    Fillers are random tokens from a separate part of the vocabulary. The answer is the label one column after each
    query (causal models shift labels); other labels are ignored.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, length, half = settings.batch_size, settings.length, settings.length // 2
    query = settings.answers + settings.fillers
    while True:
        input_ids = torch.randint(settings.answers, query, (batch, length), generator=generator)
        answers = torch.randint(settings.answers, (batch, 1), generator=generator)
        input_ids.scatter_(1, torch.randint(ANSWER_POSITIONS, (batch, 1), generator=generator), answers)
        places = half + torch.rand(batch, length - half - 1, generator=generator).argsort(dim=1)[:, :QUERIES]
        input_ids.scatter_(1, places, query)
        labels = torch.full_like(input_ids, IGNORED).scatter_(1, places + 1, answers.expand_as(places))
        yield {"input_ids": input_ids, "labels": labels}


def train_memory_recall(
    settings: MemoryRecallSettings, report: Callable[[str], None] = lambda line: None
) -> FlowNetworkForCausalLM:
    """Train a FlowNetwork on the task."""
    set_seed(settings.seed)
    config = FlowNetworkConfig(
        vocab_size=settings.answers + settings.fillers + 1,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
        flow_window=settings.flow_window,
        min_flow_window=2,
        memory_size=settings.memory_size,
        memory_chunk=settings.memory_chunk,
    )
    model = FlowNetworkForCausalLM(config)
    model = torch.nn.Module.to(model, settings.device)

    def announce(step: int) -> None:
        accuracy = memory_recall_accuracy(model, settings)
        report(f"memory {settings.memory_size}, seed {settings.seed}: step {step}, accuracy {accuracy:.3f}")

    fit(
        model,
        memory_recall_batches(settings, settings.seed),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        decay_ratio=settings.decay_ratio,
        evaluate=announce,
    )
    return model


@torch.no_grad()
def memory_recall_accuracy(model: PreTrainedModel, settings: MemoryRecallSettings) -> float:
    """Return the top-1 accuracy over four batches of unseen rows."""
    batches = memory_recall_batches(settings, EVALUATION_SEED)
    right = []
    for _ in range(4):
        batch = {name: tensor.to(model.device) for name, tensor in next(batches).items()}
        choices = model(batch["input_ids"], use_cache=False).logits[:, :-1].argmax(dim=-1)
        labels = batch["labels"][:, 1:]
        right.append((choices == labels)[labels != IGNORED])
    return torch.cat(right).float().mean().item()


def measure_memory_recall(
    settings: MemoryRecallSettings, report: Callable[[str], None] = lambda line: None
) -> MemoryRecallResult:
    """Train a model and evaluate its accuracy."""
    started = time.perf_counter()
    model = train_memory_recall(settings, report)
    return MemoryRecallResult(
        accuracy=memory_recall_accuracy(model, settings),
        seconds=round(time.perf_counter() - started, 1),
        machine=describe_machine(settings.device),
    )


def run_memory_recall(
    runs: Iterable[MemoryRecallSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[MemoryRecallSettings, MemoryRecallResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, MemoryRecallSettings, MemoryRecallResult)
    return [(run, results.run(run, lambda settings: measure_memory_recall(settings, report))) for run in runs]


def memory_recall_table(results: list[tuple[MemoryRecallSettings, MemoryRecallResult]]) -> str:
    """Return a table with one row per memory size: mean ± standard error over seeds."""
    header = (
        "memory slots",
        "seeds",
        "receptive field, tokens",
        "min distance, tokens",
        "accuracy",
        "min accuracy",
        "chance",
    )
    lines = []
    for size in dict.fromkeys(run.memory_size for run, _ in results):
        found = [(run, result) for run, result in results if run.memory_size == size]
        settings = found[0][0]
        accuracies = [result.accuracy for _, result in found]
        lines.append(
            (
                str(size),
                str(len(found)),
                str(settings.reach),
                str(settings.distance),
                mean_with_error(accuracies),
                f"{min(accuracies):.3f}",
                f"{1 / settings.answers:.3f}",
            )
        )
    return markdown_table(header, lines)
