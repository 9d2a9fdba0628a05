"""Liquid: an encoder-decoder of frequency attention, windows, deformable convolutions, experts and LSTM memory.

    encoder: EnhancedLiquidEmbedding → blocks → LayerNorm                          (§3.9)
    decoder: CausalLiquidEmbedding → (block → EnhancedLSTM, one for all) → LayerNorm  (§3.10)

A block is in `liquid_block.py`, an embedding in `liquid_embedding.py`. Rows are left-aligned behind the
model's boundary (`padding.py`); the decoder's state lives in `cache.FlowCacheLayer`.

Shape letters: B batch, M tokens of the decoder in this call, N so far, S of the source, H heads, m experts.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from ..modules.cache import CACHE_NAME, FlowCacheLayer, resolve_cache_argument, state_layers
from ..modules.forward_utils import FlowGenerationMixin, embed_inputs, finish_forward, prepare_forward
from ..modules.outputs import OutputCollector
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
    config: LiquidConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [*ENCODER_PARTS, "CausalLiquidEmbedding"]
    _skip_keys_device_placement = ["past_key_values", "cache", "cross_state"]
    _keep_in_fp32_modules = ["moe.gate"]
    _supports_sdpa = True
    _supports_context_parallel = False
    _is_stateful = True  # an LSTM's state cannot be taken back

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Stated here: transformers guesses it from the source file, which differs in a saved folder."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier for projections, Kaiming for convolutions."""
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
    """Embedding, blocks that see both sides, and the final norm (§3.9)."""

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
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> LiquidEncoderOutput:
        """
        Args:
            input_ids: int64 `[B, S]`, or `inputs_embeds` `[B, S, hidden_size]`: exactly one of them.
            attention_mask: `[B, S]`; 0 is padding, anywhere in a row.
            output_attentions: return the weights of the attention, O(S²) memory.
            output_hidden_states: return the states of every block.

        Raises:
            ValueError: inputs that do not fit together; the message names them and the remedy.
        """
        config = self.config
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
    """Causal blocks over embedded tokens, behind each the LSTM memory, and the final norm (§3.10)."""

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
        """
        Args:
            rows: of this call; inputs_embeds: `[B, M, hidden_size]`, in columns.
            source, source_mask: as for `CrossAttention`.
            states, cross_states: of each block, or None.
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
    """Place of each real column among those of its row, int64 `[B or 1, S]`."""
    if mask is None:
        return torch.arange(states.shape[1], device=states.device)[None]
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


class EncoderEmbeddingMixin:
    """For models whose `encoder` holds the embedding of all their tokens."""

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value


class LiquidModel(EncoderEmbeddingMixin, LiquidPreTrainedModel):
    """Encoder and decoder over the encoder's token embedding."""

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
        decoder_input_ids: torch.LongTensor | None = None,
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
        """
        Args:
            input_ids: int64 `[B, S]`, or `inputs_embeds` `[B, S, hidden_size]`, the source; or `encoder_outputs`.
            attention_mask: `[B, S]`, of the source; 0 is padding, anywhere in a row.
            decoder_input_ids: int64 `[B, M]`, or `decoder_inputs_embeds` `[B, M, hidden_size]`; without either the
                decoder reads the source too, as who wants features of one text needs it.
            decoder_attention_mask: `[B, M]`, or `[B, columns before + M]` with a cache.
            encoder_outputs: what the encoder gave for the source.
            past_key_values: `EncoderDecoderCache` of two `DynamicCache(config=model.config)`; updated in place.
            use_cache: return the decoder's state; the config's value by default.
            output_attentions, output_hidden_states: as for other encoder-decoder models.
            output_router_logits: return what routers and compression gave; the config's value by default.
            cache: what transformers 5.24 and later call `past_key_values`.

        Raises:
            ValueError: inputs that do not fit together; the message names them and the remedy.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        past_key_values = resolve_cache_argument(past_key_values, cache)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids, decoder_inputs_embeds = input_ids, inputs_embeds
            decoder_attention_mask = attention_mask if decoder_attention_mask is None else decoder_attention_mask
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
            )
        elif not isinstance(encoder_outputs, LiquidEncoderOutput):
            encoder_outputs = LiquidEncoderOutput(last_hidden_state=encoder_outputs[0])
        source = encoder_outputs.last_hidden_state
        source_mask = column_mask(attention_mask, *source.shape[:2], 0)
        if source_mask is not None:
            # A row without any token reads zeros.
            source_mask = source_mask | ~source_mask.any(dim=1, keepdim=True)

        decoder_embeds = embed_inputs(self.encoder, decoder_input_ids, decoder_inputs_embeds, prefix="decoder_")
        if decoder_embeds.shape[0] != source.shape[0]:
            raise ValueError(
                f"Source and target must have as many rows, got {source.shape[0]} and {decoder_embeds.shape[0]}."
            )
        own_cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        rows, states, own_cache = prepare_forward(
            self.decoder, decoder_embeds, decoder_attention_mask, None, None, own_cache, use_cache, prefix="decoder_"
        )
        cross_states: list[FlowCacheLayer | None] = [None] * config.num_decoder_layers
        if own_cache is None:
            past_key_values = None
        elif not isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = EncoderDecoderCache(own_cache, DynamicCache(config=config))
        if past_key_values is not None:
            cross_states = state_layers(past_key_values.cross_attention_cache, config.num_decoder_layers)
            for state in cross_states:
                state.start_forward(*source.shape[:2], source.device)
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
        finish_forward(own_cache, states)
        if past_key_values is not None and past_key_values.cross_attention_cache.offloading:
            for state in cross_states:
                state.offload()
        routing = {}
        if output_router_logits:
            metrics = dict(encoder_outputs.metrics or {})
            routing = {
                "encoder_router_logits": encoder_outputs.router_logits,
                "decoder_router_logits": decoded.router_logits,
                "reconstruction_loss": added(encoder_outputs.reconstruction_loss, decoded.reconstruction_loss),
                "router_loss": added(encoder_outputs.router_loss, decoded.router_loss),
                "metrics": metrics | {f"decoder_{name}": value for name, value in decoded.metrics.items()},
            }
        return LiquidModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            **{CACHE_NAME: past_key_values},
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=source,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **routing,
        )


def added(of_encoder: torch.Tensor | None, of_decoder: torch.Tensor) -> torch.Tensor:
    """The sum of both; of the decoder alone where the encoder's was not kept."""
    return of_decoder if of_encoder is None else of_encoder + of_decoder


class LiquidForSeq2SeqLM(FlowGenerationMixin, LiquidPreTrainedModel, GenerationMixin):
    """Liquid with a next-token head on the decoder."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: LiquidConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # labels come shifted
        self.model = LiquidModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels `[B, M]` shifted right behind the start token; −100 becomes padding."""
        config = self.config
        if config.decoder_start_token_id is None or config.pad_token_id is None:
            raise ValueError(
                "labels alone need `decoder_start_token_id` and `pad_token_id`: set both in the configuration, or "
                "pass decoder_input_ids."
            )
        shifted = labels.new_full(labels.shape, config.decoder_start_token_id)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == -100, config.pad_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> LiquidSeq2SeqLMOutput:
        """
        Args:
            labels: int64 `[B, M]`, the target; −100 is not scored. Without decoder inputs these are the labels shifted
                right. Without `decoder_attention_mask` what stands behind the last scored label of a row is padding.
            logits_to_keep: compute the last so many logits, or those at these columns; 0 is all.
            num_items_in_batch: labels that the loss is a mean over, where a batch is taken in several steps.

        The others are those of `LiquidModel.forward`.

        Raises:
            ValueError: neither a target nor labels, or inputs that do not fit together.
        """
        config = self.config
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        if labels is None and decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("Pass the target: decoder_input_ids or decoder_inputs_embeds, or labels to train on.")
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if labels is not None and past_key_values is None and cache is None:
            use_cache = False  # the losses are of whole rows
            if decoder_attention_mask is None:
                decoder_attention_mask = trim_unscored(labels)
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
            output_router_logits=output_router_logits or labels is not None,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        losses = {}
        if labels is not None:
            losses = self._losses(logits, labels, outputs, num_items_in_batch, **kwargs)
        routing = {}
        if output_router_logits:
            routing = {
                "encoder_router_logits": outputs.encoder_router_logits,
                "decoder_router_logits": outputs.decoder_router_logits,
                "metrics": outputs.metrics,
            }
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
            **routing,
        )

    def _losses(self, logits, labels, outputs, num_items_in_batch, **kwargs) -> dict[str, torch.Tensor]:
        """Token loss, and the rows' own losses as means over rows weighted by their labels."""
        token_loss = self.loss_function(
            logits=logits,
            labels=None,
            shift_labels=labels,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )
        scored = (labels != -100).sum(dim=1)
        total = scored.sum() if num_items_in_batch is None else num_items_in_batch
        reconstruction_loss, router_loss = (
            (scored * of_rows).sum() / total for of_rows in (outputs.reconstruction_loss, outputs.router_loss)
        )
        loss = token_loss + self.config.reconstruction_loss_coef * reconstruction_loss + router_loss
        return {
            "loss": loss,
            "token_loss": token_loss,
            "reconstruction_loss": reconstruction_loss,
            "router_loss": router_loss,
        }


def trim_unscored(labels: torch.Tensor) -> torch.Tensor:
    """Mask `[B, M]` of all columns up to the last of each row that is scored."""
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    last = torch.where(labels == -100, 0, places).amax(dim=1, keepdim=True)
    return (places <= last).long()


class LiquidForSequenceClassification(EncoderEmbeddingMixin, LiquidPreTrainedModel):
    """The encoder with a linear head on the mean of its real tokens' states; of a translator it takes the encoder."""

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
    ) -> SequenceClassifierOutput:
        """
        Args:
            labels: `[B]` classes or values, `[B, num_labels]` for several at once.

        Returns:
            `logits` `[B, num_labels]` and, with labels, `loss`: the head's, `reconstruction_loss_coef` times the
            reconstruction loss, and the router's, means over rows.

        The others are those of `BidirectionalEncoder.forward`.
        """
        outputs: LiquidEncoderOutput = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        states = outputs.last_hidden_state  # zero where padded
        counts = states.shape[1] if attention_mask is None else attention_mask.bool().sum(dim=1, keepdim=True)
        logits = self.score(states.sum(dim=1) / torch.as_tensor(counts, device=states.device).clamp(min=1))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            loss = (
                loss
                + self.config.reconstruction_loss_coef * outputs.reconstruction_loss.mean()
                + outputs.router_loss.mean()
            )
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "BidirectionalEncoder",
    "LiquidForSeq2SeqLM",
    "LiquidForSequenceClassification",
    "LiquidModel",
    "LiquidPreTrainedModel",
]
