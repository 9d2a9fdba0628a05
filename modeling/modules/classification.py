"""Sequence classification from the hidden state of each row's last real token, shared by the families."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from .cache import CACHE_NAME, resolve_cache_argument
from .packing import refuse_packing


@dataclass
class ClassifierOutput(SequenceClassifierOutputWithPast):
    """
    Attributes:
        aux_loss: scalar, contained in `loss`. Add it to a loss that you compute from the logits. None in evaluation
            mode without labels, and if the model has no auxiliary losses.
        The other attributes are those of transformers' `SequenceClassifierOutputWithPast`.
    """

    aux_loss: torch.Tensor | None = None


class LastTokenClassificationMixin:
    """Forward pass of a `PreTrainedModel` with a base model `model` and a linear head `score`."""

    config: Any
    model: nn.Module
    score: nn.Module
    loss_function: Any
    training: bool

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> ClassifierOutput:
        """
        Args:
            attention_mask: `[B, M]`; determines the last token. Without it, the last token that is not `pad_token_id`.
            labels: classes or regression targets `[B]`, or multi-label targets `[B, num_labels]`.

        Returns:
            `logits` `[B, num_labels]`, `loss` with labels, and `aux_loss`, see `ClassifierOutput`.

        The other arguments are those of the base model.
        """
        refuse_packing(self, attention_mask, position_ids, **kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=resolve_cache_argument(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        last = last_states(outputs.last_hidden_state, input_ids, attention_mask, self.config.pad_token_id)
        logits = self.score(last)
        loss, aux_loss = None, None
        if labels is not None or self.training:
            aux_loss = self._auxiliary_loss(outputs)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            loss = loss if aux_loss is None else loss + aux_loss
        return ClassifierOutput(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _auxiliary_loss(self, outputs) -> torch.Tensor | None:
        """Return the auxiliary loss to add to the loss of the head; None if the model has none."""
        return None


def last_states(
    states: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pad_token_id: int | None,
) -> torch.Tensor:
    """Return the hidden state of each row's last real token, `[B, hidden_size]`.

    Args:
        states: `[B, M, hidden_size]`.
        input_ids: int64 `[B, M]`, or None.
        attention_mask: `[B, M]`; without it, every token that is not `pad_token_id` is real.
        pad_token_id: of the configuration.

    Raises:
        ValueError: there are several rows and neither a mask nor a `pad_token_id`.
    """
    batch, length, _ = states.shape
    if attention_mask is not None:
        real = attention_mask[:, -length:].bool()
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids != pad_token_id
    elif batch == 1 or input_ids is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=states.device)
    else:
        raise ValueError("A batch of several rows needs attention_mask: pass it, or set `pad_token_id` in the config.")
    last = (real * torch.arange(length, device=states.device)).argmax(dim=1)
    return states[torch.arange(batch, device=states.device), last]
