"""Time and peak memory of encoder-decoders of equal size over the length: Liquid, Liquid without LSTM, and T5."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, T5ForConditionalGeneration, set_seed

from dfn_hf import LiquidConfig, LiquidForSeq2SeqLM
from dfn_hf.seq2seq_presets import matching_t5

from ..baselines.models import count_parameters
from ..datasets.byte_windows import VOCAB_SIZE, corpus_bytes
from ..harness.environment import describe_machine, peak_memory_mib, run_isolated, set_up_device
from ..harness.results import ResultsFile
from .throughput import DECODED_TOKENS, WARM_UP_LENGTH, SpeedResult, timed

WORKLOADS = ("encoder", "decoder", "joint", "training", "decoding")
MODELS = ("liquid", "liquid-no-lstm", "t5")


@dataclass(frozen=True)
class Seq2SeqSpeedSettings:
    """One model, workload and length with batch size 1; the result is the median of `repeats` after a warm-up.

    Attributes:
        workload: "encoder": a source of `length` tokens. "decoder": a target of `length` tokens with teacher forcing,
            given a source of `source_length`. "joint": source and target of `length` tokens. "training": the same with
            the backward pass. "decoding": one token after a target of `length`, given a source of `source_length`.
        num_hidden_layers: layers of the encoder, and of the decoder.
    """

    model: str = "liquid"
    workload: str = "encoder"
    length: int = 8192
    source_length: int = 512
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 256
    repeats: int = 3
    threads: int = 1
    device: str = "cpu"


def measure_seq2seq_speed(settings: Seq2SeqSpeedSettings) -> SpeedResult:
    """Time the workload on bytes of the corpus; run it in a fresh process for a valid peak memory.

    Raises:
        ValueError: the model or workload is unknown.
    """
    if settings.model not in MODELS:
        raise ValueError(f"model is {settings.model!r}: choose one of {', '.join(MODELS)}")
    if settings.workload not in WORKLOADS:
        raise ValueError(f"workload is {settings.workload!r}: choose one of {', '.join(WORKLOADS)}")
    set_up_device(settings.device, settings.threads)
    set_seed(0)
    model = torch.nn.Module.to(build_seq2seq_model(settings), settings.device).eval()
    tokens = corpus_bytes(max(settings.length, WARM_UP_LENGTH)).to(settings.device)
    functions = {"encoder": encode, "decoder": decode, "joint": joint, "training": train, "decoding": decode_token}
    source = tokens[:, : settings.source_length]

    def run(length: int) -> float:
        return functions[settings.workload](model, source, tokens[:, :length], settings.device)

    run(min(settings.length, WARM_UP_LENGTH))
    seconds = [run(settings.length) for _ in range(settings.repeats)]
    return SpeedResult(
        parameters=count_parameters(model),
        seconds=round(statistics.median(seconds), 5),
        peak_mib=round(peak_memory_mib(settings.device), 1),
        machine=describe_machine(settings.device),
    )


def build_seq2seq_model(settings: Seq2SeqSpeedSettings) -> PreTrainedModel:
    """Build the model; the T5 matches the number of parameters of Liquid with its LSTM."""
    tokens = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "decoder_start_token_id": 0}
    liquid = LiquidConfig(
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
        lstm_hidden_size=0 if settings.model == "liquid-no-lstm" else settings.hidden_size,
        **tokens,
    )
    if settings.model == "t5":
        return T5ForConditionalGeneration(matching_t5(liquid, tokens))
    return LiquidForSeq2SeqLM(liquid)


@torch.no_grad()
def encode(model: PreTrainedModel, source: torch.Tensor, tokens: torch.Tensor, device: str) -> float:
    """Return the seconds of the encoder on `tokens`."""
    return timed(lambda: model.get_encoder()(tokens), device)


@torch.no_grad()
def decode(model: PreTrainedModel, source: torch.Tensor, tokens: torch.Tensor, device: str) -> float:
    """Return the seconds of the decoder on `tokens`, logits included."""
    encoded = model.get_encoder()(source)
    return timed(lambda: model(encoder_outputs=encoded, decoder_input_ids=tokens, use_cache=False), device)


@torch.no_grad()
def joint(model: PreTrainedModel, source: torch.Tensor, tokens: torch.Tensor, device: str) -> float:
    """Return the seconds of encoder and decoder on `tokens`."""
    return timed(lambda: model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False), device)


def train(model: PreTrainedModel, source: torch.Tensor, tokens: torch.Tensor, device: str) -> float:
    """Return the seconds of a forward and backward pass of encoder and decoder on `tokens`."""
    model.train().zero_grad()
    return timed(lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward(), device)


@torch.no_grad()
def decode_token(model: PreTrainedModel, source: torch.Tensor, tokens: torch.Tensor, device: str) -> float:
    """Return the seconds per decoded token after a target of `tokens`."""
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    inputs = {"encoder_outputs": model.get_encoder()(source), "past_key_values": cache, "use_cache": True}
    model(decoder_input_ids=tokens, **inputs)
    token = tokens[:, :1]
    model(decoder_input_ids=token, **inputs)

    def steps() -> None:
        for _ in range(DECODED_TOKENS):
            model(decoder_input_ids=token, **inputs)

    return timed(steps, device) / DECODED_TOKENS


def run_seq2seq_speed(
    runs: Iterable[Seq2SeqSpeedSettings], path: Path, report: Callable[[str], None] = lambda line: None
) -> list[tuple[Seq2SeqSpeedSettings, SpeedResult]]:
    """Measure each run in a fresh process; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, Seq2SeqSpeedSettings, SpeedResult)
    finished = []
    for run in runs:
        result = results.run(run, partial(run_isolated, measure_seq2seq_speed))
        report(f"{run.model}, {run.workload} at {run.length:,}: {result.seconds:.4f} s, {result.peak_mib:,.0f} MiB")
        finished.append((run, result))
    return finished
