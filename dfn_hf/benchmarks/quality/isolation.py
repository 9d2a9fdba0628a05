"""Isolation: are packed documents read as if each were alone, and cropped tokens as if they had never been read?"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DataCollatorWithFlattening, DynamicCache, PreTrainedModel, set_seed

from ..baselines.models import ModelSize
from ..baselines.peer_models import build_peer, build_qwen3_next
from ..harness.environment import describe_machine, set_up_device
from ..harness.results import ResultsFile, markdown_table

logger = logging.getLogger(__name__)

BY_INDEX = {"return_position_ids": False, "return_seq_idx": True, "return_flash_attn_kwargs": True}
MODELS = ("dfn", "flownetwork", "llama", "lfm2", "mamba2", "qwen3-next")


@dataclass(frozen=True)
class IsolationSettings:
    """One model with random weights in float32.

    Attributes:
        documents: tokens of the packed documents.
        prompt: tokens that a cache holds.
        removed: tokens that are read and cropped again before `continued` tokens follow.
    """

    model: str = "dfn"
    seed: int = 0
    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 512
    documents: str = "90,130,60"
    prompt: int = 100
    removed: int = 8
    continued: int = 8
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class IsolationResult:
    """Largest differences of logits; None if the call fails.

    Attributes:
        packed: between documents in one row, described by `position_ids`, and alone.
        packed_by_index: the same, described by `seq_idx` and `cu_seq_lens_q`.
        cropped: between a cache that was cropped and one that never read the cropped tokens.
    """

    packed: float | None
    packed_by_index: float | None
    cropped: float | None
    machine: str


@torch.no_grad()
def measure_isolation(settings: IsolationSettings) -> IsolationResult:
    """Build the model and measure both differences."""
    set_up_device(settings.device, settings.threads)
    set_seed(settings.seed)
    size = ModelSize(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
    )
    if settings.model == "qwen3-next":
        model = torch.nn.Module.to(build_qwen3_next(size), settings.device)
    else:
        model = build_peer(settings.model, size, length=settings.prompt, device=settings.device)
    model.eval()
    return IsolationResult(
        packed=_difference(packed_difference, model, settings, {}),
        packed_by_index=_difference(packed_difference, model, settings, BY_INDEX),
        cropped=_difference(cropped_difference, model, settings),
        machine=describe_machine(settings.device),
    )


def packed_difference(model: PreTrainedModel, settings: IsolationSettings, options: dict[str, bool]) -> float:
    """Return the largest difference of logits between packed documents and each document alone.

    Args:
        options: of `DataCollatorWithFlattening`.
    """
    lengths = [int(length) for length in settings.documents.split(",")]
    documents = draw_tokens(settings, sum(lengths))[0].split(lengths)
    collate = DataCollatorWithFlattening(return_tensors="pt", **options)
    batch = collate([{"input_ids": document.tolist()} for document in documents])
    batch.pop("labels")
    batch = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    packed = model(**batch, use_cache=False).logits[0]
    alone = [model(document[None].to(model.device), use_cache=False).logits[0] for document in documents]
    return (packed - torch.cat(alone)).abs().max().item()


def cropped_difference(model: PreTrainedModel, settings: IsolationSettings) -> float:
    """Return the largest difference of logits after tokens were read and cropped, or never read."""
    sizes = [settings.prompt, settings.removed, settings.continued]
    prompt, removed, continued = draw_tokens(settings, sum(sizes)).to(model.device).split(sizes, dim=1)
    logits = []
    for pieces in ([prompt], [prompt, removed]):
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        for piece in pieces:
            model(piece, past_key_values=cache, use_cache=True)
        if len(pieces) > 1:
            cache.crop(-settings.removed)
        logits.append(model(continued, past_key_values=cache, use_cache=True).logits)
    return (logits[0] - logits[1]).abs().max().item()


def draw_tokens(settings: IsolationSettings, length: int) -> torch.Tensor:
    """Draw random tokens, int64 `[1, length]`."""
    return torch.randint(settings.vocab_size, (1, length), generator=torch.Generator().manual_seed(settings.seed))


def _difference(measure: Callable, model: PreTrainedModel, settings: IsolationSettings, *options) -> float | None:
    try:
        return measure(model, settings, *options)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        logger.warning("%s cannot do this: %s", settings.model, error)
        return None


def run_isolation(
    runs: Iterable[IsolationSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[IsolationSettings, IsolationResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, IsolationSettings, IsolationResult)
    finished = []
    for run in runs:
        finished.append((run, results.run(run, measure_isolation)))
        report(f"{run.model}: {finished[-1][1]}")
    return finished


def isolation_table(results: list[tuple[IsolationSettings, IsolationResult]]) -> str:
    """Return a table with one row per model."""
    lines = []
    for run, result in results:
        values = result.packed, result.packed_by_index, result.cropped
        lines.append((run.model, *("fails" if value is None else f"{value:.1g}" for value in values)))
    header = ("model", "packed by position_ids", "packed by seq_idx and cu_seq_lens", "cropped")
    return markdown_table(header, lines)
