"""Pictures of a FlowNetwork: its patterns, its flow matrix, how far tokens look back, and what its memory holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.flownetwork.memory import BANK_INV_TEMPERATURE
from .flow_map import FAINT, INK, MUTED, SERIES, SMALL, chosen, plain

DASHES = ("-", "--", ":")  # tell lines apart once the colours are used up
MAX_WORDS = 80  # with more tokens, axes count them instead of naming them
FAVOURITES = 4  # tokens named per slot of the bank


@dataclass(frozen=True)
class FlowReading:
    """What a FlowNetwork did with one text of n tokens, and what its memory holds.

    Attributes:
        words: the text of each token, n of them.
        title: the layer that the fields below are of, in words.
        profiles: `[num_patterns, flow_window]`, how much of a pattern flows from each offset, before tokens are
            compared.
        patterns: `[n, num_patterns]`, how each token mixes them; a row sums to 1.
        matrix: `[n, n]`, how much of each column's token flows into each row's.
        slots: `[chunks, memory_size, hidden_size]`, the sequence's memory in that layer before each of its chunks, the
            first being as it starts; None where the model has no memory.
        windows, fractions, kept: `[num_hidden_layers, n]`, of every layer: how far back a token looks, which share of
            that the router keeps, and how many tokens flow in.
        bank: `[memory_size, hidden_size]`, the bank of the model, or None.
        bank_shares: `[memory_size]`, the share of this text's states that each slot of the bank would take, or None.
        bank_words: per slot of the bank the tokens that the output layer reads from it more than from the others.
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
    """Run a FlowNetwork over `text` and take how it routed, and its memory.

    Args:
        model: a FlowNetwork causal language model.
        tokenizer: its tokenizer.
        text: longer than a `memory_chunk`, else the sequence's memory is still as it starts.
        layer: which, from 0, the patterns, the flow matrix and the slots are taken from.

    Raises:
        ValueError: another kind of model, an empty text, or a layer that the model does not have.
    """
    config = model.config
    if config.model_type != "flownetwork":
        raise ValueError(f"model is a {config.model_type!r}: give a FlowNetwork, flow_map is for DFNs")
    chosen("layer", layer, config.num_hidden_layers)
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not token_ids:
        raise ValueError("text is empty: give a text to read")

    block = model.model.layers[layer]
    seen: dict[str, torch.Tensor] = {}

    def keep_input(module: nn.Module, args: tuple) -> None:
        seen["normed"] = args[0]

    def keep_slots(module: nn.Module, args: tuple, output: tuple) -> None:
        seen["slots"] = output[0]

    hooks = [block.router.register_forward_pre_hook(keep_input)]
    if config.memory_size:
        hooks.append(block.sequence_memory.register_forward_hook(keep_slots))
    try:
        input_ids = torch.tensor([token_ids], device=model.device)
        outputs = model(input_ids, output_flows=True, output_hidden_states=True, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()

    bank = bank_shares = None
    bank_words: list[list[str]] = []
    if config.memory_size:
        bank = model.model.memory.memory_bank
        states = outputs.hidden_states[-1][0].to(bank.dtype)
        bank_shares = (BANK_INV_TEMPERATURE * states @ bank.T / config.hidden_size**0.5).softmax(dim=-1).mean(dim=0)
        logits = model.lm_head(bank.to(model.dtype))
        favourites = (logits - logits.mean(dim=0)).topk(min(FAVOURITES, config.vocab_size), dim=-1).indices
        bank_words = [[str(tokenizer.decode([token])) for token in slot] for slot in favourites.tolist()]
    return FlowReading(
        words=[str(tokenizer.decode([token])) for token in token_ids],
        title=f"layer {layer + 1} of {config.num_hidden_layers}",
        profiles=to_numpy(block.flow._profile(config.flow_window)),
        patterns=to_numpy(block.flow._assemble(seen["normed"])[0][0]),
        matrix=to_numpy(outputs.flows[layer].matrix[0]),
        slots=to_numpy(seen["slots"][0]) if "slots" in seen else None,
        windows=np.stack([to_numpy(flows.window[0]) for flows in outputs.flows]),
        fractions=np.stack([to_numpy(flows.fraction[0]) for flows in outputs.flows]),
        kept=np.stack([to_numpy((flows.matrix[0] > 0).sum(dim=-1)) for flows in outputs.flows]),
        bank=None if bank is None else to_numpy(bank),
        bank_shares=None if bank_shares is None else to_numpy(bank_shares),
        bank_words=bank_words,
    )


def plot_patterns(reading: FlowReading, *, path: str | None = None) -> Figure:
    """Draw what flows from each offset in each pattern, and which patterns each token mixes.

    Args:
        reading: from `read_flows`.
        path: file to write, by its ending (.png, .svg, .pdf).
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
    above.set_title(f"What flows from each offset, by pattern: {reading.title}", color=INK, loc="left")
    above.set_xlabel("tokens back, 0 being the token itself", color=MUTED)
    above.set_ylabel("strength", color=MUTED)
    plain(above)

    image = below.imshow(reading.patterns.T, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    below.set_yticks(range(len(reading.profiles)), [str(number + 1) for number in range(len(reading.profiles))])
    below.set_ylabel("pattern", color=MUTED)
    below.set_title("How each token mixes them", color=INK, loc="left")
    plain(below)
    name_tokens(below, reading.words)
    colour_bar(figure, image, [below], "weight")
    return finished(figure, path)


def plot_flow_matrix(reading: FlowReading, *, path: str | None = None) -> Figure:
    """Draw the flow matrix of one layer: a row for each token, coloured where others flow into it.

    Args:
        reading: from `read_flows`.
        path: file to write, by its ending (.png, .svg, .pdf).
    """
    figure = Figure(figsize=(8.5, 7.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    kept = np.ma.masked_less_equal(reading.matrix, 0)
    image = axes.imshow(kept, cmap="viridis_r", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    axes.plot([-0.5, len(kept) - 0.5], [-0.5, len(kept) - 0.5], color=FAINT, lw=0.8, zorder=-1)
    axes.set_title(f"What flows into each token: {reading.title}", color=INK, loc="left")
    plain(axes)
    name_tokens(axes, reading.words, "from")
    name_tokens(axes, reading.words, "into", vertical=True)
    colour_bar(figure, image, [axes], "flow (a row sums to at most 1)")
    return finished(figure, path)


def plot_windows(reading: FlowReading, *, path: str | None = None) -> Figure:
    """Draw how far each token looks back, which share of that is kept, and how many tokens that makes, by layer.

    Args:
        reading: from `read_flows`.
        path: file to write, by its ending (.png, .svg, .pdf).
    """
    figure = Figure(figsize=(11, 6.5), layout="constrained", dpi=150)
    panels = figure.subplots(3, sharex=True)
    at = np.arange(len(reading.words))
    # Tokens back, the token itself included: no more can flow in, however wide the window.
    panels[0].fill_between(at, at + 1, color=FAINT, alpha=0.5, lw=0, label="tokens so far")
    for axes, values, name in zip(
        panels,
        (reading.windows, reading.fractions, reading.kept),
        ("window, tokens", "share to keep", "tokens kept"),
        strict=True,
    ):
        for layer, row in enumerate(values):
            colour, dash = line_style(layer)
            axes.plot(at, row, color=colour, ls=dash, lw=1.2, marker="o", ms=2.5, label=f"layer {layer + 1}")
        axes.set_ylabel(name, color=MUTED)
        axes.grid(axis="y", color=FAINT, lw=0.6)
        plain(axes)
    panels[0].set_ylim(0, 1.1 * reading.windows.max())
    panels[1].yaxis.set_major_formatter(lambda share, _: f"{share:.1%}")
    panels[2].yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[2].set_ylim(bottom=0)
    panels[0].set_xlim(-0.5, len(at) - 0.5)
    panels[0].legend(frameon=False, labelcolor=INK, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    panels[0].set_title("How far each token looks back, and how much of that flows in", color=INK, loc="left")
    name_tokens(panels[2], reading.words)
    return finished(figure, path)


def plot_memory(reading: FlowReading, *, path: str | None = None) -> Figure:
    """Draw how the slots of the sequence fill and grow apart, chunk by chunk, and what the slots of the bank hold.

    Args:
        reading: from `read_flows`.
        path: file to write, by its ending (.png, .svg, .pdf).

    Raises:
        ValueError: the model has no memory.
    """
    if reading.slots is None or reading.bank is None or reading.bank_shares is None:
        raise ValueError("the model has no memory (its memory_size is 0): there is nothing to draw")
    figure = Figure(figsize=(12, 7), layout="constrained", dpi=150)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[0.72, 1])[:, 0]
    number = len(reading.bank)

    last = len(reading.slots) - 1
    shown = sorted({0, min(1, last), last // 2, last})
    filling, *squares = above.subplots(1, 1 + len(shown), width_ratios=[1.3] + [1] * len(shown))
    lengths = np.linalg.norm(reading.slots, axis=-1)
    image = filling.imshow(lengths.T, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    filling.set_box_aspect(0.75)
    filling.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    filling.set_title("length of each slot", color=INK, loc="left", fontsize=9)
    filling.set_xlabel("chunks read", color=MUTED)
    filling.set_ylabel("slot of the sequence", color=MUTED)
    colour_bar(above, image, [filling], "")
    for axes, chunks in zip(squares, shown, strict=True):
        image = draw_similarity(axes, reading.slots[chunks])
        axes.set_title(f"similarity, chunks read: {chunks}", color=INK, loc="left", fontsize=9)
    colour_bar(above, image, squares, "cosine")
    above.suptitle(f"The sequence's memory: {reading.title}", color=INK, x=0.01, ha="left")

    similar, long, taken = below.subplots(1, 3)
    image = draw_similarity(similar, reading.bank)
    similar.set_title("similarity", color=INK, loc="left", fontsize=9)
    similar.set_ylabel("slot of the bank", color=MUTED)
    colour_bar(below, image, [similar], "cosine")
    names = [f"{'  '.join(map(one_line, words))}   {slot + 1}" for slot, words in enumerate(reading.bank_words)]
    long.barh(range(number), np.linalg.norm(reading.bank, axis=1), color=SERIES[1])
    long.set_yticks(range(number), names, parse_math=False)
    long.set_title("length, and the tokens it speaks for most", color=INK, loc="left", fontsize=9)
    taken.barh(range(number), reading.bank_shares, color=SERIES[0])
    taken.set_yticks(range(number), [str(slot + 1) for slot in range(number)])
    taken.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    taken.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    taken.set_title("share of this text's tokens that it would take", color=INK, loc="left", fontsize=9)
    below.suptitle("The bank, written in training", color=INK, x=0.01, ha="left")
    number_slots(filling.yaxis, number)
    for axes in (long, taken):
        axes.set_ylim(number - 0.5, -0.5)
    for axes in (filling, *squares, similar, long, taken):
        plain(axes)
    return finished(figure, path)


def draw_similarity(axes: Axes, vectors: np.ndarray) -> AxesImage:
    """Draw the cosine of the angle between any two of `vectors`, `[n, d]`."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.maximum(lengths, np.finfo(vectors.dtype).tiny)
    for axis in (axes.xaxis, axes.yaxis):
        number_slots(axis, len(vectors))
    return axes.imshow(units @ units.T, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same numbers on the CPU, as float32."""
    return tensor.detach().float().cpu().numpy()


def line_style(number: int) -> tuple[str, str]:
    """Colour and dash of the line of that number."""
    return SERIES[number % len(SERIES)], DASHES[number // len(SERIES) % len(DASHES)]


def one_line(word: str) -> str:
    """A token's text as a label: without the space around it, its line breaks visible."""
    return word.replace("\n", "↵").strip() or "␣"


def name_tokens(axes: Axes, words: Sequence[str], name: str = "", *, vertical: bool = False) -> None:
    """Write each token beside its place on an axis, or count them where they are many."""
    axis = axes.yaxis if vertical else axes.xaxis
    if len(words) > MAX_WORDS:
        axis.set_label_text(f"{name} token".strip(), color=MUTED)
        return
    rotation = 0 if vertical else 90
    labels = [one_line(word) for word in words]
    axis.set_ticks(range(len(words)), labels, rotation=rotation, fontsize=SMALL, color=INK, parse_math=False)
    axis.set_tick_params(length=0)
    axis.set_label_text(name, color=MUTED)


def number_slots(axis: Axis, number: int) -> None:
    """Count slots from 1 along an axis, not every one where they are many."""
    ticks = range(0, number, max(1, number // 8))
    axis.set_ticks(ticks, [str(tick + 1) for tick in ticks])


def colour_bar(figure: FigureBase, image: ScalarMappable, beside: Sequence[Axes], name: str) -> None:
    """A quiet scale of an image's colours, beside the axes that share it."""
    bar = figure.colorbar(image, ax=list(beside), pad=0.01, fraction=0.04, shrink=0.7)
    bar.set_label(name, color=MUTED, fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(colors=MUTED, labelsize=SMALL, length=2)


def finished(figure: Figure, path: str | None) -> Figure:
    """The figure, written to `path` if there is one."""
    if path is not None:
        figure.savefig(path)
    return figure
