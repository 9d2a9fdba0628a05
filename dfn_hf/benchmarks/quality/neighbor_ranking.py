"""Which entities should be neighbours: the nearest ones, or those with the largest attention logits?

The logit of a neighbour is −γ‖q − k‖² + w − λ log(1 + age). The search of DFN ranks by the distance alone. Here models
are trained and evaluated with exact searches that rank by more terms of the logit.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook

from dfn_hf.modeling.dfn.attention import DynamicFlowAttention
from dfn_hf.modeling.dfn.entities import ContinuousEntities

from ..harness.environment import describe_machine
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..recall.associative_recall import RecallSettings, long_recall, train_recall
from .long_lm import LongLMSettings, measure_long_lm

RANKINGS = ("distance", "distance and age", "distance, age and influence")
NO_NEIGHBORS = "no neighbours (K = 0)"
QUERIES = 256  # queries that are ranked together
GROUP = 16  # entities of which only the largest is compared at first


@dataclass(frozen=True)
class RankingSettings:
    """One ranking and seed: language models of two lengths and a recall model.

    Attributes:
        length, long_length: tokens per window of the two language models.
        tokens: tokens per training step.
    """

    ranking: str = RANKINGS[0]
    seed: int = 0
    length: int = 1024
    long_length: int = 4096
    tokens: int = 4096
    steps: int = 250
    recall_steps: int = 1000
    recall_length: int = RecallSettings.long_length
    learning_rate: float = 3e-3
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 384
    evaluation_windows: int = 32
    device: str = "cpu"


@dataclass(frozen=True)
class RankingResult:
    """Held-out losses in nats per token, and the accuracy of recall at `recall_length` tokens.

    Attributes:
        loss, long_loss: of the models of `length` and `long_length`.
        end_loss: of the model of `long_length`, in the second half of its windows.
    """

    loss: float
    long_loss: float
    end_loss: float
    recall: float
    machine: str


def measure_ranking(settings: RankingSettings) -> RankingResult:
    """Train and evaluate the models of one ranking.

    Raises:
        ValueError: the ranking is unknown.
    """
    if settings.ranking not in (*RANKINGS, NO_NEIGHBORS):
        raise ValueError(f"ranking is {settings.ranking!r}: choose one of {', '.join((*RANKINGS, NO_NEIGHBORS))}")
    with searched_by(settings.ranking):
        short, long = (
            measure_long_lm(
                LongLMSettings(
                    seed=settings.seed,
                    learning_rate=settings.learning_rate,
                    steps=settings.steps,
                    batch_size=max(1, settings.tokens // length),
                    length=length,
                    hidden_size=settings.hidden_size,
                    num_hidden_layers=settings.num_hidden_layers,
                    num_attention_heads=settings.num_attention_heads,
                    intermediate_size=settings.intermediate_size,
                    evaluation_windows=settings.evaluation_windows,
                    device=settings.device,
                )
            )
            for length in (settings.length, settings.long_length)
        )
        recall = RecallSettings(
            seed=settings.seed,
            steps=settings.recall_steps,
            long_length=settings.recall_length,
            device=settings.device,
        )
        recalled = long_recall(train_recall(recall).model, recall)
    return RankingResult(
        loss=short.loss,
        long_loss=long.loss,
        end_loss=long.bucket_losses[-1],
        recall=recalled,
        machine=describe_machine(settings.device),
    )


@contextmanager
def searched_by(ranking: str) -> Iterator[None]:
    """Replace the neighbour search of all causal DFNs without a cache by an exact search of one of `RANKINGS`."""

    influences: dict[ContinuousEntities, torch.Tensor] = {}

    def keep_influence(module, arguments, output) -> None:
        if isinstance(module, ContinuousEntities):
            influences[module] = output[2].detach()

    @torch.no_grad()
    def search(attention: DynamicFlowAttention, query, key, rows, state) -> torch.Tensor:
        if ranking == NO_NEIGHBORS or attention.config.num_neighbors == 0:
            return torch.empty(*query.shape[:3], 0, dtype=torch.int64, device=query.device)
        return largest_logits(
            query,
            key,
            attention.log_sharpness.exp(),
            attention.log_fading.exp() if "age" in ranking else None,
            influences[attention.entities] if "influence" in ranking else None,
            attention.config.num_neighbors,
            attention.config.local_window,
        )

    before = DynamicFlowAttention.search_neighbors
    handle = register_module_forward_hook(keep_influence)
    DynamicFlowAttention.search_neighbors = search  # type: ignore[method-assign, assignment]  # until the end
    try:
        yield
    finally:
        DynamicFlowAttention.search_neighbors = before  # type: ignore[method-assign]
        handle.remove()


def largest_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    sharpness: torch.Tensor,
    fading: torch.Tensor | None,
    influence: torch.Tensor | None,
    num_neighbors: int,
    window: int,
) -> torch.Tensor:
    """Find the predecessors j ≤ i − window with the largest −γ‖q − k‖² − λ log(1 + i − j) + w.

    Args:
        query, key: `[B, H, M, P]`.
        sharpness: γ, `[H]`.
        fading: λ, `[H]`; None ranks without it.
        influence: w, `[B, H, M]`; None ranks without it.
        num_neighbors: K.
        window: W.

    Returns:
        int64 `[B, H, M, K]`, −1 if there are fewer than K.
    """
    batch, heads, length, _ = query.shape
    found = torch.full((batch, heads, length, num_neighbors), -1, device=query.device)
    bias = -sharpness[:, None] * key.square().sum(dim=-1)
    if influence is not None:
        bias = bias + influence
    keys = torch.cat([key, bias[..., None]], dim=-1).transpose(-1, -2)
    queries = torch.cat([2 * sharpness[:, None, None] * query, torch.ones_like(bias)[..., None]], dim=-1)
    log_age = torch.arange(length + QUERIES, device=query.device).to(query.dtype).log1p()
    for first in range(window, length, QUERIES):
        end = min(first + QUERIES, length)
        seen = end - window  # by the last query
        age = torch.arange(first, end, device=query.device)[:, None] - torch.arange(seen, device=query.device)
        fade = torch.zeros(heads, *age.shape, device=query.device, dtype=query.dtype)
        if fading is not None:
            fade = -fading[:, None, None] * log_age[age.clamp(min=0)]
        fade = fade.masked_fill(age < window, -torch.inf).expand(batch, -1, -1, -1).flatten(0, 1)
        ranks = torch.baddbmm(fade, queries[:, :, first:end].flatten(0, 1), keys[..., :seen].flatten(0, 1))
        best, places = _top(ranks.unflatten(0, (batch, heads)), min(num_neighbors, seen))
        found[:, :, first:end, : best.shape[-1]] = places.masked_fill(best == -torch.inf, -1)
    return found


def _top(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Equal `x.topk(count, dim=-1)` but for ties. The largest are in the groups with the largest maxima."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP), value=-torch.inf).unflatten(-1, (-1, GROUP))
    chosen = groups.amax(dim=-1).topk(min(count, groups.shape[-2]), dim=-1).indices
    candidates = groups.gather(-2, chosen[..., None].expand(*chosen.shape, GROUP)).flatten(-2)
    best, places = candidates.topk(count, dim=-1)
    return best, GROUP * chosen.gather(-1, places // GROUP) + places % GROUP


def run_rankings(
    runs: Iterable[RankingSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[RankingSettings, RankingResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, RankingSettings, RankingResult)
    finished = []
    for run in runs:
        result = results.run(run, measure_ranking)
        report(
            f"{run.ranking}, seed {run.seed}: {run.length:,} tokens {result.loss:.3f}, "
            f"{run.long_length:,} tokens {result.long_loss:.3f}, recall {result.recall:.3f}"
        )
        finished.append((run, result))
    return finished


def ranking_table(results: list[tuple[RankingSettings, RankingResult]]) -> str:
    """Return a table with one row per ranking: mean ± standard error over seeds."""
    settings = results[0][0]
    columns = {
        f"loss at {settings.length:,} tokens": "loss",
        f"loss at {settings.long_length:,} tokens": "long_loss",
        f"its second half ({settings.long_length // 2:,} on)": "end_loss",
        f"recall at {settings.recall_length:,} tokens": "recall",
    }
    lines = []
    for ranking in dict.fromkeys(run.ranking for run, _ in results):
        found = [result for run, result in results if run.ranking == ranking]
        cells = [mean_with_error([getattr(one, field) for one in found]) for field in columns.values()]
        lines.append((ranking, str(len(found)), *cells))
    return markdown_table(("neighbours ranked by", "seeds", *columns), lines)
