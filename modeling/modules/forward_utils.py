"""What every flow model does with its inputs before the first layer, and with its state after the last."""

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging

from .cache import FlowCacheLayer, state_layers
from .row_layout import RowLayout, column_mask, make_row_layout, packed_segments
from .static_cache import check_static_support

logger = logging.get_logger(__name__)


def embed_inputs(
    model, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, prefix: str = ""
) -> torch.Tensor:
    """Embeddings `[B, M, hidden_size]` of what the user passed.

    Args:
        prefix: of the arguments' names in messages.

    Raises:
        ValueError: not exactly one of the two, a wrong shape, an empty input, or ids outside the vocabulary.
    """
    config = model.config
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"Pass exactly one of {prefix}input_ids and {prefix}inputs_embeds.")
    if inputs_embeds is None:
        check_ids(input_ids, config.vocab_size, f"{prefix}input_ids")
        inputs_embeds = model.embed_tokens(input_ids)
    elif inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != config.hidden_size:
        raise ValueError(
            f"{prefix}inputs_embeds must be [batch, length, hidden_size] with a hidden_size of "
            f"{config.hidden_size}, got {list(inputs_embeds.shape)}."
        )
    batch, length, _ = inputs_embeds.shape
    if length == 0 or batch == 0:
        raise ValueError(f"The input is empty: batch {batch}, length {length}. Pass at least one token.")
    return inputs_embeds


def check_ids(input_ids: torch.Tensor, vocab_size: int, name: str) -> None:
    """Token ids must lie in the vocabulary; checked where that costs no synchronisation."""
    if input_ids.dim() != 2:
        raise ValueError(f"{name} must be [batch, length], got {list(input_ids.shape)}.")
    if torch.compiler.is_compiling() or input_ids.device.type != "cpu" or not input_ids.numel():
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} holds {low if low < 0 else high}, outside the vocabulary of {vocab_size} (`vocab_size`): "
            "use the tokenizer of this model."
        )


def prepare_forward(
    model,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
    prefix: str = "",
) -> tuple[RowLayout, list[FlowCacheLayer | None], Cache | None]:
    """Lay the rows of a call and get its state ready.

    Args:
        prefix: of the mask's name in messages.

    Returns:
        (rows, the state of each layer or None, the cache or None). `finish_forward` closes what this opens.

    Raises:
        ValueError: inputs that do not fit together.
    """
    batch, length, _ = inputs_embeds.shape
    use_cache = model.config.use_cache if use_cache is None else use_cache
    packed = segment_ids is not None
    if not packed and past_key_values is None and attention_mask is None:
        segment_ids = packed_segments(position_ids, batch, length)
        packed = segment_ids is not None
    if model.gradient_checkpointing and model.training and (use_cache or past_key_values is not None):
        logger.warning_once("A cache cannot be kept while gradients are checkpointed: going on without.")
        use_cache, past_key_values = False, None
    if packed and past_key_values is not None:
        raise ValueError("segment_ids cannot be combined with past_key_values: continue one document per row.")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids must be [batch, length] = {[batch, length]}, got {list(segment_ids.shape)}.")
    if use_cache and past_key_values is None and not packed:
        past_key_values = DynamicCache(config=model.config)
    num_layers = len(model.config.layer_types)
    if past_key_values is None:
        mask = column_mask(attention_mask, batch, length, 0, f"{prefix}attention_mask")
        rows = make_row_layout(batch, length, inputs_embeds.device, mask=mask, segment_ids=segment_ids)
        return rows, [None] * num_layers, None
    states = state_layers(past_key_values, num_layers)
    check_static_support(model, past_key_values)
    first, device = states[0], inputs_embeds.device
    mask = column_mask(attention_mask, batch, length, first.static_seq_length(), f"{prefix}attention_mask")
    for state in states:
        state.start_forward(batch, length, device)
    look = not first.is_compileable
    rows = make_row_layout(batch, length, device, mask=mask, past=first.lengths, aligned_past=first.aligned, look=look)
    for state in states:
        state.set_layout(rows)
    return rows, states, past_key_values


def finish_forward(cache: Cache | None, states: list[FlowCacheLayer | None]) -> None:
    """Count the entities of the call."""
    if cache is None:
        return
    for state in states:
        state.finish_forward()
        if cache.offloading:
            state.offload()


def next_token_labels(labels: torch.Tensor, segment_ids: torch.Tensor | None) -> torch.Tensor:
    """Labels without the first token of each packed segment: nothing before it tells of it."""
    if segment_ids is None:
        return labels
    new_segment = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0)) | (segment_ids < 0)
    return labels.masked_fill(new_segment, -100)


class FlowGenerationMixin:
    """For models that generate: a cache that cannot hold their state is refused in a sentence."""

    def _prepare_cache_for_generation(self, generation_config, *args, **kwargs):
        fitting = ("dynamic", "offloaded", "static") if self._can_compile_fullgraph else ("dynamic", "offloaded")
        if generation_config.cache_implementation not in (None, *fitting):
            named = ", ".join(f'"{name}"' for name in fitting)
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot hold this model's state: "
                f"leave it out, or use one of {named}."
            )
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(inputs_embeds, attention_mask, **kwargs):
        """For caches of fixed shape: the mask of the call's own columns has the same shape at every step."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]
