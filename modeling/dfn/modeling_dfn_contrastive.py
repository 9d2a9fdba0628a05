"""Contrastive DFN: embeds two views of the same thing, each a text or a field, close together.

    e     = normalise(W · mean of a view's states over its real tokens or entities)
    ℓ_ij  = exp(s) e_i · e'_j                                     view i against pair j
    loss  = ½ Σ over both directions of the mean cross-entropy of ℓ with the diagonal as labels
            + ratio_loss_coef · mean of the texts' ratio losses, with `entity_sampling="adaptive"`

This is symmetric InfoNCE with in-batch negatives and a learnt temperature, as in CLIP (Radford et al. 2021, arXiv
2103.00020, fig. 3).

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
from transformers.utils import ModelOutput, can_return_tuple, logging

from ..modules.packing import refuse_packing
from .configuration_dfn import DFNConfig
from .modeling_dfn import DFNModel, DFNPreTrainedModel
from .modeling_dfn_field import DFNFieldModel

INITIAL_TEMPERATURE = 0.07
MAX_LOG_SCALE = math.log(100)

logger = logging.get_logger(__name__)


@dataclass
class DFNContrastiveOutput(ModelOutput):
    """
    Attributes:
        loss: scalar, symmetric InfoNCE; with several processes, of this process's rows and the pairs of all processes.
        logits_per_pair: `[B, B]`, row i compares view i with every pair of this process.
        embeds: `[B, projection_dim]`, unit length, float32 or float64.
        pair_embeds: `[B, projection_dim]`, embeddings of the second views.
    """

    loss: torch.Tensor | None = None
    logits_per_pair: torch.Tensor | None = None
    embeds: torch.Tensor | None = None
    pair_embeds: torch.Tensor | None = None


class DFNForContrastive(DFNPreTrainedModel):
    """A bidirectional DFN that embeds texts and, with `contrastive_fields`, fields into one space.

    Both texts of a pair use `model` and `projection`; both fields use `field_model` and `field_projection`. The model
    keeps a copy of the configuration with `is_causal=False`, so that `DFNModel.from_pretrained` on a saved folder
    gives the states that are pooled here.

    Raises:
        ValueError: the configuration has `memory_slots` or `readout_window`, which require a causal model.

    Example:
        >>> import torch
        >>> from dfn_hf import DFNConfig, DFNForContrastive
        >>> model = DFNForContrastive(DFNConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, projection_dim=8))
        >>> outputs = model(torch.randint(32, (4, 20)), pair_input_ids=torch.randint(32, (4, 30)))
        >>> outputs.embeds.shape, outputs.logits_per_pair.shape, outputs.loss.shape
        (torch.Size([4, 8]), torch.Size([4, 4]), torch.Size([]))
    """

    _keep_in_fp32_modules_strict = [*DFNPreTrainedModel._keep_in_fp32_modules_strict, "logit_scale"]
    accepts_loss_kwargs = False  # tells the Trainer that the loss is a mean over each micro-batch

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
        self.logit_scale = nn.Parameter(torch.empty(1, dtype=torch.float32))  # log of the scale, as in CLIP
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the parameters and buffers of one module."""
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
            input_ids: int64 `[B, M]`, texts.
            attention_mask: `[B, M]`; 0 is padding, at any position of a row. None if all tokens are real.
            coordinates: `[B, N, coordinate_dim]`, fields instead of texts.
            values: `[B, N, value_dim]`, of those fields.
            mask: bool `[B, N]`, True where a sample of the field is given; None if all are.
            inputs_embeds: `[B, M, hidden_size]`, instead of `input_ids`.
            pair_input_ids, pair_attention_mask, pair_coordinates, pair_values, pair_mask, pair_inputs_embeds: the
                second views, as above; row i is the pair of row i. Without them only `embeds` is returned.
            return_loss: compute the loss. With `torch.distributed`, every process must make the same call with the
                same number of rows, because each process compares its rows with the pairs of all.

        Raises:
            ValueError: a view has neither text nor field, or both; a field is passed to a model without
                `contrastive_fields`; a row is all padding; or the numbers of views differ.
        """
        refuse_packing(self, attention_mask, **kwargs)
        embeds, ratio_loss = self._embed("", input_ids, inputs_embeds, attention_mask, coordinates, values, mask)
        pair = (pair_input_ids, pair_inputs_embeds, pair_attention_mask, pair_coordinates, pair_values, pair_mask)
        if all(view is None for view in pair):
            return DFNContrastiveOutput(embeds=embeds)
        pair_embeds, pair_ratio_loss = self._embed("pair_", *pair)
        if len(embeds) != len(pair_embeds):
            raise ValueError(
                f"The inputs have {len(embeds)} first views and {len(pair_embeds)} second views: pass one second view "
                "for each first view."
            )
        scale = capped_scale(self.logit_scale.to(embeds.dtype))
        loss = None
        if return_loss:
            if self.training and len(embeds) * world_size() == 1:
                logger.warning_once("A batch of one pair has no negatives: its loss is 0 and trains nothing.")
            loss = info_nce(embeds, pair_embeds, scale)
            ratio_losses = [losses for losses in (ratio_loss, pair_ratio_loss) if losses is not None]
            if ratio_losses:
                loss = loss + self.config.ratio_loss_coef * torch.cat(ratio_losses).mean()
        with torch.autocast(embeds.device.type, enabled=False):
            logits = scale * embeds @ pair_embeds.T
        return DFNContrastiveOutput(loss=loss, logits_per_pair=logits, embeds=embeds, pair_embeds=pair_embeds)

    def _embed(self, prefix, input_ids, inputs_embeds, attention_mask, coordinates, values, mask):
        """Embed one view.

        Args:
            prefix: prefix of the view's argument names, for messages.

        Returns:
            (unit vectors `[B, projection_dim]`, ratio losses `[B]` or None).
        """
        is_text = input_ids is not None or inputs_embeds is not None
        is_field = coordinates is not None or values is not None
        if is_text == is_field:
            raise ValueError(
                f"Pass a text ({prefix}input_ids or {prefix}inputs_embeds) or a field ({prefix}coordinates and "
                f"{prefix}values){', not both' if is_text else ''}."
            )
        if is_text:
            outputs = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
            real = attention_mask
            projection = self.projection
        else:
            if self.field_model is None:
                raise ValueError(
                    f"{prefix}coordinates and {prefix}values require a model with `contrastive_fields=True`: set it "
                    "in the configuration."
                )
            if coordinates is None or values is None:
                raise ValueError(f"A field requires {prefix}coordinates and {prefix}values: pass both.")
            outputs = self.field_model(coordinates=coordinates, values=values, mask=mask)
            real = outputs.entity_mask
            projection = self.field_projection
        states = outputs.last_hidden_state
        pooled = masked_mean(states, real, f"{prefix}{'attention_mask' if is_text else 'mask'}")
        projected = projection(pooled.to(states.dtype))
        embeds = F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1)
        return embeds, outputs.ratio_loss if is_text else None


def masked_mean(states: torch.Tensor, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return the mean of `[B, M, hidden_size]` over positions where `mask` `[B, M]` is not 0, in float32 or float64.

    Args:
        name: the mask's name, for the message.

    Raises:
        ValueError: a row's mask is 0 everywhere. Checked on CPUs only, because a GPU would have to synchronise.
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if mask is None:
        return states.mean(dim=1)
    real = mask.bool()
    if real.device.type == "cpu" and not torch.compiler.is_compiling() and not real.any(dim=1).all():
        raise ValueError(f"{name} is 0 everywhere in a row: remove the row, or mark a real position with 1.")
    sums = states.masked_fill(~real[..., None], 0).sum(dim=1)
    return sums / real.sum(dim=1, keepdim=True).clamp(min=1)


def capped_scale(log_scale: torch.Tensor) -> torch.Tensor:
    """Return min(exp(log_scale), 100), with the gradient of exp, so that a scale above 100 can decrease again."""
    return (log_scale - (log_scale - MAX_LOG_SCALE).clamp(min=0).detach()).exp()


def info_nce(embeds: torch.Tensor, pair_embeds: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the symmetric InfoNCE loss of embeddings `[B, projection_dim]`, a scalar.

    With several processes it compares this process's rows with the pairs of all processes. `DistributedDataParallel`
    averages gradients over processes, which gives the gradient of the whole batch's loss.
    """
    first = dist.get_rank() * len(embeds) if world_size() > 1 else 0
    targets = torch.arange(first, first + len(embeds), device=embeds.device)
    with torch.autocast(embeds.device.type, enabled=False):
        forward_logits = scale * embeds @ gather_from_processes(pair_embeds).T
        backward_logits = scale * pair_embeds @ gather_from_processes(embeds).T
        return (F.cross_entropy(forward_logits, targets) + F.cross_entropy(backward_logits, targets)) / 2


def world_size() -> int:
    """Return the number of processes; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_from_processes(rows: torch.Tensor) -> torch.Tensor:
    """Gather the rows `[B, …]` of all processes in rank order, with gradient: `[processes · B, …]`."""
    return GatherRows.apply(rows) if world_size() > 1 else rows


class GatherRows(torch.autograd.Function):
    """Concatenates the rows of all processes. Its backward pass is `SumOwnRows`."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        all_rows = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(all_rows, rows.contiguous())
        return torch.cat(all_rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return SumOwnRows.apply(gradient)


class SumOwnRows(torch.autograd.Function):
    """Sums the rows `[processes · B, …]` over the processes and keeps one's own. Its backward pass is `GatherRows`."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        total = rows.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[dist.get_rank()]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return GatherRows.apply(gradient)


__all__ = ["DFNForContrastive"]
