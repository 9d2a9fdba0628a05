"""Outputs of the Liquid models.

Shape letters: B batch, M decoder tokens of this call, N decoder tokens so far, S source tokens, H heads, m experts.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput

from ..modules.outputs import OutputCollector
from .mixture_of_experts import Routing


@dataclass
class LiquidEncoderOutput(BaseModelOutput):
    """
    Attributes:
        last_hidden_state: `[B, S, hidden_size]`, zero at padding.
        hidden_states: the embedding and the output of each block, the last one after the final norm.
        attentions: per block `[B, H, S, S]`.
        router_logits: per block `[B, S, m]`.
        reconstruction_loss, router_loss: `[B]`, one value per row.
        metrics: scalar tensors `compression_ratio` and `experts_per_token`.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    reconstruction_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None


@dataclass
class LiquidModelOutput(Seq2SeqModelOutput):
    """
    Attributes:
        last_hidden_state: decoder states `[B, M, hidden_size]`, zero at padding.
        past_key_values: `EncoderDecoderCache` to continue from; named `cache` from transformers 5.24 on.
        decoder_hidden_states: the embedding and the output of each decoder block, the last one after the final norm.
        decoder_attentions: per block `[B, H, M, N]`.
        cross_attentions: per block `[B, H, M, S]`.
        encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: see `LiquidEncoderOutput`.
        encoder_router_logits, decoder_router_logits: per block `[B, tokens, m]`; with `output_router_logits`.
        reconstruction_loss, router_loss: `[B]`, sums of encoder and decoder per row; with `output_router_logits`.
        metrics: scalar tensors of the encoder and, with the prefix `decoder_`, of the decoder; with
            `output_router_logits`.
    """

    encoder_router_logits: tuple[torch.Tensor, ...] | None = None
    decoder_router_logits: tuple[torch.Tensor, ...] | None = None
    reconstruction_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None


@dataclass
class LiquidSeq2SeqLMOutput(Seq2SeqLMOutput):
    """
    Attributes:
        loss: scalar, `token_loss` plus `aux_loss`; with labels.
        logits: `[B, M, vocab_size]`.
        token_loss: scalar, cross-entropy; with labels.
        aux_loss: scalar, `reconstruction_loss_coef` · `reconstruction_loss` + `router_loss`. Add it to a loss that you
            compute from the logits. This and the next two exist with labels, in training mode, or with
            `output_router_logits`. Rows have equal weights or, with labels, their numbers of labels.
        reconstruction_loss, router_loss: scalars, means over rows.
        The other attributes are those of `LiquidModelOutput`.
    """

    token_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None
    encoder_router_logits: tuple[torch.Tensor, ...] | None = None
    decoder_router_logits: tuple[torch.Tensor, ...] | None = None
    metrics: dict[str, torch.Tensor] | None = None


@dataclass
class LiquidDecoderOutput(BaseModelOutput):
    """Outputs of the decoder; the attributes are those of `LiquidModelOutput` without the prefix `decoder_`."""

    cross_attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    reconstruction_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None


def collect_block_outputs(
    outputs: OutputCollector,
    weights: torch.Tensor | None,
    cross_weights: torch.Tensor | None,
    router_loss: torch.Tensor,
    routing: Routing,
) -> None:
    """Add the optional outputs of one block, in the order in which `ImprovedTransformerBlock` returns them."""
    outputs.add(
        attentions=weights,
        cross_attentions=cross_weights,
        router_loss=router_loss,
        router_logits=outputs.rows.pad(routing.logits),
        experts_per_token=outputs.rows.mean((routing.weights.detach() > 0).sum(dim=-1).float()),
    )
