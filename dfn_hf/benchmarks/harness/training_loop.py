"""Training loop of the benchmarks: AdamW, warm-up, cosine decay and gradient clipping, equal for all models."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, get_wsd_schedule

from .environment import clock, synchronize

MAX_GRADIENT_NORM = 1.0
WEIGHT_DECAY = 0.1
WARMUP_RATIO = 0.05


@dataclass(frozen=True)
class FitResult:
    """Training time without evaluations, and the largest gradient norm.

    Attributes:
        seconds: processor time on one CPU thread, wall-clock time otherwise (`environment.clock`).
        wall_seconds: wall-clock time.
        largest_gradient_norm: before clipping; infinite if the run diverged.
    """

    seconds: float
    wall_seconds: float
    largest_gradient_norm: float


def fit(
    model: PreTrainedModel,
    batches: Iterator[dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = WEIGHT_DECAY,
    decay_ratio: float = 1.0,
    evaluate_every: int = 100,
    evaluate: Callable[[int], None] | None = None,
) -> FitResult:
    """Train `model` for `steps` batches.

    The learning rate warms up over the first 5 % of the steps, stays constant, and decays to 0 over the last
    `decay_ratio` of the remaining steps. A FlowNetwork's memory bank is updated at every step. A gradient that is not
    finite ends the training before its update.

    Args:
        model: moved to its device by the caller.
        batches: keyword arguments of the model's forward pass.
        steps: optimizer steps.
        learning_rate: the peak learning rate.
        weight_decay: of tensors with two or more dimensions; vectors and scalars have none.
        decay_ratio: fraction of the steps after the warm-up with a decaying learning rate.
        evaluate_every: steps between calls of `evaluate`.
        evaluate: called with the step number, also after the last step; its time is not counted.

    Returns:
        The training time and the largest gradient norm.
    """
    device = str(model.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _adamw(parameters, learning_rate, weight_decay)
    warmup_steps = round(WARMUP_RATIO * steps)
    decay_steps = round(decay_ratio * (steps - warmup_steps))
    scheduler = get_wsd_schedule(optimizer, warmup_steps, decay_steps, num_training_steps=steps)
    commit_memory = getattr(model, "commit_memory", None)
    model.train()
    seconds, wall_seconds, largest = 0.0, 0.0, 0.0
    for step in range(1, steps + 1):
        started, wall_started = clock(device), time.perf_counter()
        batch = {name: tensor.to(device) for name, tensor in next(batches).items()}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM).item()
        if not math.isfinite(norm):
            largest = math.inf
            break
        largest = max(largest, norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if commit_memory is not None:
            commit_memory()
        synchronize(device)
        seconds += clock(device) - started
        wall_seconds += time.perf_counter() - wall_started
        if evaluate is not None and step % evaluate_every == 0 and step < steps:
            model.eval()
            evaluate(step)
            model.train()
    model.eval()
    if evaluate is not None:
        evaluate(steps)
    return FitResult(seconds=seconds, wall_seconds=wall_seconds, largest_gradient_norm=largest)


def _adamw(parameters: list[torch.nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
