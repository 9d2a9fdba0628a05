"""Plots a FlowNetwork: patterns, flow matrix, windows and memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.flownetwork.memory import BANK_INV_TEMPERATURE
from .style import (
    FAINT,
    INK,
    MUTED,
    SERIES,
    check_index,
    colour_bar,
    line_style,
    save_figure,
    set_slot_ticks,
    set_token_ticks,
    strip_axes,
    to_numpy,
    token_label,
)

TOKENS_PER_SLOT = 4


@dataclass(frozen=True)
class FlowReading:
    """Routing of a FlowNetwork for one text of n tokens, and the content of its memory.

    Attributes:
        words: text of each token.
        title: layer of `profiles`, `patterns`, `matrix` and `slots`, in words.
        profiles: `[num_patterns, flow_window]`, strength of each pattern per offset, before content is compared.
        patterns: `[n, num_patterns]`, mixing weights of the patterns per token; a row sums to 1.
        matrix: `[n, n]`, flow from each column's token into each row's token.
        slots: `[chunks, memory_size, hidden_size]`, sequence memory before each chunk, from its initial values;
            None if the model has no memory.
        windows, fractions, kept: `[num_hidden_layers, n]`, per token the window in tokens, the fraction of it that the
            router keeps, and the number of tokens that flow in.
        bank: `[memory_size, hidden_size]`, the model's memory bank, or None.
        bank_shares: `[memory_size]`, mean routing probability of this text's states to each bank slot, or None.
        bank_words: per bank slot, the tokens with the largest logits relative to the mean over slots.
    """

    words: Sequence[str]
    title: str
    profiles: np.ndarray
    patterns: np.ndarray
    matrix: np.ndarray
    slots: np.ndarray | None
    windows: np.ndarray
    fractions: np.ndarray
    kept: np.ndarray
    bank: np.ndarray | None
    bank_shares: np.ndarray | None
    bank_words: Sequence[Sequence[str]]


@torch.no_grad()
def read_flows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, layer: int = 0
) -> FlowReading:
    """Run a FlowNetwork over `text` and return its routing and memory.

    Args:
        model: a FlowNetwork causal language model.
        tokenizer: the model's tokenizer.
        text: text to read. Up to `memory_chunk` tokens, the sequence memory keeps its initial values.
        layer: index from 0 of the layer of patterns, flow matrix and slots.

    Raises:
        ValueError: the model is not a FlowNetwork, the text is empty, or the model does not have the layer.
    """
    config = model.config
    if config.model_type != "flownetwork":
        raise ValueError(f"model is a {config.model_type!r}: give a FlowNetwork (flow_map plots a DFN)")
    check_index("layer", layer, config.num_hidden_layers)
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not token_ids:
        raise ValueError("text is empty: give a text with at least one token")

    block = model.model.layers[layer]
    with record_block(block) as records:
        input_ids = torch.tensor([token_ids], device=model.device)
        outputs = model(input_ids, output_flows=True, output_hidden_states=True, use_cache=False)

    bank = bank_shares = None
    bank_words: list[list[str]] = []
    if config.memory_size:
        bank = model.model.memory.memory_bank
        states = outputs.hidden_states[-1][0].to(bank.dtype)
        bank_shares = (BANK_INV_TEMPERATURE * states @ bank.T / config.hidden_size**0.5).softmax(dim=-1).mean(dim=0)
        logits = model.lm_head(bank.to(model.dtype))
        top_tokens = (logits - logits.mean(dim=0)).topk(min(TOKENS_PER_SLOT, config.vocab_size), dim=-1).indices
        bank_words = [[str(tokenizer.decode([token])) for token in slot] for slot in top_tokens.tolist()]
    return FlowReading(
        words=[str(tokenizer.decode([token])) for token in token_ids],
        title=f"layer {layer + 1} of {config.num_hidden_layers}",
        profiles=to_numpy(block.flow._profile(config.flow_window)),
        patterns=to_numpy(block.flow._assemble(records["normed"])[0][0]),
        matrix=to_numpy(outputs.flows[layer].matrix[0]),
        slots=to_numpy(records["slots"][0]) if "slots" in records else None,
        windows=np.stack([to_numpy(flows.window[0]) for flows in outputs.flows]),
        fractions=np.stack([to_numpy(flows.fraction[0]) for flows in outputs.flows]),
        kept=np.stack([to_numpy((flows.matrix[0] > 0).sum(dim=-1)) for flows in outputs.flows]),
        bank=None if bank is None else to_numpy(bank),
        bank_shares=None if bank_shares is None else to_numpy(bank_shares),
        bank_words=bank_words,
    )


@contextmanager
def record_block(block: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Record the input of a block's router (`normed`) and the slots of its sequence memory (`slots`)."""
    records: dict[str, torch.Tensor] = {}

    def record_input(module: nn.Module, args: tuple) -> None:
        records["normed"] = args[0]

    def record_slots(module: nn.Module, args: tuple, output: tuple) -> None:
        records["slots"] = output[0]

    hooks = [block.get_submodule("router").register_forward_pre_hook(record_input)]
    if getattr(block, "sequence_memory", None) is not None:
        hooks.append(block.get_submodule("sequence_memory").register_forward_hook(record_slots))
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def plot_patterns(reading: FlowReading, *, path: str | None = None) -> Figure:
    """Draw the strength of each pattern per offset, and the mixing weights of the patterns per token.

    Args:
        reading: result of `read_flows`.
        path: file to save, with the suffix .png, .svg or .pdf.
    """
    figure = Figure(figsize=(11, 7), layout="constrained", dpi=150)
    above, below = figure.subplots(2, height_ratios=[1.2, 1])
    offsets = np.arange(reading.profiles.shape[1])
    for number, profile in enumerate(reading.profiles):
        colour, dash = line_style(number)
        above.plot(offsets, profile, color=colour, ls=dash, lw=1.6, label=f"pattern {number + 1}")
    above.set_xscale("symlog", linthresh=1, base=2)
    above.set_yscale("log")
    ticks = [0, *(2**power for power in range(len(offsets).bit_length()) if 2**power < len(offsets))]
    above.set_xticks(ticks, [str(tick) for tick in ticks])
    above.set_xlim(0, max(1, len(offsets) - 1))
    above.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper right", ncols=2)
    above.set_title(f"Strength per offset of each pattern: {reading.title}", color=INK, loc="left")
    above.set_xlabel("offset in tokens; 0 is the token itself", color=MUTED)
    above.set_ylabel("strength", color=MUTED)
    strip_axes(above)

    image = below.imshow(reading.patterns.T, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    below.set_yticks(range(len(reading.profiles)), [str(number + 1) for number in range(len(reading.profiles))])
    below.set_ylabel("pattern", color=MUTED)
    below.set_title("Mixing weights of each token", color=INK, loc="left")
    strip_axes(below)
    set_token_ticks(below, reading.words)
    colour_bar(figure, image, [below], "weight")
    return save_figure(figure, path)


def plot_flow_matrix(reading: FlowReading, *, path: str | None = None) -> Figure:
    """Draw the flow matrix of one layer: one row per token, coloured by the flow from each column's token.

    Args:
        reading: result of `read_flows`.
        path: file to save, with the suffix .png, .svg or .pdf.
    """
    figure = Figure(figsize=(8.5, 7.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    kept = np.ma.masked_less_equal(reading.matrix, 0)
    image = axes.imshow(kept, cmap="viridis_r", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    axes.plot([-0.5, len(kept) - 0.5], [-0.5, len(kept) - 0.5], color=FAINT, lw=0.8, zorder=-1)
    axes.set_title(f"Flow matrix: {reading.title}", color=INK, loc="left")
    strip_axes(axes)
    set_token_ticks(axes, reading.words, "from")
    set_token_ticks(axes, reading.words, "into", vertical=True)
    colour_bar(figure, image, [axes], "flow (a row sums to at most 1)")
    return save_figure(figure, path)


def plot_windows(reading: FlowReading, *, path: str | None = None) -> Figure:
    """Draw the window, the kept fraction and the number of kept tokens, per token and layer.

    Args:
        reading: result of `read_flows`.
        path: file to save, with the suffix .png, .svg or .pdf.
    """
    figure = Figure(figsize=(11, 6.5), layout="constrained", dpi=150)
    panels = figure.subplots(3, sharex=True)
    at = np.arange(len(reading.words))
    # A window cannot hold more tokens than there are up to the token, itself included.
    panels[0].fill_between(at, at + 1, color=FAINT, alpha=0.5, lw=0, label="tokens so far")
    for axes, values, name in zip(
        panels,
        (reading.windows, reading.fractions, reading.kept),
        ("window, tokens", "fraction to keep", "tokens kept"),
        strict=True,
    ):
        for layer, row in enumerate(values):
            colour, dash = line_style(layer)
            axes.plot(at, row, color=colour, ls=dash, lw=1.2, marker="o", ms=2.5, label=f"layer {layer + 1}")
        axes.set_ylabel(name, color=MUTED)
        axes.grid(axis="y", color=FAINT, lw=0.6)
        strip_axes(axes)
    panels[0].set_ylim(0, 1.1 * reading.windows.max())
    panels[1].yaxis.set_major_formatter(lambda fraction, _: f"{fraction:.1%}")
    panels[2].yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[2].set_ylim(bottom=0)
    panels[0].set_xlim(-0.5, len(at) - 0.5)
    panels[0].legend(frameon=False, labelcolor=INK, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    panels[0].set_title("Window of each token, and the part of it that flows in", color=INK, loc="left")
    set_token_ticks(panels[2], reading.words)
    return save_figure(figure, path)


def plot_memory(reading: FlowReading, *, path: str | None = None) -> Figure:
    """Draw norms and similarities of the sequence memory's slots over chunks, and the slots of the memory bank.

    Args:
        reading: result of `read_flows`.
        path: file to save, with the suffix .png, .svg or .pdf.

    Raises:
        ValueError: the model has no memory.
    """
    if reading.slots is None or reading.bank is None or reading.bank_shares is None:
        raise ValueError("the model has no memory (memory_size is 0): give a model with memory_size above 0")
    figure = Figure(figsize=(12, 7), layout="constrained", dpi=150)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[0.72, 1])[:, 0]
    _draw_sequence_memory(above, reading.slots, reading.title)
    _draw_bank(below, reading.bank, reading.bank_shares, reading.bank_words)
    return save_figure(figure, path)


def _draw_sequence_memory(figure: FigureBase, slots: np.ndarray, title: str) -> None:
    """Draw slot norms over chunks, and slot similarities at up to four chunks; `slots` is `[chunks, slots, d]`."""
    last = len(slots) - 1
    shown = sorted({0, min(1, last), last // 2, last})
    norms_axes, *squares = figure.subplots(1, 1 + len(shown), width_ratios=[1.3] + [1] * len(shown))
    norms = np.linalg.norm(slots, axis=-1)
    image = norms_axes.imshow(norms.T, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    norms_axes.set_box_aspect(0.75)
    norms_axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    norms_axes.set_title("norm of each slot", color=INK, loc="left", fontsize=9)
    norms_axes.set_xlabel("chunks read", color=MUTED)
    norms_axes.set_ylabel("slot", color=MUTED)
    colour_bar(figure, image, [norms_axes], "")
    for axes, chunks in zip(squares, shown, strict=True):
        image = draw_similarity(axes, slots[chunks])
        axes.set_title(f"similarity after {chunks} chunks", color=INK, loc="left", fontsize=9)
    colour_bar(figure, image, squares, "cosine")
    figure.suptitle(f"Sequence memory: {title}", color=INK, x=0.01, ha="left")
    set_slot_ticks(norms_axes.yaxis, slots.shape[1])
    for axes in (norms_axes, *squares):
        strip_axes(axes)


def _draw_bank(figure: FigureBase, bank: np.ndarray, shares: np.ndarray, slot_words: Sequence[Sequence[str]]) -> None:
    """Draw similarities, norms, top tokens and routing probabilities of the slots of the memory bank."""
    num_slots = len(bank)
    similarity_axes, norms_axes, shares_axes = figure.subplots(1, 3)
    image = draw_similarity(similarity_axes, bank)
    similarity_axes.set_title("similarity", color=INK, loc="left", fontsize=9)
    similarity_axes.set_ylabel("slot of the bank", color=MUTED)
    colour_bar(figure, image, [similarity_axes], "cosine")
    names = [f"{'  '.join(map(token_label, words))}   {slot + 1}" for slot, words in enumerate(slot_words)]
    norms_axes.barh(range(num_slots), np.linalg.norm(bank, axis=1), color=SERIES[1])
    norms_axes.set_yticks(range(num_slots), names, parse_math=False)
    norms_axes.set_title("norm, and tokens with the largest logits", color=INK, loc="left", fontsize=9)
    shares_axes.barh(range(num_slots), shares, color=SERIES[0])
    shares_axes.set_yticks(range(num_slots), [str(slot + 1) for slot in range(num_slots)])
    shares_axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    shares_axes.xaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")
    shares_axes.set_title("mean routing probability of this text", color=INK, loc="left", fontsize=9)
    figure.suptitle("Memory bank, updated in training", color=INK, x=0.01, ha="left")
    for axes in (norms_axes, shares_axes):
        axes.set_ylim(num_slots - 0.5, -0.5)
    for axes in (similarity_axes, norms_axes, shares_axes):
        strip_axes(axes)


def draw_similarity(axes: Axes, vectors: np.ndarray) -> AxesImage:
    """Draw the cosine similarities of `vectors`, `[n, d]`."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.maximum(lengths, np.finfo(vectors.dtype).tiny)
    for axis in (axes.xaxis, axes.yaxis):
        set_slot_ticks(axis, len(vectors))
    return axes.imshow(units @ units.T, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
