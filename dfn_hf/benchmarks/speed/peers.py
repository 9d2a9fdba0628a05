"""DFN and models of other families with equal size over the length: forward, training, prefill and decoding."""

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache, set_seed

from ..baselines.models import ModelSize, count_parameters
from ..baselines.peer_models import build_peer
from ..datasets.byte_windows import VOCAB_SIZE, corpus_bytes
from ..harness.environment import describe_machine, dtype_named, peak_memory_mib, set_up_device
from ..harness.interleaving import Timing, run_over_lengths
from ..harness.length_plots import lengths_table
from ..harness.results import ResultsFile
from .throughput import DECODED_TOKENS, forward, timed, train

WORKLOADS = ("forward", "training", "prefill", "decoding")
CACHES = ("dynamic", "static")
# A Reformer's cached step differs from its full pass; llama-conv has no cache.
UNCACHED = ("reformer", "llama-conv")
PREFILL_CHUNK = 8192  # tokens of the context per forward pass, before decoding


@dataclass(frozen=True)
class PeerSettings:
    """One model, workload and length, with batch size 1.

    Attributes:
        cache: cache of decoding: "dynamic", or "static" with a compiled step.
    """

    model: str = "dfn"
    workload: str = "forward"
    length: int = 1024
    cache: str = "dynamic"
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 512
    dtype: str = "float32"
    repeats: int = 3
    threads: int = 1
    device: str = "cpu"

    @property
    def label(self) -> str:
        return self.model if self.cache == "dynamic" else f"{self.model}, {self.cache} cache"

    @property
    def tokens(self) -> int:
        return 1 if self.workload == "decoding" else self.length


@dataclass(frozen=True)
class PeerTiming(Timing):
    """Seconds of a pass over the length, or of one decoded token."""

    parameters: int


def peer_runs(
    settings: PeerSettings,
    *,
    models: Sequence[str],
    workloads: Sequence[str],
    lengths: Sequence[int],
    training_lengths: Sequence[int],
    caches: Sequence[str] = ("dynamic",),
) -> list[PeerSettings]:
    """Return the runs of every model with every workload that it supports, and `caches` for decoding.

    Raises:
        ValueError: a workload or cache is unknown.
    """
    for name, given, known in (("workload", workloads, WORKLOADS), ("cache", caches, CACHES)):
        for value in given:
            if value not in known:
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}")
    return [
        replace(settings, model=model, workload=workload, length=length, cache=kind)
        for workload in workloads
        for length in sorted(training_lengths if workload == "training" else lengths)
        for model in models
        for kind in (caches if workload == "decoding" else ("dynamic",))
        if model not in UNCACHED or workload in ("forward", "training")
    ]


def run_peers(
    runs: Iterable[PeerSettings],
    time_limit: float,
    path: Path,
    report: Callable[[str], None] = lambda line: None,
    *,
    interleave_lengths: bool = False,
) -> list[tuple[PeerSettings, PeerTiming]]:
    """Measure the runs in round-robin order; finished ones are read from the CSV at `path`. See `run_over_lengths`."""
    results = ResultsFile(path, PeerSettings, PeerTiming)
    return run_over_lengths(runs, results, prepare_peer, time_limit, report, interleave_lengths=interleave_lengths)


def prepare_peer(settings: PeerSettings) -> Callable[[], PeerTiming]:
    """Build the model and, for decoding, the cache of the context; return a callable that times the workload once."""
    set_up_device(settings.device, settings.threads)
    set_seed(0)
    size = ModelSize(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
    )
    model = build_peer(settings.model, size, length=settings.length, device=settings.device).eval()
    model = torch.nn.Module.to(model, dtype_named(settings.dtype))
    input_ids = corpus_bytes(settings.length).to(settings.device)
    if settings.workload == "decoding":
        call = _decoding(model, input_ids, settings)
    else:
        functions = {"forward": forward, "training": train, "prefill": _prefill}
        call = partial(functions[settings.workload], model, input_ids, settings.device)
    return lambda: PeerTiming(
        seconds=call(),
        peak_mib=round(peak_memory_mib(settings.device), 1),
        machine=describe_machine(settings.device),
        parameters=count_parameters(model),
    )


def peers_table(results: Sequence[tuple[PeerSettings, PeerTiming]]) -> str:
    """Return `lengths_table`, the time per decoded token and layer (two blocks of Mamba-2), and the parameters."""
    parameters: dict[str, set[int]] = {}
    per_layer: dict[str, list[float]] = {}
    for run, timing in results:
        parameters.setdefault(run.model, set()).add(timing.parameters)
        if run.workload == "decoding":
            per_layer.setdefault(run.label, []).append(1e6 * timing.seconds / run.num_hidden_layers)
    lines = [lengths_table(results)]
    lines += [f"decoding, {label}: {_range(found)} µs per token and layer" for label, found in per_layer.items()]
    lines += [f"parameters of {model}: {_range(found)}" for model, found in parameters.items()]
    return "\n".join(lines)


def _range(values: Collection[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:,.0f}" for value in (min(values), max(values))))


@torch.no_grad()
def _prefill(model: PreTrainedModel, input_ids: torch.Tensor, device: str) -> float:
    return timed(lambda: model(input_ids, use_cache=True, logits_to_keep=1), device)


def _decoding(model: PreTrainedModel, input_ids: torch.Tensor, settings: PeerSettings) -> Callable[[], float]:
    """Return a callable that decodes the next tokens after `input_ids` and returns the seconds per token."""
    state: Any = None  # the model creates its cache
    if settings.cache == "static":
        state = StaticCache(model.config, max_cache_len=settings.length + (1 + settings.repeats) * DECODED_TOKENS)
    with torch.no_grad():
        if settings.model == "llama":
            state = DynamicCache(config=model.config) if state is None else state
            _fill(state, model, settings)
        else:
            for chunk in input_ids.split(PREFILL_CHUNK, dim=1):
                state = _read(model, model, chunk, state)
    step = model if settings.cache == "dynamic" else model.get_compiled_call(None)
    token = input_ids[:, :1]

    @torch.no_grad()
    def steps() -> None:
        nonlocal state
        for _ in range(DECODED_TOKENS):
            state = _read(model, step, token, state)

    return lambda: timed(steps, settings.device) / DECODED_TOKENS


def _read(model: PreTrainedModel, call: Callable[..., Any], input_ids: torch.Tensor, state: Any) -> Any:
    """Return the cache after `input_ids`; `call` is the model or its compiled form."""
    name = "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
    return call(input_ids, use_cache=True, logits_to_keep=1, **{name: state})[name]


def _fill(state: DynamicCache | StaticCache, model: PreTrainedModel, settings: PeerSettings) -> None:
    """Fill a Llama's cache with random keys and values; steps take the same time, without a quadratic prefill."""
    config = model.config
    shape = (1, config.num_key_value_heads, settings.length, config.head_dim)
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        state.update(key, value, layer)
