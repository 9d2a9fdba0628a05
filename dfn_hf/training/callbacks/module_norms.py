"""Activation and gradient norms of a model's parts while it trains (Liquid, §3.10.4 and chapter 4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...plots.flow_map import INK, MUTED, SERIES, plain

ACTIVATION, GRADIENT = "activation_norm", "gradient_norm"
MAX_LINES = 12


class ModuleNormsCallback(TrainerCallback):
    """Adds to every entry of the Trainer's log the norms of some modules, at the step of the entry.

    `activation_norm/NAME` is the root mean square of what the module gives, `gradient_norm/NAME` the norm of its
    parameters' gradients after clipping. Nothing but a few sums is kept, and nothing is computed for other steps.

    Args:
        modules: names as `model.named_modules()` has them; None for the children of every numbered layer, such as
            `model.encoder.layers.0.attention`, and what stands beside the layers, such as `model.encoder.embedding`.
    """

    def __init__(self, modules: Sequence[str] | None = None):
        self.modules = modules
        self._norms: dict[str, torch.Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._chosen: dict[str, nn.Module] = {}
        self._recording = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        known = dict(model.named_modules())
        names = parts_of_layers(known) if self.modules is None else self.modules
        for name in names:
            if name not in known:
                raise ValueError(f"the model has no module {name!r}: take a name from model.named_modules()")
        self._chosen = {name: known[name] for name in names}
        self._hooks = [
            module.register_forward_hook(lambda module, args, output, name=name: self._record(name, output))
            for name, module in self._chosen.items()
        ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        self._recording = step % max(1, int(state.logging_steps)) == 0 or (step == 1 and args.logging_first_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._recording:
            return
        for name, module in self._chosen.items():
            gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
            if gradients:
                self._norms[f"{GRADIENT}/{name}"] = torch.stack([one.norm() for one in gradients]).norm()
        self._recording = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        norms = {name: value.item() for name, value in self._norms.items()}
        self._norms = {}
        logs.update(norms)
        state.log_history[-1].update(norms)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _record(self, name: str, output: Any) -> None:
        if not self._recording:
            return
        output = output[0] if isinstance(output, tuple) else output
        self._norms[f"{ACTIVATION}/{name}"] = output.detach().float().square().mean().sqrt()


def parts_of_layers(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the children of every numbered layer and of its owner, those without parameters left out."""

    def has_parts(name: str, module: nn.Module) -> bool:
        is_layer = name.rpartition(".")[2].isdigit() and ".layers." in f".{name}"
        return is_layer or isinstance(getattr(module, "layers", None), nn.ModuleList)

    return [
        f"{name}.{child}".removeprefix(".")
        for name, module in modules.items()
        if has_parts(name, module)
        for child, part in module.named_children()
        if child != "layers" and any(True for _ in part.parameters())
    ]


def plot_module_norms(
    history: Sequence[Mapping[str, float]], kind: str = ACTIVATION, *, path: str | None = None
) -> Figure:
    """Draw norms over steps, a line for each module; where there are many, those that changed most are named.

    Args:
        history: `trainer.state.log_history` of a run with `ModuleNormsCallback`.
        kind: "activation_norm" or "gradient_norm".
        path: file to write, by its ending (.png, .svg, .pdf).

    Raises:
        ValueError: the history holds no such norms.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for field, value in entry.items():
            if field.startswith(f"{kind}/"):
                lines.setdefault(field.partition("/")[2], []).append((entry["step"], value))
    if not lines:
        raise ValueError(f"the history holds no {kind!r}: train with ModuleNormsCallback, or choose another kind")
    ranked = sorted(lines, key=lambda name: -spread([value for _, value in lines[name]]))
    named = set(ranked[:MAX_LINES])
    figure = Figure(figsize=(10, 5.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for number, name in enumerate(ranked):
        steps, values = zip(*lines[name], strict=True)
        if name in named:
            dash = ("-", "--", ":")[number // len(SERIES) % 3]
            axes.plot(steps, values, color=SERIES[number % len(SERIES)], ls=dash, lw=1.4, marker=".", label=name)
        else:
            axes.plot(steps, values, color=MUTED, lw=0.6, alpha=0.5)
    axes.set_yscale("log")
    axes.set_xlabel("step", color=MUTED)
    axes.set_title(kind.replace("_", " "), color=INK, loc="left")
    axes.legend(frameon=False, labelcolor=INK, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    plain(axes)
    if path is not None:
        figure.savefig(path)
    return figure


def spread(values: Sequence[float]) -> float:
    """How many times the largest is the smallest."""
    return max(values) / max(min(values), 1e-30)
