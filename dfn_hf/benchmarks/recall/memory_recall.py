"""What a FlowNetwork's memory is worth: an answer from far before its windows, asked for among other tokens."""

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
ANSWER_PLACES = 4  # the answer stands at one of the first so many places
QUERIES = 16


@dataclass(frozen=True)
class MemoryRecallSettings:
    """One training run. Queries stand in the second half of a row, the answer at its start."""

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
    decay_share: float = 0.3
    device: str = "cpu"

    @property
    def reach(self) -> int:
        """Tokens that flow and attention together can look back, through all layers."""
        return 2 * self.num_hidden_layers * (self.flow_window - 1)

    @property
    def distance(self) -> int:
        """Tokens from the latest answer to the earliest query."""
        return self.length // 2 - ANSWER_PLACES + 1


@dataclass(frozen=True)
class MemoryRecallMeasures:
    """Share of the queries of fresh rows whose answer is the model's first choice."""

    accuracy: float
    seconds: float
    machine: str


def memory_recall_batches(settings: MemoryRecallSettings, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of `input_ids` and `labels`, each `[batch_size, length]` int64.

    Fillers are random tokens of a kind of their own. The label of a query is the answer, one column behind it, where
    causal models look for it; other labels are ignored.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, length, half = settings.batch_size, settings.length, settings.length // 2
    query = settings.answers + settings.fillers
    while True:
        input_ids = torch.randint(settings.answers, query, (batch, length), generator=generator)
        answers = torch.randint(settings.answers, (batch, 1), generator=generator)
        input_ids.scatter_(1, torch.randint(ANSWER_PLACES, (batch, 1), generator=generator), answers)
        places = half + torch.rand(batch, length - half - 1, generator=generator).argsort(dim=1)[:, :QUERIES]
        input_ids.scatter_(1, places, query)
        labels = torch.full_like(input_ids, IGNORED).scatter_(1, places + 1, answers.expand_as(places))
        yield {"input_ids": input_ids, "labels": labels}


def learn_memory_recall(
    settings: MemoryRecallSettings, report: Callable[[str], None] = lambda line: None
) -> FlowNetworkForCausalLM:
    """A model trained on the task."""
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
        decay_share=settings.decay_share,
        evaluate=announce,
    )
    return model


@torch.no_grad()
def memory_recall_accuracy(model: PreTrainedModel, settings: MemoryRecallSettings) -> float:
    """Over four batches of rows that no training saw."""
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
) -> MemoryRecallMeasures:
    """Train and ask."""
    started = time.perf_counter()
    model = learn_memory_recall(settings, report)
    return MemoryRecallMeasures(
        accuracy=memory_recall_accuracy(model, settings),
        seconds=round(time.perf_counter() - started, 1),
        machine=describe_machine(settings.device),
    )


def run_memory_recall(
    runs: Iterable[MemoryRecallSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[MemoryRecallSettings, MemoryRecallMeasures]]:
    """Every run, finished ones taken from the CSV at `path`."""
    results = ResultsFile(path, MemoryRecallSettings, MemoryRecallMeasures)
    return [(run, results.run(run, lambda settings: measure_memory_recall(settings, report))) for run in runs]


def memory_recall_table(results: list[tuple[MemoryRecallSettings, MemoryRecallMeasures]]) -> str:
    """One line per memory size, mean ± standard error over seeds."""
    header = (
        "memory slots",
        "seeds",
        "reach of flow and attention",
        "distance, at least",
        "accuracy",
        "least",
        "chance",
    )
    lines = []
    for size in dict.fromkeys(run.memory_size for run, _ in results):
        found = [(run, measures) for run, measures in results if run.memory_size == size]
        settings = found[0][0]
        accuracies = [measures.accuracy for _, measures in found]
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
