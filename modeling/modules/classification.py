"""Classification of rows by the state of their last real token, the same for every family."""

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from .cache import CACHE_NAME, resolve_cache_argument


class LastTokenClassificationMixin:
    """The forward pass of a head `score` on the last state that `model` gives; a mixin of a `PreTrainedModel`."""

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
    ) -> SequenceClassifierOutputWithPast:
        """
        Args:
            attention_mask: says which token is the last; without it, the last that is not `pad_token_id` is.
            labels: `[B]` classes or values, `[B, num_labels]` for several at once.

        Returns:
            `logits` `[B, num_labels]` and, with labels, `loss`.

        The other arguments are those of the model without a head.
        """
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
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, outputs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, outputs) -> torch.Tensor:
        return self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)


def last_states(
    states: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pad_token_id: int | None,
) -> torch.Tensor:
    """State of the last real entity of each row, `[B, M, hidden_size]` → `[B, hidden_size]`.

    Args:
        attention_mask: says which are real; without it, every token that is not `pad_token_id` is.

    Raises:
        ValueError: several rows, and nothing tells which entities are real.
    """
    batch, length, _ = states.shape
    if attention_mask is not None:
        real = attention_mask[:, -length:].bool()
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids != pad_token_id
    elif batch == 1 or input_ids is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=states.device)
    else:
        raise ValueError("A batch of several rows needs attention_mask, or `pad_token_id` in the config.")
    last = (real * torch.arange(length, device=states.device)).argmax(dim=1)
    return states[torch.arange(batch, device=states.device), last]
