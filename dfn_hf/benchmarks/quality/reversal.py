"""String reversal: a Liquid with short attention windows must learn to read the source from its end."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import set_seed

from dfn_hf import LiquidConfig, LiquidForSeq2SeqLM

from ..harness.environment import describe_machine
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..harness.training_loop import fit

EVALUATION_SEED = 70_000
NUM_EVALUATION_STRINGS = 500
START_ID, INITIAL_LETTER_ID = 1, 2  # token 0 is padding


@dataclass(frozen=True)
class ReversalSettings:
    """One training run on random strings."""

    seed: int = 0
    letters: int = 26
    length: int = 32
    attention_window: int = 8
    hidden_size: int = 64
    num_hidden_layers: int = 2
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 3e-3
    device: str = "cpu"


@dataclass(frozen=True)
class ReversalResult:
    """Accuracy on unseen strings: fraction of correct tokens and of correct strings."""

    parameters: int
    tokens: float
    strings: float
    wall_seconds: float
    machine: str


def strings(settings: ReversalSettings, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw random strings, int64 `[count, length]`."""
    size = (count, settings.length)
    return torch.randint(INITIAL_LETTER_ID, INITIAL_LETTER_ID + settings.letters, size, generator=generator)


def reversal_batches(settings: ReversalSettings) -> Iterator[dict[str, torch.Tensor]]:
    """Yield endless batches of strings and their reversals."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        drawn = strings(settings, settings.batch_size, generator)
        yield {"input_ids": drawn, "labels": drawn.flip(1)}


def measure_reversal(settings: ReversalSettings, report: Callable[[str], None] = lambda line: None) -> ReversalResult:
    """Train a Liquid and evaluate its greedy generations."""
    set_seed(settings.seed)
    config = LiquidConfig(
        vocab_size=INITIAL_LETTER_ID + settings.letters,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        intermediate_size=2 * settings.hidden_size,
        attention_window=settings.attention_window,
        frame_length=32,
        max_position_embeddings=settings.length,
        learned_positions=True,
        decoder_start_token_id=START_ID,
    )
    model = torch.nn.Module.to(LiquidForSeq2SeqLM(config), settings.device)
    fresh = strings(settings, NUM_EVALUATION_STRINGS, torch.Generator().manual_seed(EVALUATION_SEED)).to(
        settings.device
    )

    @torch.no_grad()
    def correct() -> torch.Tensor:
        generated = model.generate(fresh, max_new_tokens=settings.length, do_sample=False, eos_token_id=None)
        return generated[:, 1:] == fresh.flip(1)

    def announce(step: int) -> None:
        report(f"seed {settings.seed}: step {step}, token accuracy {correct().float().mean():.3f}")

    started = time.perf_counter()
    fit(
        model,
        reversal_batches(settings),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=0.01,
        evaluate=announce,
    )
    found = correct()
    return ReversalResult(
        parameters=model.num_parameters(),
        tokens=found.float().mean().item(),
        strings=found.all(dim=1).float().mean().item(),
        wall_seconds=round(time.perf_counter() - started, 1),
        machine=describe_machine(settings.device),
    )


def run_reversal(
    runs: Iterable[ReversalSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[ReversalSettings, ReversalResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, ReversalSettings, ReversalResult)
    return [(run, results.run(run, lambda settings: measure_reversal(settings, report))) for run in runs]


def reversal_table(results: list[tuple[ReversalSettings, ReversalResult]]) -> str:
    """Return a table with one row: mean ± standard error over seeds."""
    settings, found = results[0][0], [result for _, result in results]
    header = ("length", "window", "parameters", "steps", "seeds", "token accuracy", "string accuracy", "wall-clock s")
    line = (
        str(settings.length),
        str(settings.attention_window),
        f"{found[0].parameters:,}",
        str(settings.steps),
        str(len(found)),
        mean_with_error([one.tokens for one in found], digits=4),
        mean_with_error([one.strings for one in found]),
        mean_with_error([one.wall_seconds for one in found], digits=0),
    )
    return markdown_table(header, [line])
