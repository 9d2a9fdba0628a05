"""What the parts of a Liquid give.

Shape letters: B batch, M tokens of the decoder in this call, N so far, S of the source, H heads, m experts.
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
        last_hidden_state: `[B, S, hidden_size]`, zero where padded.
        hidden_states: the embedding and each block's output, the last one after the final norm.
        attentions: per block `[B, H, S, S]`.
        router_logits: per block `[B, S, m]`.
        reconstruction_loss, router_loss: `[B]`, of each row.
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
        last_hidden_state: `[B, M, hidden_size]`, of the decoder, zero where padded.
        past_key_values: `EncoderDecoderCache` for continuation; named `cache` by transformers 5.24 and later.
        decoder_hidden_states, decoder_attentions (`[B, H, M, N]`), cross_attentions (`[B, H, M, S]`),
        encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: as for other encoder-decoder models.
        encoder_router_logits, decoder_router_logits: per block `[B, tokens, m]`; with `output_router_logits`.
        reconstruction_loss, router_loss: `[B]`, of each row, encoder and decoder together; with `output_router_logits`.
        metrics: scalar tensors, of the encoder and, named `decoder_…`, of the decoder; with `output_router_logits`.
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
        loss: scalar, token loss + `reconstruction_loss_coef` · `reconstruction_loss` + `router_loss`; with labels.
        logits: `[B, M, vocab_size]`.
        token_loss, reconstruction_loss, router_loss: scalars, the parts of the loss; with labels.
        The others are those of `LiquidModelOutput`.
    """

    token_loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None
    encoder_router_logits: tuple[torch.Tensor, ...] | None = None
    decoder_router_logits: tuple[torch.Tensor, ...] | None = None
    metrics: dict[str, torch.Tensor] | None = None


@dataclass
class LiquidDecoderOutput(BaseModelOutput):
    """The decoder's half of `LiquidModelOutput`."""

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
