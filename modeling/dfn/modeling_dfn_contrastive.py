"""Contrastive DFN: two views of one thing, each a text or a field, embedded close to each other and far from all else.

    e     = normalise(W · mean of a view's states over its real tokens or entities)
    ℓ_ij  = exp(s) e_i · e'_j                                     row i: view i against every pair
    loss  = ½ Σ over both directions of the mean cross-entropy of ℓ with the diagonal as its labels
            + ratio_loss_coef · mean of the texts' ratio losses, with `entity_sampling="adaptive"`

Symmetric InfoNCE with in-batch negatives and a learned temperature: CLIP (Radford et al. 2021, arXiv 2103.00020,
fig. 3).

Shape letters: B batch, M tokens, N samples of a field, E entities of a field.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_dfn import DFNConfig
from .modeling_dfn import DFNModel, DFNPreTrainedModel
from .modeling_dfn_field import DFNFieldModel

INITIAL_TEMPERATURE = 0.07
MAX_LOG_SCALE = math.log(100)


@dataclass
class DFNContrastiveOutput(ModelOutput):
    """
    Attributes:
        loss: scalar, symmetric InfoNCE; over several processes that of this process's rows against everyone's pairs.
        logits_per_pair: `[B, B]`, row i is view i against every pair of this process.
        embeds: `[B, projection_dim]`, of length 1, float32 or float64.
        pair_embeds: the same of the second views.
    """

    loss: torch.FloatTensor | None = None
    logits_per_pair: torch.FloatTensor | None = None
    embeds: torch.FloatTensor | None = None
    pair_embeds: torch.FloatTensor | None = None


class DFNForContrastive(DFNPreTrainedModel):
    """A bidirectional DFN that embeds texts and, with `contrastive_fields`, fields into one space.

    Both texts of a pair go through `model` and `projection`, both fields through `field_model` and
    `field_projection`. The configuration is copied, and the copy has `is_causal` False: `DFNModel` loads from a saved
    folder and gives the states that are pooled here.

    Raises:
        ValueError: the configuration has what goes from left to right only (`memory_slots`, `readout_window`).
    """

    _keep_in_fp32_modules_strict = [*DFNPreTrainedModel._keep_in_fp32_modules_strict, "logit_scale"]
    accepts_loss_kwargs = False  # for the Trainer: the loss is a mean over this batch, accumulated or not

    def __init__(self, config: DFNConfig):
        config = copy.deepcopy(config)
        config.is_causal = False
        config.validate_architecture()
        super().__init__(config)
        self.model = DFNModel(config)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.field_model = self.field_projection = None
        if config.contrastive_fields:
            self.field_model = DFNFieldModel(config)
            self.field_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(1, dtype=torch.float32))  # its log, as in CLIP
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DFNForContrastive):
            init.constant_(module.logit_scale, -math.log(INITIAL_TEMPERATURE))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pair_input_ids: torch.LongTensor | None = None,
        pair_attention_mask: torch.Tensor | None = None,
        coordinates: torch.FloatTensor | None = None,
        values: torch.FloatTensor | None = None,
        mask: torch.BoolTensor | None = None,
        pair_coordinates: torch.FloatTensor | None = None,
        pair_values: torch.FloatTensor | None = None,
        pair_mask: torch.BoolTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pair_inputs_embeds: torch.FloatTensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> DFNContrastiveOutput:
        """
        Args:
            input_ids: int64 `[B, M]`, a text each, or `inputs_embeds` `[B, M, hidden_size]`.
            attention_mask: `[B, M]`, 0 is padding, anywhere in a row; without it every token is real.
            coordinates, values: `[B, N, coordinate_dim]` and `[B, N, value_dim]`, a field each in the place of a text.
            mask: bool `[B, N]`, which samples of the fields there are; without it all.
            pair_input_ids, pair_inputs_embeds, pair_attention_mask, pair_coordinates, pair_values, pair_mask: the
                second views, row i that of row i; without them the first are embedded and nothing is compared.
            return_loss: compute the loss of pairs. Where `torch.distributed` runs, every process must then make the
                same call with as many rows: each compares its rows with those of all.

        Raises:
            ValueError: a view is neither or both of text and field; a field where there is no tower for one; a view
                of nothing but padding; other numbers of first and second views; or training on one pair alone.
        """
        embeds, ratio = self._embed("", input_ids, inputs_embeds, attention_mask, coordinates, values, mask)
        pair = (pair_input_ids, pair_inputs_embeds, pair_attention_mask, pair_coordinates, pair_values, pair_mask)
        if all(view is None for view in pair):
            return DFNContrastiveOutput(embeds=embeds)
        pair_embeds, pair_ratio = self._embed("pair_", *pair)
        if len(embeds) != len(pair_embeds):
            raise ValueError(
                f"There are {len(embeds)} first views and {len(pair_embeds)} second: row i of one must be the pair of "
                "row i of the other."
            )
        scale = capped_scale(self.logit_scale.to(embeds.dtype))
        loss = None
        if return_loss:
            if self.training and len(embeds) * world_size() == 1:
                raise ValueError("One pair has no other to be told from: train on batches of two pairs or more.")
            loss = info_nce(embeds, pair_embeds, scale)
            ratios = [rows for rows in (ratio, pair_ratio) if rows is not None]
            if ratios:
                loss = loss + self.config.ratio_loss_coef * torch.cat(ratios).mean()
        with torch.autocast(embeds.device.type, enabled=False):
            logits = scale * embeds @ pair_embeds.T
        return DFNContrastiveOutput(loss=loss, logits_per_pair=logits, embeds=embeds, pair_embeds=pair_embeds)

    def _embed(self, prefix, input_ids, inputs_embeds, attention_mask, coordinates, values, mask):
        """One view → (`[B, projection_dim]`, of length 1; `[B]`, its ratio losses, or None).

        Args:
            prefix: of its arguments' names.
        """
        is_text = input_ids is not None or inputs_embeds is not None
        is_field = coordinates is not None or values is not None
        if is_text == is_field:
            raise ValueError(
                f"Pass {'either' if is_text else 'one of'} a text ({prefix}input_ids or {prefix}inputs_embeds) or a "
                f"field ({prefix}coordinates and {prefix}values){', not both' if is_text else ''}."
            )
        if is_text:
            outputs = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
            real = attention_mask
            projection = self.projection
        else:
            if self.field_model is None:
                raise ValueError(
                    f"{prefix}coordinates and {prefix}values are of a field, and this model reads texts alone: make "
                    "it with `contrastive_fields=True` in its configuration."
                )
            if coordinates is None or values is None:
                raise ValueError(f"A field is {prefix}coordinates and {prefix}values: pass both.")
            outputs = self.field_model(coordinates=coordinates, values=values, mask=mask)
            real = outputs.entity_mask
            projection = self.field_projection
        states = outputs.last_hidden_state
        pooled = masked_mean(states, real, f"{prefix}{'attention_mask' if is_text else 'mask'}")
        projected = projection(pooled.to(states.dtype))
        embeds = F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1)
        return embeds, outputs.ratio_loss if is_text else None


def masked_mean(states: torch.Tensor, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    """Mean of `[B, M, hidden_size]` over the places where `mask` `[B, M]` is not 0, in at least float32.

    Raises:
        ValueError: a row has no such place, where that can be told without waiting for a GPU; `name` is the mask's.
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if mask is None:
        return states.mean(dim=1)
    real = mask.bool()
    if real.device.type == "cpu" and not torch.compiler.is_compiling() and not real.any(dim=1).all():
        raise ValueError(f"{name} is 0 everywhere in a row: there is nothing to embed, leave the row out.")
    sums = states.masked_fill(~real[..., None], 0).sum(dim=1)
    return sums / real.sum(dim=1, keepdim=True).clamp(min=1)


def capped_scale(log_scale: torch.Tensor) -> torch.Tensor:
    """exp(log_scale), at most 100; its gradient passes, so that a scale beyond 100 can come back."""
    return (log_scale - (log_scale - MAX_LOG_SCALE).clamp(min=0).detach()).exp()


def info_nce(embeds: torch.Tensor, pair_embeds: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of rows `[B, projection_dim]`, a scalar.

    Over several processes it is that of this process's rows against the pairs of all: its mean over processes, which
    `DistributedDataParallel` takes of the gradients, is the loss of the whole batch.
    """
    first = dist.get_rank() * len(embeds) if world_size() > 1 else 0
    targets = torch.arange(first, first + len(embeds), device=embeds.device)
    with torch.autocast(embeds.device.type, enabled=False):
        forth = scale * embeds @ gathered(pair_embeds).T
        back = scale * pair_embeds @ gathered(embeds).T
        return (F.cross_entropy(forth, targets) + F.cross_entropy(back, targets)) / 2


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes `[processes · B, …]`, in the order of their ranks, with gradient."""
    return GatherRows.apply(rows) if world_size() > 1 else rows


class GatherRows(torch.autograd.Function):
    """All processes' rows; backward sums what every process's loss asks of the rows of this one."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        everyones = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(everyones, rows.contiguous())
        return torch.cat(everyones)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[dist.get_rank()]


__all__ = ["DFNForContrastive"]
