"""A million tokens in one forward pass and in chunks: time, memory, and equality of the last logits."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel, set_seed

from dfn_hf import DFNConfig, DFNForCausalLM

from ..datasets.byte_windows import VOCAB_SIZE, corpus_bytes
from ..harness.environment import clock, describe_machine, peak_memory_mib, run_isolated, set_up_device, synchronize
from ..harness.results import ResultsFile, markdown_table


@dataclass(frozen=True)
class MillionTokensSettings:
    """Sizes of model and input; other configuration fields have their defaults.

    Attributes:
        initializer_range: about 1/√hidden_size, so that every block changes the logits.
    """

    length: int = 2**20
    chunk_length: int = 2**16
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    initializer_range: float = 0.06
    entity_sampling: str = "token"
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class MillionTokensResult:
    """Seconds and peak MiB of both passes, the largest difference of their last logits, and the standard deviation."""

    seconds: float
    peak_mib: float
    chunked_seconds: float
    chunked_peak_mib: float
    largest_difference: float
    logits_deviation: float
    machine: str


def measure_million_tokens(settings: MillionTokensSettings) -> MillionTokensResult:
    """Measure one pass and the chunked pass, each in a fresh process."""
    logits, seconds, peak, machine = run_isolated(_last_logits, settings, settings.length)
    chunked, chunked_seconds, chunked_peak, _ = run_isolated(_last_logits, settings, settings.chunk_length)
    return MillionTokensResult(
        seconds=round(seconds, 1),
        peak_mib=round(peak, 1),
        chunked_seconds=round(chunked_seconds, 1),
        chunked_peak_mib=round(chunked_peak, 1),
        largest_difference=(logits - chunked).abs().max().item(),
        logits_deviation=logits.std().item(),
        machine=machine,
    )


def run_million_tokens(settings: MillionTokensSettings, path: Path) -> MillionTokensResult:
    """Measure the settings; a finished run is read from the CSV at `path`."""
    return ResultsFile(path, MillionTokensSettings, MillionTokensResult).run(settings, measure_million_tokens)


def million_tokens_table(settings: MillionTokensSettings, result: MillionTokensResult) -> str:
    """Return a table with one row per pass, followed by the difference of the last logits."""
    per_token_and_head = settings.length * settings.num_hidden_layers * settings.num_attention_heads / 1e6
    lines = [
        (way, f"{seconds:,.0f}", f"{seconds / per_token_and_head:.1f}", f"{peak / 1024:.2f}")
        for way, seconds, peak in (
            ("one pass", result.seconds, result.peak_mib),
            (f"chunks of {settings.chunk_length:,}", result.chunked_seconds, result.chunked_peak_mib),
        )
    ]
    table = markdown_table((f"{settings.length:,} tokens", "time s", "µs per token and head", "peak GiB"), lines)
    return (
        f"{table}\n\nlast logits: largest difference {result.largest_difference:.1e}, "
        f"standard deviation {result.logits_deviation:.2f}"
    )


def _last_logits(settings: MillionTokensSettings, chunk_length: int) -> tuple[torch.Tensor, float, float, str]:
    set_up_device(settings.device, settings.threads)
    model = _build(settings)
    input_ids = corpus_bytes(settings.length).to(device=settings.device)
    started = clock(settings.device)
    logits = _prefill(model, input_ids, chunk_length)
    synchronize(settings.device)
    seconds = clock(settings.device) - started
    return logits.cpu(), seconds, peak_memory_mib(settings.device), describe_machine(settings.device)


def _build(settings: MillionTokensSettings) -> PreTrainedModel:
    set_seed(0)
    config = DFNConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        initializer_range=settings.initializer_range,
        entity_sampling=settings.entity_sampling,
    )
    return torch.nn.Module.to(DFNForCausalLM(config), settings.device).eval()


@torch.no_grad()
def _prefill(model: PreTrainedModel, input_ids: torch.Tensor, chunk_length: int) -> torch.Tensor:
    """Return the logits of the last token `[vocab_size]`; a cache is used only for more than one chunk."""
    use_cache = chunk_length < input_ids.shape[1]
    state = DynamicCache(config=model.config) if use_cache else None
    for chunk in input_ids.split(chunk_length, dim=1):
        outputs = model(input_ids=chunk, past_key_values=state, use_cache=use_cache, logits_to_keep=1)
    return outputs.logits[0, -1]
