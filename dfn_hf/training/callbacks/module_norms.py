"""Logs activation and gradient norms of modules during training (Liquid paper, §3.10.4 and chapter 4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ACTIVATION, GRADIENT = "activation_norm", "gradient_norm"


class ModuleNormsCallback(TrainerCallback):
    """Adds module norms to every training entry of the Trainer's log.

    `activation_norm/NAME` is the root mean square of the module's output. `gradient_norm/NAME` is the norm of the
    gradients of its parameters after clipping. Norms are computed in logged steps only.

    Args:
        modules: names from `model.named_modules()`. None means the children of every numbered layer, such as
            `model.encoder.layers.0.attention`, and the siblings of the layers, such as `model.encoder.embedding`.
    """

    def __init__(self, modules: Sequence[str] | None = None):
        self.modules = modules
        self._norms: dict[str, torch.Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._observed: dict[str, nn.Module] = {}
        self._recording = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        known = dict(model.named_modules())
        names = default_modules(known) if self.modules is None else self.modules
        for name in names:
            if name not in known:
                raise ValueError(
                    f"modules names {name!r}, which the model does not have: give names from model.named_modules()"
                )
        self._observed = {name: known[name] for name in names}
        self._hooks = [
            module.register_forward_hook(lambda module, args, output, name=name: self._record(name, output))
            for name, module in self._observed.items()
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
        for name, module in self._observed.items():
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


def default_modules(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of all children with parameters of numbered layers and of the modules that own them."""

    def has_observed_children(name: str, module: nn.Module) -> bool:
        is_layer = name.rpartition(".")[2].isdigit() and ".layers." in f".{name}"
        return is_layer or isinstance(getattr(module, "layers", None), nn.ModuleList)

    return [
        f"{name}.{child}".removeprefix(".")
        for name, module in modules.items()
        if has_observed_children(name, module)
        for child, part in module.named_children()
        if child != "layers" and any(True for _ in part.parameters())
    ]
