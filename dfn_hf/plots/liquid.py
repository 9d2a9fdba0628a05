"""Pictures of a Liquid: what its decoder read, its spectra, its experts, and what compression kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .flow_map import FAINT, INK, MUTED, plain
from .flows import colour_bar, finished, line_style, name_tokens, to_numpy


@dataclass(frozen=True)
class Spectra:
    """The frames of one embedding, f of L tokens each, K = L / 2 + 1 frequencies.

    Attributes:
        before: `[f, K]`, magnitude of what frequency attention was given, root mean square over features.
        after: `[f, K]`, of what it made of it.
        bands: first frequency of each octave band, and K.
        ratios: share of the frequencies that compression kept of each of its frames; a row longer than a frame has
            one frame less here, since a coarse frame is not compressed.
    """

    before: np.ndarray
    after: np.ndarray
    bands: Sequence[int]
    ratios: np.ndarray


@dataclass(frozen=True)
class Translation:
    """What a Liquid did with a source of s tokens, writing a target of t tokens.

    Attributes:
        source, target: the text of each token.
        cross_attention: `[layers, t, s]`, mean over heads, what each block of the decoder read to write each token.
        source_experts: `[layers, s, experts]`, the router's probabilities in the encoder.
        target_experts: `[layers, t, experts]`, and in the decoder, of the token that was read to write each.
        spectra: of the encoder's embedding.
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
    """Translate `text` greedily with a Liquid and take what its parts did.

    Raises:
        ValueError: another kind of model, or an empty text.
    """
    if model.config.model_type != "liquid":
        raise ValueError(f"model is a {model.config.model_type!r}: give a Liquid")
    if not text.strip():
        raise ValueError("text is empty: give a text to read")
    inputs = tokenizer([text], return_tensors="pt").to(model.device)
    written = cast(Any, model).generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    embedding = model.model.encoder.embedding
    seen: dict[str, list[torch.Tensor]] = {"before": [], "after": [], "ratios": []}

    def keep_spectra(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        for name, frames in (("before", args[0]), ("after", output)):
            seen[name].append(torch.fft.rfft(frames[0], dim=1).abs().square().mean(dim=-1).sqrt())

    def keep_ratios(module: nn.Module, args: tuple, output: tuple) -> None:
        seen["ratios"].append(output[1][0])

    hooks = [
        embedding.frequency_attention.register_forward_hook(keep_spectra),
        embedding.low_pass.register_forward_hook(keep_ratios),
    ]
    try:
        outputs = model(
            **inputs,
            decoder_input_ids=written[:, :-1],
            output_attentions=True,
            output_router_logits=True,
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()

    def words(ids: torch.Tensor) -> list[str]:
        return [str(tokenizer.decode([token])) for token in ids.tolist()]

    def probabilities(logits: Sequence[torch.Tensor]) -> np.ndarray:
        return to_numpy(torch.stack([of_layer[0].softmax(dim=-1) for of_layer in logits]))

    before, after, ratios = (to_numpy(torch.cat(seen[name])) for name in ("before", "after", "ratios"))
    return Translation(
        source=words(inputs["input_ids"][0]),
        target=words(written[0, 1:]),
        cross_attention=to_numpy(torch.stack([weights[0].mean(dim=0) for weights in outputs.cross_attentions])),
        source_experts=probabilities(outputs.encoder_router_logits),
        target_experts=probabilities(outputs.decoder_router_logits),
        spectra=Spectra(
            before=before,
            after=after,
            bands=[*(band.start for band in embedding.frequency_attention.bands), before.shape[1]],
            ratios=ratios,
        ),
    )


def plot_cross_attention(reading: Translation, *, path: str | None = None) -> Figure:
    """Draw which tokens of the source each block of the decoder read to write each token of the target.

    Args:
        reading: from `read_translation`.
        path: file to write, by its ending (.png, .svg, .pdf).
    """
    layers = len(reading.cross_attention)
    figure = Figure(figsize=(1 + 5.5 * layers, 5.5), layout="constrained", dpi=150)
    panels = figure.subplots(1, layers, squeeze=False)[0]
    for number, (axes, weights) in enumerate(zip(panels, reading.cross_attention, strict=True), start=1):
        image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(f"block {number} of {layers}", color=INK, loc="left", fontsize=9)
        plain(axes)
        name_tokens(axes, reading.source, "read")
        name_tokens(axes, reading.target, "written" if number == 1 else "", vertical=True)
    colour_bar(figure, image, list(panels), "weight, mean over heads")
    figure.suptitle("What the decoder reads", color=INK, x=0.01, ha="left")
    return finished(figure, path)


def plot_spectra(reading: Translation, *, path: str | None = None) -> Figure:
    """Draw the spectrum of the encoder's frames before and after frequency attention, octave bands between lines.

    Args:
        reading: from `read_translation`.
        path: file to write, by its ending (.png, .svg, .pdf).
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
        plain(axes)
    panels[0].set_ylabel("magnitude, root mean square over features", color=MUTED)
    if len(spectra.before) > 1:
        panels[1].legend(frameon=False, labelcolor=INK, fontsize=8)
    figure.suptitle("Spectra of the source, octave bands between the lines", color=INK, x=0.01, ha="left")
    return finished(figure, path)


def plot_experts(reading: Translation, *, path: str | None = None) -> Figure:
    """Draw the router's probability of each expert for each token, block by block, in encoder and decoder.

    Args:
        reading: from `read_translation`.
        path: file to write, by its ending (.png, .svg, .pdf).
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
        plain(axes)
        axes.set_xticks([])
    name_tokens(panels[len(reading.source_experts) - 1], reading.source)
    name_tokens(panels[-1], reading.target, "written next")
    colour_bar(figure, image, list(panels), "router's probability")
    figure.suptitle("Experts", color=INK, x=0.01, ha="left")
    return finished(figure, path)


def plot_compression(readings: dict[str, Translation], *, path: str | None = None) -> Figure:
    """Draw which share of their frequencies the frames of several texts keep.

    Args:
        readings: each from `read_translation`, by the name to give it.
        path: file to write, by its ending (.png, .svg, .pdf).
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
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("frequencies kept: mean (bar) and each frame (dot)", color=MUTED)
    axes.set_title("What compression keeps", color=INK, loc="left")
    plain(axes)
    return finished(figure, path)
