"""Opens and closes models, and streams long texts: memory and time per token must stay flat.

python -m tests.campaigns.soak_models --models 200 --tokens 20000
"""

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from dfn_hf.loading.models import load_causal_lm, load_seq2seq_lm

BUNDLED = ("dfn-tiny", "dfn-bytes", "flownetwork-tiny", "liquid-tiny")
PROMPT = "In the beginning"
PIECES = 20  # parts of a stream that are compared
MAX_GROWTH_OF_TIME = 1.5  # last quarter against second quarter
MAX_BYTES_PER_MODEL = 100_000


def resident_bytes() -> int:
    """Memory of this process, in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def slope(values: Sequence[float]) -> float:
    """Growth per item of the second half of `values`, by least squares."""
    half = np.asarray(values[len(values) // 2 :], dtype=float)
    return float(np.polyfit(np.arange(len(half)), half, 1)[0])


def load(name: str) -> tuple[PreTrainedModel, torch.Tensor]:
    """A bundled model and a prompt for it, `[1, tokens]`."""
    model, tokenizer = (load_seq2seq_lm if name.startswith("liquid") else load_causal_lm)(name)
    return model, tokenizer(PROMPT, return_tensors="pt")["input_ids"]


def open_and_close(number: int) -> bool:
    """Load models one after the other and generate a few tokens with each; return whether the memory stays flat."""
    memory = []
    for index in range(number):
        model, ids = load(BUNDLED[index % len(BUNDLED)])
        model.generate(ids, max_new_tokens=8, do_sample=False)
        del model
        gc.collect()
        memory.append(resident_bytes())
    growth = slope(memory)
    print(f"{number} models: {memory[-1] / 1e6:.0f} MB at the end, {growth / 1e3:+.1f} kB per model", flush=True)
    return growth < MAX_BYTES_PER_MODEL


class Clock(BaseStreamer):
    """Records the processor time of each token and, every 100 tokens, the memory."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.memory: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if len(self.times) % 100 == 0:
            self.memory.append(resident_bytes())
        self.times.append(time.process_time())

    def end(self) -> None:
        """The stream has ended."""


def stream(name: str, tokens: int) -> bool:
    """Stream tokens from a model; return whether the time per token stays flat."""
    model, ids = load(name)
    clock = Clock()
    model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=50, num_beams=1, streamer=clock
    )
    steps = np.diff(clock.times[1:])  # without the prompt
    pieces = [1e3 * float(np.median(piece)) for piece in np.array_split(steps, PIECES)]
    early, late = np.mean(pieces[PIECES // 4 : PIECES // 2]), np.mean(pieces[-PIECES // 4 :])
    listed = " ".join(f"{piece:.1f}" for piece in pieces)
    print(f"{name}: ms of processor time per token, median of each of {PIECES} parts: {listed}")
    print(
        f"{name}: {len(steps):,} tokens, {late / early:.2f} x, {slope(clock.memory) / 100:+,.0f} bytes per token",
        flush=True,
    )
    return late < MAX_GROWTH_OF_TIME * early


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=200, help="models to open and close")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens to stream from each family")
    parser.add_argument("--names", nargs="*", choices=BUNDLED, default=list(BUNDLED), help="models to stream from")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    flat = [open_and_close(arguments.models)] if arguments.models else []
    flat += [stream(name, arguments.tokens) for name in arguments.names if arguments.tokens]
    sys.exit(not all(flat))


if __name__ == "__main__":
    main()
