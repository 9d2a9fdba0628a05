"""Input checks, row layout and cache handling around a flow model's layers."""

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging

from ..ops.higher_order import holds_values
from .cache import FlowCacheLayer, state_layers
from .row_layout import RowLayout, column_mask, make_row_layout
from .static_cache import check_static_support

logger = logging.get_logger(__name__)


def embed_inputs(
    model, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, prefix: str = ""
) -> torch.Tensor:
    """Return the input embeddings `[B, M, hidden_size]`.

    Args:
        model: has `config` and `embed_tokens`.
        input_ids: int64 `[B, M]`, or None.
        inputs_embeds: `[B, M, hidden_size]`, or None.
        prefix: of the argument names in error messages.

    Raises:
        ValueError: not exactly one of the two is given, a shape is wrong, the input is empty, or an id is outside the
            vocabulary.
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
    """Raise a ValueError if `input_ids` is not `[B, M]` or, on a CPU, an id is outside the vocabulary.

    The ids are not checked on other devices, because that would synchronise them, and where they have no values.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"{name} must be [batch, length], got {list(input_ids.shape)}.")
    if not holds_values(input_ids) or input_ids.device.type != "cpu" or not input_ids.numel():
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
    segment_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
    prefix: str = "",
) -> tuple[RowLayout, list[FlowCacheLayer | None], Cache | None]:
    """Compute the row layout of a call and prepare the cache. Call `finish_forward` after the last layer.

    Args:
        model: has `config`, `gradient_checkpointing` and `training`.
        inputs_embeds: `[B, M, hidden_size]`.
        attention_mask: `[B, M]` or `[B, past + M]`, or None.
        segment_ids: int `[B, M]`, of packed documents, or None.
        past_key_values: the cache, or None.
        use_cache: whether to create a cache; None for `config.use_cache`.
        prefix: of the mask's name in error messages.

    Returns:
        (row layout, cache layer of each layer or None, the cache or None).

    Raises:
        ValueError: the arguments are inconsistent.
    """
    batch, length, _ = inputs_embeds.shape
    use_cache = model.config.use_cache if use_cache is None else use_cache
    packed = segment_ids is not None
    if model.gradient_checkpointing and model.training and (use_cache or past_key_values is not None):
        logger.warning_once("Gradient checkpointing does not support a cache: `use_cache` is set to False.")
        use_cache, past_key_values = False, None
    if packed and past_key_values is not None:
        raise ValueError(
            "segment_ids, cu_seq_lens_q and seq_idx cannot be combined with past_key_values: pass a document per row."
        )
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
    """End the call on every layer: count its entities, and offload the layer if the cache is offloaded."""
    if cache is None:
        return
    for state in states:
        state.finish_forward()
        if cache.offloading:
            state.offload()


class FlowGenerationMixin:
    """Generation for models whose state not every cache supports."""

    def _prepare_cache_for_generation(self, generation_config, *args, **kwargs):
        supported = ("dynamic", "offloaded", "static") if self._can_compile_fullgraph else ("dynamic", "offloaded")
        if generation_config.cache_implementation not in (None, *supported):
            names = ", ".join(f'"{name}"' for name in supported)
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot hold this model's state: "
                f"omit it or use one of {names}."
            )
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(inputs_embeds, attention_mask, **kwargs):
        """Return the mask of the call's own columns, which has the same shape at every step of a static cache."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]
