"""The training loop of the benchmarks, the same for every model: AdamW, warm-up, cosine decay, clipping at 1.0."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, get_wsd_schedule

from .environment import clock, synchronize

MAX_GRADIENT_NORM = 1.0
WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Fit:
    """What the training took, its evaluations apart, and the largest gradient norm before clipping.

    Attributes:
        seconds: of processor time on one CPU thread, else of wall time (`machine.clock`).
        wall_seconds: by the clock on the wall, whatever else the machine did.
        largest_gradient_norm: infinite if the run diverged.
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
    decay_share: float = 1.0,
    evaluate_every: int = 100,
    evaluate: Callable[[int], None] | None = None,
) -> Fit:
    """Train `model` for `steps` batches of `input_ids` and `labels`, each `[batch, length]` int64.

    The learning rate rises over the first 5 % of the steps, stays, and falls to 0 over the last `decay_share` of the
    rest; a memory bank is written at every step. Weight decay is for matrices, not for vectors and scalars.
    `evaluate(step)` is called every `evaluate_every` steps and at the end, and its time is not counted. A gradient
    that is not finite ends the training with the weights as they were before it.
    """
    device = str(model.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    warmup_steps = round(WARMUP_SHARE * steps)
    decay_steps = round(decay_share * (steps - warmup_steps))
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
    return Fit(seconds=seconds, wall_seconds=wall_seconds, largest_gradient_norm=largest)
