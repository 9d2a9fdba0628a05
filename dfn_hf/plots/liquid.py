"""Plots a Liquid model: cross-attention, spectra, router probabilities and compression."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .style import FAINT, INK, MUTED, colour_bar, line_style, save_figure, set_token_ticks, strip_axes, to_numpy


@dataclass(frozen=True)
class Spectra:
    """Spectra of one embedding: f frames of L tokens, K = L / 2 + 1 frequencies.

    Attributes:
        before: `[f, K]`, magnitudes of the input of frequency attention, root mean square over features.
        after: `[f, K]`, magnitudes of its output.
        bands: first frequency of each octave band, and K.
        ratios: fraction of the frequencies that compression keeps, per compressed frame. A row longer than one frame
            has one frame less here, because the coarse frame is not compressed.
    """

    before: np.ndarray
    after: np.ndarray
    bands: Sequence[int]
    ratios: np.ndarray


@dataclass(frozen=True)
class Translation:
    """Internals of a Liquid during the translation of s source tokens to t target tokens.

    Attributes:
        source, target: text of each token.
        cross_attention: `[layers, t, s]`, cross-attention weights of each decoder block, mean over heads.
        source_experts: `[layers, s, experts]`, router probabilities in the encoder.
        target_experts: `[layers, t, experts]`, router probabilities in the decoder, at the token before each target.
        spectra: spectra of the encoder's embedding.
    """

    source: Sequence[str]
    target: Sequence[str]
    cross_attention: np.ndarray
    source_experts: np.ndarray
    target_experts: np.ndarray
    spectra: Spectra


@torch.no_grad()
def read_translation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, max_new_tokens: int = 128
) -> Translation:
    """Translate `text` greedily with a Liquid and record attention, router probabilities and spectra.

    Raises:
        ValueError: the model is not a Liquid, or the text is empty.
    """
    if model.config.model_type != "liquid":
        raise ValueError(f"model is a {model.config.model_type!r}: give a Liquid")
    if not text.strip():
        raise ValueError("text is empty: give a text with at least one word")
    inputs = tokenizer([text], return_tensors="pt").to(model.device)
    written = cast(Any, model).generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    with record_spectra(model.model.encoder.embedding) as records:
        outputs = model(
            **inputs,
            decoder_input_ids=written[:, :-1],
            output_attentions=True,
            output_router_logits=True,
            use_cache=False,
        )
    bands = model.model.encoder.embedding.frequency_attention.bands

    def token_texts(ids: torch.Tensor) -> list[str]:
        return [str(tokenizer.decode([token])) for token in ids.tolist()]

    def probabilities(logits: Sequence[torch.Tensor]) -> np.ndarray:
        return to_numpy(torch.stack([of_layer[0].softmax(dim=-1) for of_layer in logits]))

    before, after, ratios = (to_numpy(torch.cat(records[name])) for name in ("before", "after", "ratios"))
    return Translation(
        source=token_texts(inputs["input_ids"][0]),
        target=token_texts(written[0, 1:]),
        cross_attention=to_numpy(torch.stack([weights[0].mean(dim=0) for weights in outputs.cross_attentions])),
        source_experts=probabilities(outputs.encoder_router_logits),
        target_experts=probabilities(outputs.decoder_router_logits),
        spectra=Spectra(
            before=before,
            after=after,
            bands=[*(band.start for band in bands), before.shape[1]],
            ratios=ratios,
        ),
    )


@contextmanager
def record_spectra(embedding: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record the magnitudes before and after frequency attention, and the compression ratios, of a forward pass."""
    records: dict[str, list[torch.Tensor]] = {"before": [], "after": [], "ratios": []}

    def record_magnitudes(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        for name, frames in (("before", args[0]), ("after", output)):
            records[name].append(torch.fft.rfft(frames[0], dim=1).abs().square().mean(dim=-1).sqrt())

    def record_ratios(module: nn.Module, args: tuple, output: tuple) -> None:
        records["ratios"].append(output[1][0])

    hooks = [
        embedding.get_submodule("frequency_attention").register_forward_hook(record_magnitudes),
        embedding.get_submodule("low_pass").register_forward_hook(record_ratios),
    ]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def plot_cross_attention(reading: Translation, *, path: str | None = None) -> Figure:
    """Draw the cross-attention weights of each decoder block.

    Args:
        reading: result of `read_translation`.
        path: file to save, with the suffix .png, .svg or .pdf.
    """
    layers = len(reading.cross_attention)
    figure = Figure(figsize=(1 + 5.5 * layers, 5.5), layout="constrained", dpi=150)
    panels = figure.subplots(1, layers, squeeze=False)[0]
    for number, (axes, weights) in enumerate(zip(panels, reading.cross_attention, strict=True), start=1):
        image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(f"block {number} of {layers}", color=INK, loc="left", fontsize=9)
        strip_axes(axes)
        set_token_ticks(axes, reading.source, "source")
        set_token_ticks(axes, reading.target, "target" if number == 1 else "", vertical=True)
    colour_bar(figure, image, list(panels), "weight, mean over heads")
    figure.suptitle("Cross-attention", color=INK, x=0.01, ha="left")
    return save_figure(figure, path)


def plot_spectra(reading: Translation, *, path: str | None = None) -> Figure:
    """Draw the spectra of the encoder's frames before and after frequency attention, with the octave bands.

    Args:
        reading: result of `read_translation`.
        path: file to save, with the suffix .png, .svg or .pdf.
    """
    spectra = reading.spectra
    figure = Figure(figsize=(10, 4.5), layout="constrained", dpi=150)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, magnitudes, name in zip(panels, (spectra.before, spectra.after), ("before", "after"), strict=True):
        for number, row in enumerate(magnitudes):
            colour, dash = line_style(number)
            axes.plot(row, color=colour, ls=dash, lw=1.4, label=f"frame {number + 1}")
        for edge in spectra.bands[1:-1]:
            axes.axvline(edge - 0.5, color=FAINT, lw=0.8, zorder=-1)
        axes.set_xlim(-0.5, spectra.bands[-1] - 0.5)
        axes.set_yscale("log")
        axes.set_title(f"{name} frequency attention", color=INK, loc="left", fontsize=9)
        axes.set_xlabel("frequency, cycles per frame", color=MUTED)
        strip_axes(axes)
    panels[0].set_ylabel("magnitude, root mean square over features", color=MUTED)
    if len(spectra.before) > 1:
        panels[1].legend(frameon=False, labelcolor=INK, fontsize=8)
    figure.suptitle("Spectra of the source, with the edges of octave bands", color=INK, x=0.01, ha="left")
    return save_figure(figure, path)


def plot_experts(reading: Translation, *, path: str | None = None) -> Figure:
    """Draw the router probability of each expert for each token, for all blocks of encoder and decoder.

    Args:
        reading: result of `read_translation`.
        path: file to save, with the suffix .png, .svg or .pdf.
    """
    rows = [
        *((f"encoder, block {number}", part) for number, part in enumerate(reading.source_experts, start=1)),
        *((f"decoder, block {number}", part) for number, part in enumerate(reading.target_experts, start=1)),
    ]
    figure = Figure(figsize=(11, 1.6 * len(rows)), layout="constrained", dpi=150)
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    scale = {"vmin": min(part.min() for _, part in rows), "vmax": max(part.max() for _, part in rows)}
    for axes, (name, probabilities) in zip(panels, rows, strict=True):
        image = axes.imshow(probabilities.T, cmap="Blues", **scale, aspect="auto", interpolation="nearest")
        axes.set_title(name, color=INK, loc="left", fontsize=9)
        experts = range(probabilities.shape[1])
        axes.set_yticks(experts, [str(expert + 1) for expert in experts])
        axes.set_ylabel("expert", color=MUTED)
        strip_axes(axes)
        axes.set_xticks([])
    set_token_ticks(panels[len(reading.source_experts) - 1], reading.source)
    set_token_ticks(panels[-1], reading.target, "next target token")
    colour_bar(figure, image, list(panels), "router probability")
    figure.suptitle("Router probabilities of experts", color=INK, x=0.01, ha="left")
    return save_figure(figure, path)


def plot_compression(readings: dict[str, Translation], *, path: str | None = None) -> Figure:
    """Draw the fraction of frequencies that compression keeps, for several texts.

    Args:
        readings: results of `read_translation`, by name.
        path: file to save, with the suffix .png, .svg or .pdf.
    """
    figure = Figure(figsize=(8, 0.8 + 0.5 * len(readings)), layout="constrained", dpi=150)
    axes: Axes = figure.subplots()
    for place, reading in enumerate(readings.values()):
        ratios = reading.spectra.ratios
        axes.barh(place, ratios.mean(), color=line_style(0)[0], height=0.6)
        axes.plot(ratios, np.full(len(ratios), place), ls="", marker="o", ms=4, color=INK)
    axes.set_yticks(range(len(readings)), list(readings))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")
    axes.set_xlabel("frequencies kept: mean (bar) and each frame (dot)", color=MUTED)
    axes.set_title("Frequencies kept by compression", color=INK, loc="left")
    strip_axes(axes)
    return save_figure(figure, path)
