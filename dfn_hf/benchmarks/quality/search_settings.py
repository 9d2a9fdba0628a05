"""Quality against time for settings of the neighbour search: position dimensions, neighbours, leaves."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed

from dfn_hf import DFNConfig, DFNForCausalLM
from dfn_hf.assets.tokenizers import load_tokenizer

from ..baselines.models import ModelSize, build_model
from ..datasets.token_windows import TokenWindows
from ..harness.environment import clock, describe_machine
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..harness.training_loop import fit
from ..recall.associative_recall import RecallSettings, longest_recall, train_recall
from ..recall.retrieval import CONTEXT_SEED, RetrievalSettings, answer_queries, planted_context, read_context
from ..recall.retrieval import trained_model as trained_retrieval
from .long_lm import BUNDLED_CORPUS, held_out_losses, token_documents

CHOICES = ((4, 16), (8, 16), (8, 8), (16, 16), (8, 32))  # (position_dim, num_neighbors)
LEAVES = (4, 8, 16)
TRAINED_LEAVES = DFNConfig.num_leaves


@dataclass(frozen=True)
class SearchSettingsRun:
    """One choice and seed: a language model, a recall model and a retrieval model.

    Attributes:
        num_leaves: leaves that the search reads in the evaluation; the training has the default.
        lm_length, lm_steps, lm_windows: windows of the bundled corpus, one per training step, and held-out windows.
        context_length, contexts: of the retrieval task.
    """

    position_dim: int = DFNConfig.position_dim
    num_neighbors: int = DFNConfig.num_neighbors
    num_leaves: int = TRAINED_LEAVES
    seed: int = 0
    lm_length: int = 4096
    lm_steps: int = 250
    lm_windows: int = 32
    lm_learning_rate: float = 3e-3
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 384
    recall_steps: int = 1000
    recall_length: int = RecallSettings.longest_length
    retrieval_steps: int = RetrievalSettings.steps
    tuning_steps: int = 750
    context_length: int = 2**17
    contexts: int = 5
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class SearchSettingsResult:
    """Quality and time of one choice.

    Attributes:
        loss: nats per token on held-out text.
        recall: accuracy at `recall_length` tokens with 120 pairs, trained on 64 tokens with 8 pairs.
        retrieval: fraction of the planted pairs found in the contexts, over all depths.
        microseconds: time per token to read a context; the least of all contexts.
    """

    loss: float
    recall: float
    retrieval: float
    microseconds: float
    machine: str


def measure_search_settings(run: SearchSettingsRun) -> SearchSettingsResult:
    """Evaluate the models of a choice; they are trained once per process and choice."""
    trained = replace(run, num_leaves=TRAINED_LEAVES)
    lm, recall, retrieval = trained_lm(trained), trained_recall(trained), trained_retrieval_model(trained)
    for model in (lm, recall, retrieval):
        model.config.num_leaves = run.num_leaves
    windows = TokenWindows(token_documents(BUNDLED_CORPUS, "bpe")[1], run.lm_length)
    losses, _ = held_out_losses(lm, windows.consecutive_batches(run.lm_windows, 1))
    found, seconds = read_contexts(retrieval, run)
    return SearchSettingsResult(
        loss=losses.mean().item(),
        recall=longest_recall(recall, _recall_settings(run)),
        retrieval=found,
        microseconds=round(seconds / run.context_length * 1e6, 2),
        machine=describe_machine(run.device),
    )


@cache
def trained_lm(run: SearchSettingsRun) -> PreTrainedModel:
    """Train the language model of a choice."""
    set_seed(run.seed)
    size = ModelSize(
        vocab_size=len(load_tokenizer("bpe")),
        hidden_size=run.hidden_size,
        num_hidden_layers=run.num_hidden_layers,
        num_attention_heads=run.num_attention_heads,
        intermediate_size=run.intermediate_size,
    )
    options = {"position_dim": run.position_dim, "num_neighbors": run.num_neighbors}
    model = build_model("dfn", size, device=run.device, **options)
    windows = TokenWindows(token_documents(BUNDLED_CORPUS, "bpe")[0], run.lm_length)
    fit(model, windows.random_batches(1, run.seed), steps=run.lm_steps, learning_rate=run.lm_learning_rate)
    return model


@cache
def trained_recall(run: SearchSettingsRun) -> PreTrainedModel:
    """Train the recall model of a choice."""
    options = {"position_dim": run.position_dim, "num_neighbors": run.num_neighbors}
    return train_recall(_recall_settings(run), lambda line: None, **options).model


@cache
def trained_retrieval_model(run: SearchSettingsRun) -> DFNForCausalLM:
    """Train the retrieval model of a choice."""
    settings = RetrievalSettings(
        length=run.context_length,
        position_dim=run.position_dim,
        num_neighbors=run.num_neighbors,
        seed=run.seed,
        steps=run.retrieval_steps,
        tuning_steps=run.tuning_steps,
        device=run.device,
    )
    return trained_retrieval(settings, lambda line: None)


def read_contexts(model: DFNForCausalLM, run: SearchSettingsRun) -> tuple[float, float]:
    """Return the fraction of the planted pairs that the model finds, and the least time to read a context."""
    correct, times = [], []
    for context in range(run.contexts):
        generator = torch.Generator().manual_seed(CONTEXT_SEED + context)
        tokens, keys, values = planted_context(generator, run.context_length, RetrievalSettings.vocab_size)
        started = clock(run.device)
        state = read_context(model, tokens.to(run.device), RetrievalSettings.chunk_length)
        times.append(clock(run.device) - started)
        answers = answer_queries(model, state, keys.flatten().to(run.device)).cpu()
        correct.append((answers.view_as(values) == values).float().mean().item())
    return sum(correct) / len(correct), min(times)


def _recall_settings(run: SearchSettingsRun) -> RecallSettings:
    return RecallSettings(seed=run.seed, steps=run.recall_steps, longest_length=run.recall_length, device=run.device)


def run_search_settings(
    runs: Iterable[SearchSettingsRun], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[SearchSettingsRun, SearchSettingsResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, SearchSettingsRun, SearchSettingsResult)
    finished = []
    for run in runs:
        result = results.run(run, measure_search_settings)
        report(
            f"P = {run.position_dim}, K = {run.num_neighbors}, {run.num_leaves} leaves, seed {run.seed}: "
            f"loss {result.loss:.3f}, recall {result.recall:.3f}, retrieval {result.retrieval:.3f}"
        )
        finished.append((run, result))
    return finished


def search_settings_table(results: list[tuple[SearchSettingsRun, SearchSettingsResult]]) -> str:
    """Return a table with one row per choice: mean ± standard error over seeds."""
    settings = results[0][0]
    header = (
        "P",
        "K",
        "leaves",
        "seeds",
        f"loss at {settings.lm_length:,} tokens",
        f"recall at {settings.recall_length:,} tokens",
        f"retrieval at {settings.context_length:,} tokens",
        "µs per token",
    )
    lines = []
    for choice in dict.fromkeys((run.position_dim, run.num_neighbors, run.num_leaves) for run, _ in results):
        found = [one for run, one in results if (run.position_dim, run.num_neighbors, run.num_leaves) == choice]
        lines.append(
            (
                *map(str, choice),
                str(len(found)),
                mean_with_error([one.loss for one in found]),
                mean_with_error([one.recall for one in found]),
                mean_with_error([one.retrieval for one in found]),
                f"{min(one.microseconds for one in found):.1f}",
            )
        )
    return markdown_table(header, lines)
