"""Liquid: encoder-decoder with frequency attention, deformable convolutions, mixture of experts and LSTM memory.

    encoder: EnhancedLiquidEmbedding → blocks → LayerNorm                       (Liquid paper, §3.9)
    decoder: CausalLiquidEmbedding → (block → EnhancedLSTM) × n → LayerNorm     (Liquid paper, §3.10)

The decoder blocks share one EnhancedLSTM. Blocks are in `block.py`, embeddings in `embedding.py`. Inside the models
rows are left-aligned (`row_layout.py`). The decoder's cache consists of one `cache.FlowCacheLayer` per block.

Shape letters: B batch, M decoder tokens of this call, N decoder tokens so far, S source tokens, H heads, m experts.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from ..modules.cache import CACHE_NAME, FlowCacheLayer, resolve_cache_argument, state_layers
from ..modules.classification import ClassifierOutput
from ..modules.forward_utils import FlowGenerationMixin, embed_inputs, finish_forward, prepare_forward
from ..modules.outputs import OutputCollector
from ..modules.packing import refuse_packing
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout, column_mask, make_row_layout
from ..modules.windowed_attention import RotaryEmbedding
from .block import ImprovedTransformerBlock
from .configuration_liquid import LiquidConfig
from .embedding import CausalLiquidEmbedding, EnhancedLiquidEmbedding
from .lstm_memory import EnhancedLSTM
from .mixture_of_experts import Experts
from .outputs import (
    LiquidDecoderOutput,
    LiquidEncoderOutput,
    LiquidModelOutput,
    LiquidSeq2SeqLMOutput,
    collect_block_outputs,
)

ENCODER_PARTS = ["ImprovedTransformerBlock", "EnhancedLiquidEmbedding"]


class LiquidPreTrainedModel(PreTrainedModel):
    """Base class of the Liquid models: initialisation and loading."""

    config: LiquidConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [*ENCODER_PARTS, "CausalLiquidEmbedding"]
    _skip_keys_device_placement = ["past_key_values", "cache", "cross_state"]
    _keep_in_fp32_modules = ["moe.gate"]
    _supports_sdpa = True
    _supports_context_parallel = False
    _is_stateful = True  # the LSTM state cannot be cropped

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Declare it here: transformers derives it from the source file, which differs in a saved folder."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise projections by Xavier, convolutions by Kaiming, embeddings normally."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, Experts):
            for weight in (module.up_proj, module.down_proj):
                for expert in weight:
                    init.xavier_uniform_(expert)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)
        else:
            super()._init_weights(module)


class BidirectionalEncoder(LiquidPreTrainedModel):
    """Encoder of Liquid: embedding, two-sided blocks and final norm (Liquid paper, §3.9)."""

    main_input_name = "input_ids"
    _no_split_modules = ENCODER_PARTS

    def __init__(self, config: LiquidConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embedding = EnhancedLiquidEmbedding(config)
        self.rotary = RotaryEmbedding(config)
        self.layers = nn.ModuleList(
            [
                ImprovedTransformerBlock(config, False, f"encoder block {number}")
                for number in range(config.num_hidden_layers)
            ]
        )
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> LiquidEncoderOutput:
        """Encode a batch of rows.

        Args:
            input_ids: int64 `[B, S]`; exactly one of `input_ids` and `inputs_embeds` is required.
            attention_mask: `[B, S]`; 0 marks padding, at any position.
            inputs_embeds: `[B, S, hidden_size]`.
            output_attentions: whether to return the attention weights, O(S²) memory.
            output_hidden_states: whether to return the states of every block.

        Raises:
            ValueError: the inputs contradict each other; the message names them and the remedy.
        """
        config = self.config
        refuse_packing(self, attention_mask, **kwargs)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        inputs_embeds = embed_inputs(self, input_ids, inputs_embeds)
        batch, length, _ = inputs_embeds.shape
        mask = column_mask(attention_mask, batch, length, 0)
        rows = make_row_layout(batch, length, inputs_embeds.device, mask=mask)
        hidden_states, compression = self.embedding(rows.unpad(inputs_embeds), rows)
        hidden_states = self.dropout(hidden_states)
        rotary = self.rotary(hidden_states, rows.positions)
        collected = OutputCollector(
            rows,
            hidden_states=output_hidden_states,
            attentions=output_attentions,
            router_logits=True,
            router_loss=True,
            experts_per_token=True,
        )
        for layer in self.layers:
            hidden_states = collected.add_hidden_states(hidden_states)
            hidden_states, *outputs = layer(hidden_states, rotary, rows, output_attentions=output_attentions)
            collect_block_outputs(collected, *outputs)
        hidden_states = rows.pad(self.norm(hidden_states))
        collected.add(hidden_states=hidden_states)
        return LiquidEncoderOutput(
            last_hidden_state=hidden_states,
            hidden_states=collected.get("hidden_states"),
            attentions=collected.get("attentions"),
            router_logits=collected.get("router_logits"),
            reconstruction_loss=compression.reconstruction_loss,
            router_loss=sum(collected.get("router_loss")),
            metrics={
                "compression_ratio": compression.ratio,
                "experts_per_token": torch.stack(collected.get("experts_per_token")).mean(),
            },
        )


class LiquidDecoder(LiquidPreTrainedModel):
    """Decoder of Liquid: causal embedding, causal blocks, each followed by the LSTM, and final norm (Liquid paper,
    §3.10).
    """

    def __init__(self, config: LiquidConfig):
        super().__init__(config)
        self.embedding = CausalLiquidEmbedding(config)
        self.rotary = RotaryEmbedding(config)
        self.layers = nn.ModuleList(
            [
                ImprovedTransformerBlock(config, True, f"decoder block {number}")
                for number in range(config.num_decoder_layers)
            ]
        )
        self.external_memory = None
        if config.lstm_hidden_size:
            self.external_memory = EnhancedLSTM(
                config.hidden_size, config.lstm_hidden_size, config.num_lstm_layers, config.hidden_dropout
            )
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        rows: RowLayout,
        inputs_embeds: torch.Tensor,
        source: torch.Tensor,
        source_mask: torch.Tensor | None,
        states: list[FlowCacheLayer | None],
        cross_states: list[FlowCacheLayer | None],
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LiquidDecoderOutput:
        """Decode embedded tokens.

        Args:
            rows: `row_layout.RowLayout` of this call.
            inputs_embeds: `[B, M, hidden_size]`, in columns.
            source: encoder states `[B, S, hidden_size]`.
            source_mask: bool `[B, S]`, as for `CrossAttention`.
            states: cache layer of each block's own state, or None.
            cross_states: cache layer of each block's cross-attention, or None.
            output_attentions: whether to return self-attention and cross-attention weights.
            output_hidden_states: whether to return the states of every block.
        """
        hidden_states, compression = self.embedding(rows.unpad(inputs_embeds), rows, states[0])
        hidden_states = self.dropout(hidden_states)
        rotary = self.rotary(hidden_states, rows.positions)
        source_rotary = None
        if cross_states[0] is None or cross_states[0].data("source_key") is None:
            source_rotary = self.rotary(source, position_ids_from_mask(source_mask, source))
        collected = OutputCollector(
            rows,
            hidden_states=output_hidden_states,
            attentions=output_attentions,
            cross_attentions=output_attentions,
            router_logits=True,
            router_loss=True,
            experts_per_token=True,
        )
        for layer, state, cross_state in zip(self.layers, states, cross_states, strict=True):
            hidden_states = collected.add_hidden_states(hidden_states)
            hidden_states, *outputs = layer(
                hidden_states,
                rotary,
                rows,
                source,
                source_rotary,
                source_mask,
                past_key_values=state,
                cross_state=cross_state,
                output_attentions=output_attentions,
            )
            collect_block_outputs(collected, *outputs)
            if self.external_memory is not None:
                hidden_states = self.external_memory(hidden_states, rows, state)
        hidden_states = rows.pad(self.norm(hidden_states))
        collected.add(hidden_states=hidden_states)
        return LiquidDecoderOutput(
            last_hidden_state=hidden_states,
            hidden_states=collected.get("hidden_states"),
            attentions=collected.get("attentions"),
            cross_attentions=collected.get("cross_attentions"),
            router_logits=collected.get("router_logits"),
            reconstruction_loss=compression.reconstruction_loss,
            router_loss=sum(collected.get("router_loss")),
            metrics={
                "compression_ratio": compression.ratio,
                "experts_per_token": torch.stack(collected.get("experts_per_token")).mean(),
            },
        )


def position_ids_from_mask(mask: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    """Return the position of each real column among those of its row, int64 `[B or 1, S]`."""
    if mask is None:
        return torch.arange(states.shape[1], device=states.device)[None]
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


class EncoderEmbeddingMixin:
    """Mixin for models whose `encoder` owns the token embedding."""

    encoder: Any

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value


class LiquidModel(EncoderEmbeddingMixin, LiquidPreTrainedModel):
    """Liquid encoder-decoder without a head; the decoder uses the encoder's token embedding.

    Example:
        >>> import torch
        >>> from dfn_hf import LiquidConfig, LiquidModel
        >>> model = LiquidModel(LiquidConfig(vocab_size=100, hidden_size=64, num_hidden_layers=1))
        >>> source, target = torch.randint(100, (2, 12)), torch.randint(100, (2, 5))
        >>> model(input_ids=source, decoder_input_ids=target).last_hidden_state.shape
        torch.Size([2, 5, 64])
    """

    def __init__(self, config: LiquidConfig):
        super().__init__(config)
        self.encoder = BidirectionalEncoder(config)
        self.decoder = LiquidDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> LiquidModelOutput:
        """Encode the source and decode the target.

        Args:
            input_ids: source, int64 `[B, S]`; exactly one of `input_ids`, `inputs_embeds` and `encoder_outputs` is
                required.
            attention_mask: mask of the source, `[B, S]`; 0 marks padding, at any position.
            decoder_input_ids: target, int64 `[B, M]`. Without decoder inputs the decoder reads the source, which gives
                features of a single text.
            decoder_attention_mask: `[B, M]`, or `[B, columns before + M]` with a cache.
            encoder_outputs: outputs of the encoder for the source.
            past_key_values: `EncoderDecoderCache` of two `DynamicCache(config=model.config)`; updated in place.
            inputs_embeds: source, `[B, S, hidden_size]`.
            decoder_inputs_embeds: target, `[B, M, hidden_size]`.
            use_cache: whether to return the decoder's cache; defaults to `config.use_cache`.
            output_attentions, output_hidden_states: whether to return attention weights and states of every block.
            output_router_logits: whether to return router logits, auxiliary losses and metrics; defaults to
                `config.output_router_logits`.
            cache: name of `past_key_values` from transformers 5.24 on.

        Raises:
            ValueError: the inputs contradict each other; the message names them and the remedy.
        """
        config = self.config
        refuse_packing(self, attention_mask, **kwargs)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        past_key_values = resolve_cache_argument(past_key_values, cache)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids, decoder_inputs_embeds = input_ids, inputs_embeds
            decoder_attention_mask = attention_mask if decoder_attention_mask is None else decoder_attention_mask
        if encoder_outputs is None:
            encoded: LiquidEncoderOutput = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
            )
        elif isinstance(encoder_outputs, LiquidEncoderOutput):
            encoded = encoder_outputs
        else:
            encoded = LiquidEncoderOutput(last_hidden_state=encoder_outputs[0])
        source = encoded.last_hidden_state
        source_mask = source_key_mask(attention_mask, source)
        decoder_embeds = embed_inputs(self.encoder, decoder_input_ids, decoder_inputs_embeds, prefix="decoder_")
        if decoder_embeds.shape[0] != source.shape[0]:
            raise ValueError(
                f"Source and target must have the same number of rows, got {source.shape[0]} and "
                f"{decoder_embeds.shape[0]}."
            )
        rows, states, cross_states, past_key_values = self._prepare_decoder(
            decoder_embeds, decoder_attention_mask, source, past_key_values, use_cache
        )
        decoded = self.decoder(
            rows,
            decoder_embeds,
            source,
            source_mask,
            states,
            cross_states,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        if past_key_values is not None:
            finish_forward(past_key_values.self_attention_cache, states)
            if past_key_values.cross_attention_cache.offloading:
                for state in cross_states:
                    state.offload()
        cache_output: dict[str, Any] = {CACHE_NAME: past_key_values}
        return LiquidModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            **cache_output,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=source,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            **(merge_routing(encoded, decoded) if output_router_logits else {}),
        )

    def _prepare_decoder(
        self,
        decoder_embeds: torch.Tensor,
        decoder_attention_mask: torch.Tensor | None,
        source: torch.Tensor,
        past_key_values: Cache | None,
        use_cache: bool | None,
    ) -> tuple[RowLayout, list[FlowCacheLayer | None], list[FlowCacheLayer | None], EncoderDecoderCache | None]:
        """Prepare the rows and both caches of the decoder.

        Args:
            decoder_embeds: `[B, M, hidden_size]`.
            decoder_attention_mask, past_key_values, use_cache: as for `forward`.
            source: encoder states `[B, S, hidden_size]`.

        Returns:
            (rows; cache layers of the blocks' own states; cache layers of the cross-attentions; cache). The cache
            layers and the cache are None if no cache is kept.
        """
        config = self.config
        own_cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        rows, states, own_cache = prepare_forward(
            self.decoder, decoder_embeds, decoder_attention_mask, None, own_cache, use_cache, prefix="decoder_"
        )
        if own_cache is None:
            return rows, states, [None] * config.num_decoder_layers, None
        if not isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = EncoderDecoderCache(own_cache, DynamicCache(config=config))
        cross_states = state_layers(past_key_values.cross_attention_cache, config.num_decoder_layers)
        for state in cross_states:
            state.start_forward(source.shape[0], source.shape[1], source.device)
        return rows, states, cross_states, past_key_values


def source_key_mask(attention_mask: torch.Tensor | None, source: torch.Tensor) -> torch.Tensor | None:
    """Return the mask of the source for the cross-attention, bool `[B, S]`, with at least one True per row, or None.

    Rows without tokens attend to their states, which are zero: softmax needs at least one key.
    """
    mask = column_mask(attention_mask, source.shape[0], source.shape[1], 0)
    return None if mask is None else mask | ~mask.any(dim=1, keepdim=True)


def merge_routing(encoded: LiquidEncoderOutput, decoded: LiquidDecoderOutput) -> dict[str, Any]:
    """Combine router logits, auxiliary losses and metrics of encoder and decoder as fields of `LiquidModelOutput`."""
    decoder_metrics = {f"decoder_{name}": value for name, value in decoded.metrics.items()}
    return {
        "encoder_router_logits": encoded.router_logits,
        "decoder_router_logits": decoded.router_logits,
        "reconstruction_loss": sum_losses(encoded.reconstruction_loss, decoded.reconstruction_loss),
        "router_loss": sum_losses(encoded.router_loss, decoded.router_loss),
        "metrics": (encoded.metrics or {}) | decoder_metrics,
    }


def sum_losses(encoder_loss: torch.Tensor | None, decoder_loss: torch.Tensor) -> torch.Tensor:
    """Add the losses; `encoder_loss` is None if the user passed encoder outputs without it."""
    return decoder_loss if encoder_loss is None else encoder_loss + decoder_loss


class LiquidForSeq2SeqLM(FlowGenerationMixin, LiquidPreTrainedModel, GenerationMixin):
    """Liquid with a next-token head on the decoder.

    Example:
        >>> import torch
        >>> from dfn_hf import LiquidConfig, LiquidForSeq2SeqLM
        >>> model = LiquidForSeq2SeqLM(LiquidConfig(vocab_size=100, hidden_size=64, num_hidden_layers=1))
        >>> source, target = torch.randint(100, (2, 12)), torch.randint(100, (2, 5))
        >>> model(input_ids=source, labels=target).logits.shape
        torch.Size([2, 5, 100])
    """

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: LiquidConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # labels are shifted already
        self.model = LiquidModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Shift labels `[B, M]` right by one, behind the start token; −100 becomes padding.

        Raises:
            ValueError: `decoder_start_token_id` or `pad_token_id` is not set.
        """
        config = self.config
        if config.decoder_start_token_id is None or config.pad_token_id is None:
            raise ValueError(
                "`labels` without decoder inputs require `decoder_start_token_id` and `pad_token_id`: set both in the "
                "configuration, or pass `decoder_input_ids`."
            )
        shifted = labels.new_full(labels.shape, config.decoder_start_token_id)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == -100, config.pad_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> LiquidSeq2SeqLMOutput:
        """Compute logits of the target and, with labels, the loss.

        The arguments that are not listed are those of `LiquidModel.forward`.

        Args:
            labels: target, int64 `[B, M]`; −100 is ignored. Without decoder inputs the decoder reads the labels
                shifted right. Without `decoder_attention_mask`, columns behind the last scored label of a row are
                padding.
            logits_to_keep: number of last columns whose logits are computed, or the indices of these columns; 0 means
                all.
            num_items_in_batch: number of labels that the loss averages over, if gradients are accumulated over several
                calls.

        Raises:
            ValueError: neither a target nor labels are given, or the inputs contradict each other.
        """
        config = self.config
        refuse_packing(self, attention_mask, **kwargs)
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        if labels is None and decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("The target is missing: pass `decoder_input_ids`, `decoder_inputs_embeds` or `labels`.")
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if past_key_values is None and cache is None:
            trains = self.training and torch.is_grad_enabled() and use_cache is None
            if labels is not None or trains:
                use_cache = False  # the auxiliary losses are defined on whole rows
            if labels is not None and decoder_attention_mask is None:
                decoder_attention_mask = mask_up_to_last_label(labels)
        outputs: LiquidModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=resolve_cache_argument(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits or labels is not None or self.training,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        losses: dict[str, Any] = {}
        if labels is not None:
            losses = self._losses(logits, labels, outputs, num_items_in_batch, **kwargs)
        elif outputs.router_loss is not None:
            losses = self._auxiliary_losses(outputs, 1, len(logits))
        routing = ("encoder_router_logits", "decoder_router_logits", "metrics") if output_router_logits else ()
        return LiquidSeq2SeqLMOutput(
            logits=logits,
            **losses,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            **{name: getattr(outputs, name) for name in routing},
        )

    def _losses(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        outputs: LiquidModelOutput,
        num_items_in_batch: torch.Tensor | int | None,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """Compute the token loss and the means of the rows' auxiliary losses, weighted by their numbers of labels."""
        token_loss = self.loss_function(
            logits=logits,
            labels=None,
            shift_labels=labels.contiguous(),
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )
        scored = (labels != -100).sum(dim=1)
        total = scored.sum() if num_items_in_batch is None else num_items_in_batch
        losses = self._auxiliary_losses(outputs, scored, total)
        return {"loss": token_loss + losses["aux_loss"], "token_loss": token_loss, **losses}

    def _auxiliary_losses(
        self, outputs: LiquidModelOutput, row_weights: torch.Tensor | int, total: torch.Tensor | int
    ) -> dict[str, torch.Tensor]:
        """Return the weighted means of the rows' auxiliary losses, and `aux_loss`, to be added to the token loss."""
        reconstruction_loss, router_loss = (
            (row_weights * row_losses).sum() / total
            for row_losses in (outputs.reconstruction_loss, outputs.router_loss)
        )
        return {
            "aux_loss": self.config.reconstruction_loss_coef * reconstruction_loss + router_loss,
            "reconstruction_loss": reconstruction_loss,
            "router_loss": router_loss,
        }


def mask_up_to_last_label(labels: torch.Tensor) -> torch.Tensor:
    """Return the mask `[B, M]` of the columns up to the last scored label of each row."""
    columns = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    last = torch.where(labels == -100, 0, columns).amax(dim=1, keepdim=True)
    return (columns <= last).long()


class LiquidForSequenceClassification(EncoderEmbeddingMixin, LiquidPreTrainedModel):
    """Liquid encoder with a linear classification head on the mean of its real tokens' states.

    From the checkpoint of an encoder-decoder it loads the encoder.
    """

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]
    _no_split_modules = ENCODER_PARTS

    def __init__(self, config: LiquidConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = BidirectionalEncoder(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ClassifierOutput:
        """Classify rows; the arguments that are not listed are those of `BidirectionalEncoder.forward`.

        Args:
            labels: `[B]` classes or values, or `[B, num_labels]` for multi-label classification.

        Returns:
            `logits` `[B, num_labels]`; with labels or in training mode `aux_loss`, which is `reconstruction_loss_coef`
            times the reconstruction loss plus the router loss, means over rows; with labels `loss`, the head's loss
            plus `aux_loss`.
        """
        outputs: LiquidEncoderOutput = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        states = outputs.last_hidden_state  # zero at padding
        counts = states.shape[1] if attention_mask is None else attention_mask.bool().sum(dim=1, keepdim=True)
        logits = self.score(states.sum(dim=1) / torch.as_tensor(counts, device=states.device).clamp(min=1))
        loss, aux_loss = None, None
        if labels is not None or self.training:
            aux_loss = self.config.reconstruction_loss_coef * outputs.reconstruction_loss + outputs.router_loss
            aux_loss = aux_loss.mean()
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            loss = loss + aux_loss
        return ClassifierOutput(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "BidirectionalEncoder",
    "LiquidForSeq2SeqLM",
    "LiquidForSequenceClassification",
    "LiquidModel",
    "LiquidPreTrainedModel",
]
