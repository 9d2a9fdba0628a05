"""Dynamic Flow Networks: a causal language model whose tokens attend to a local window and to nearest neighbours.

The neighbours of a token are the k nearest preceding tokens in a learnt position space (`layers.py`). Rows are
left-aligned inside the model (`modules/row_layout.py`); layers keep their state in `modules.cache.FlowCacheLayer`.

Shape letters: B batch, M tokens of this call, N tokens so far, E entities completed in this call, H heads.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from ..modules.cache import CACHE_NAME, FlowCacheLayer, resolve_cache_argument
from ..modules.chunk_memory import ChunkMemory
from ..modules.classification import LastTokenClassificationMixin
from ..modules.depthwise_conv import DepthwiseConv1d
from ..modules.forward_utils import (
    FlowGenerationMixin,
    embed_inputs,
    finish_forward,
    prepare_forward,
)
from ..modules.outputs import OutputCollector, add_grad_only
from ..modules.packing import next_token_labels, packed_documents
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout
from ..ops.chunking import apply_chunked
from .attention import DynamicFlowAttention, PersistentFieldMemory
from .checks import check_search
from .configuration_dfn import DFNConfig
from .dynamic_chunking import (
    COORDINATE_FEATURES,
    Dechunking,
    EntitySampling,
    PackedEntities,
    SampledEntities,
    should_pack,
)
from .entities import Entities, pad_entities, unpack_entities
from .layers import DFNLayer, FlowNorm, identity_conv_init


@dataclass
class DFNModelOutput(BaseModelOutputWithPast):
    """
    Attributes:
        last_hidden_state: `[B, M, hidden_size]`, zero where padded.
        past_key_values: cache for continuation; named `cache` by transformers 5.24 and later.
        hidden_states: input of each layer `[B, M, hidden_size]`, and the output of the final norm last. With
            `entity_sampling="adaptive"` or "uniform" this includes the byte-level layers; an entity's state is at the
            byte that completes it, and other bytes are zero.
        attentions: per layer attention weights between tokens `[B, H, M, N]`. With memory slots a row sums to less
            than 1.
        entities: per layer `Entities` of the M tokens. With `entity_sampling="adaptive"` or "uniform", those of the E
            entities, left-aligned.
        boundary_probs: `[B, M]`, probability that a byte completes an entity; 0 where padded. This and
            `boundary_mask` are None with `entity_sampling="token"`.
        boundary_mask: int64 `[B, M]`, 1 at bytes that complete an entity.
        ratio_loss: `[B]`, deviation of each row from `entity_rate`; only with `entity_sampling="adaptive"`.
        prediction_loss: `[B]`, mean squared error of the predicted next byte embedding, over the bytes of this call
            that have a next one in it; only with `entity_sampling="adaptive"` and `is_causal`.
    """

    entities: tuple[Entities, ...] | None = None
    boundary_probs: torch.Tensor | None = None
    boundary_mask: torch.Tensor | None = None
    ratio_loss: torch.Tensor | None = None
    prediction_loss: torch.Tensor | None = None


@dataclass
class DFNCausalLMOutput(CausalLMOutputWithPast):
    """
    Attributes:
        loss: scalar, `token_loss` plus `aux_loss`; with labels.
        logits: `[B, M, vocab_size]`.
        token_loss: scalar, next-token cross-entropy; with labels and `entity_sampling="adaptive"`.
        aux_loss: scalar, `ratio_loss_coef` times `ratio_loss`; its gradient also contains the gradient of
            `prediction_loss`. Add it to a loss that you compute from the logits. This and the next two exist with
            `entity_sampling="adaptive"`, with labels or in training mode. Rows have equal weights or, with labels,
            their numbers of labels.
        ratio_loss, prediction_loss: scalars, see `DFNModelOutput`.
        past_key_values, hidden_states, attentions, entities, boundary_probs, boundary_mask: see `DFNModelOutput`.
    """

    token_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    ratio_loss: torch.Tensor | None = None
    prediction_loss: torch.Tensor | None = None
    entities: tuple[Entities, ...] | None = None
    boundary_probs: torch.Tensor | None = None
    boundary_mask: torch.Tensor | None = None


class DFNPreTrainedModel(PreTrainedModel):
    """Base class: initialisation, and what transformers has to know of all DFN models."""

    config: DFNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DFNLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_context_parallel = False
    _keep_in_fp32_modules = ["flow_map", "position_proj", "flow_proj", "influence_proj"]
    _keep_in_fp32_modules_strict = ["log_sharpness", "log_fading", "decay_logit"]
    # Buffers of the cell search of earlier versions.
    _keys_to_ignore_on_load_unexpected = [r"attention\.grid_(rotation|shift)$"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Overridden because transformers infers it from the source file, which differs in a saved folder."""
        return True

    @property
    def _can_compile_fullgraph(self) -> bool:  # type: ignore[override]  # transformers only reads it
        """Whether a decode step has fixed shapes, so that it can be compiled and run with a `StaticCache`."""
        return self.config.entity_sampling == "token"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the parameters and buffers of one module."""
        config = self.config
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=getattr(module, "init_std", config.initializer_range))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, DepthwiseConv1d):
            init.copy_(module.weight, identity_conv_init(module.weight, module.ahead))
        elif isinstance(module, (RMSNorm, FlowNorm)):
            init.ones_(module.weight)
        elif isinstance(module, EntitySampling):
            module.reset_parameters()
        elif isinstance(module, ChunkMemory):
            module.reset_parameters(config.initializer_range)
        elif isinstance(module, PersistentFieldMemory):
            init.normal_(module.position, std=1.0)
            init.zeros_(module.influence)
        elif isinstance(module, DynamicFlowAttention):
            # ‖q − k‖² grows with the dimension P; 1.2 / P keeps the initial logits within a few units.
            init.constant_(module.log_sharpness, math.log(1.2 / config.position_dim))
            init.copy_(module.log_fading, torch.linspace(0.7, -3.0, module.num_heads))


class DFNModel(DFNPreTrainedModel):
    """A DFN without a head: embeddings, DFN layers, readout and final norm.

    With `entity_sampling="adaptive"` or "uniform", byte-level layers make entities, the DFN layers run on entities,
    and more byte-level layers follow (`dynamic_chunking.py`).

    Example:
        >>> import torch
        >>> from dfn_hf import DFNConfig, DFNModel
        >>> model = DFNModel(DFNConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)).eval()
        >>> outputs = model(torch.randint(32, (1, 50)), output_entities=True)
        >>> outputs.last_hidden_state.shape, outputs.entities[0].neighbors.shape
        (torch.Size([1, 50, 16]), torch.Size([1, 4, 50, 16]))
    """

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.sampling = None
        if config.entity_sampling != "token":
            sample_config, sides = config.of_sample_layers(), range(config.num_sample_layers)
            self.sample_encoder = nn.ModuleList([DFNLayer(sample_config) for _ in sides])
            self.sampling = EntitySampling(config)
            self._keep_in_fp32_modules = [*self._keep_in_fp32_modules, "coordinate_proj"]
            self._keep_in_fp32_modules_strict = [*self._keep_in_fp32_modules_strict, *EntitySampling.scales]
            self.entity_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.dechunking = Dechunking()
            self.sample_decoder = nn.ModuleList([DFNLayer(sample_config) for _ in sides])
        features = 0 if self.sampling is None else COORDINATE_FEATURES
        self.layers = nn.ModuleList([DFNLayer(config, features) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_entities: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> DFNModelOutput:
        """
        Args:
            input_ids: int64 `[B, M]`. Pass exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: `[B, M]`, or `[B, past + M]` with a cache; 0 is padding, at any position of a row.
            position_ids: `[B, M]` or `[1, M]`. DFN has no position embeddings. Without mask and cache, positions that
                restart mark packed segments.
            past_key_values: cache to continue from: `DynamicCache(config=model.config)`, or a `StaticCache` with
                `max_cache_len`. Updated in place.
            inputs_embeds: `[B, M, hidden_size]`.
            use_cache: return the cache; default: `config.use_cache`. Ignored during gradient checkpointing.
            segment_ids: int64 `[B, M]`, for packed documents: a token attends to its own segment only. Negative ids
                are padding.
            output_attentions: return dense attention weights, O(M N) memory.
            output_hidden_states: return the states of every layer.
            output_entities: return positions, influence and neighbours of every layer.
            cache: name of `past_key_values` in transformers 5.24 and later.
            kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, or `seq_idx`, also describe packed documents, as in
                transformers' recurrent models. Of several descriptions the first counts: `segment_ids`,
                `cu_seq_lens_q`, `seq_idx`, `position_ids`. Other names are ignored.

        Raises:
            ValueError: the inputs contradict each other; the message names them and the remedy.
        """
        config = self.config
        past_key_values = resolve_cache_argument(past_key_values, cache)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        inputs_embeds = embed_inputs(self, input_ids, inputs_embeds)
        if not config.is_causal:
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values requires `is_causal=True`: a bidirectional model has to process the whole row "
                    "again, so call it without a cache."
                )
            use_cache = False
        is_plain = attention_mask is None and past_key_values is None
        segments = packed_documents(inputs_embeds.shape, segment_ids, position_ids, is_plain, **kwargs)
        rows, states, past_key_values = prepare_forward(
            self, inputs_embeds, attention_mask, segments, past_key_values, use_cache
        )
        check_search(config)
        hidden_states = rows.unpad(inputs_embeds)
        del inputs_embeds  # frees 1 GB for a million tokens
        outputs = OutputCollector(
            rows, attentions=output_attentions, hidden_states=output_hidden_states, entities=output_entities
        )
        chunking_outputs: dict[str, Any] = {}
        if self.sampling is None:
            hidden_states = self._run_tokens(hidden_states, rows, states, outputs)
        else:
            hidden_states, chunking_outputs = self._run_sampled(hidden_states, rows, states, outputs)
        hidden_states = rows.pad(apply_chunked(self.norm, hidden_states))
        outputs.add(hidden_states=hidden_states)
        finish_forward(past_key_values, states)
        cache_output: dict[str, Any] = {CACHE_NAME: past_key_values}
        return DFNModelOutput(
            last_hidden_state=hidden_states,
            **cache_output,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            entities=outputs.get("entities"),
            **chunking_outputs,
        )

    def _run_tokens(
        self, hidden_states: torch.Tensor, rows: RowLayout, states: list, outputs: OutputCollector
    ) -> torch.Tensor:
        """Run the DFN layers on tokens `[B, M, hidden_size]`."""
        origin = None
        for layer, state in zip(self._entity_layers(), states, strict=True):
            hidden_states = outputs.add_hidden_states(hidden_states)
            hidden_states, origin, influence, entities, weights = layer(
                hidden_states, origin, rows, past_key_values=state, output_attentions=outputs.keeps("attentions")
            )
            outputs.add(attentions=weights)
            if outputs.keeps("entities"):
                outputs.add(entities=pad_entities(entities, rows, state))
        if self.config.readout_window > 1:
            # Stored in the first layer: its state then refuses an impossible crop before another layer is cropped.
            hidden_states = self._read_out(hidden_states, influence, rows, states[0])
        return hidden_states

    def _run_sampled(
        self, hidden_states: torch.Tensor, rows: RowLayout, states: list, outputs: OutputCollector
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """Run byte-level layers, entity-level layers and byte-level layers.

        Args:
            hidden_states: `[B, M, hidden_size]`, of bytes.
            states: caches of all layers in the order of `config.layer_types`, or None each.

        Returns:
            (states of bytes `[B, M, hidden_size]`, the fields of `DFNModelOutput` from `boundary_probs` on).
        """
        if outputs.keeps("attentions"):
            raise ValueError(
                "output_attentions requires `entity_sampling='token'`, got "
                f"{self.config.entity_sampling!r}, whose layers attend to entities: use output_entities."
            )
        num_layers = len(self.sample_encoder)
        encoder_states, decoder_states = states[:num_layers], states[num_layers : 2 * num_layers]
        entity_states = states[2 * num_layers :]
        # A bidirectional state contains the next byte, so predicting it would be trivial.
        embeddings = hidden_states if self.config.is_causal else None
        hidden_states = self._run_sample_layers(self.sample_encoder, hidden_states, rows, encoder_states, outputs)
        sampled = self.sampling(hidden_states, rows, encoder_states[-1], entity_states[0], embeddings)
        del embeddings
        for state in entity_states:
            if state is not None:
                state.set_layout(sampled.layout.rows)
        entities = self._run_entities(sampled, rows, entity_states, outputs)
        hidden_states = self.dechunking(hidden_states, entities, sampled, entity_states[0])
        hidden_states = self._run_sample_layers(self.sample_decoder, hidden_states, rows, decoder_states, outputs)
        return hidden_states, {
            "boundary_probs": rows.pad(sampled.boundary_probs * rows.token_mask()),
            "boundary_mask": sampled.layout.rows.mask.long(),
            "ratio_loss": self.sampling.ratio_loss(sampled, rows) if self.sampling.adaptive else None,
            "prediction_loss": sampled.prediction_loss,
        }

    def _run_sample_layers(
        self, layers, hidden_states: torch.Tensor, rows: RowLayout, states: list, outputs: OutputCollector
    ) -> torch.Tensor:
        """Run byte-level layers on `[B, M, hidden_size]`."""
        for layer, state in zip(layers, states, strict=True):
            hidden_states = outputs.add_hidden_states(hidden_states)
            hidden_states = layer(hidden_states, None, rows, past_key_values=state)[0]
        return hidden_states

    def _run_entities(
        self, sampled: SampledEntities, rows: RowLayout, states: list, outputs: OutputCollector
    ) -> torch.Tensor:
        """Run the DFN layers on entities, and the norm after them; returns `[B, E, hidden_size]`."""
        layout, hidden_states, origin = sampled.layout, sampled.states, None
        coordinates, log_mass, entity_rows, packed = sampled.coordinates, sampled.log_mass, layout.rows, None
        # Not with a running mean: in one packed row it is a difference of sums that include other rows.
        if states[0] is None and self.config.flow_norm != "running" and should_pack(entity_rows):
            packed = PackedEntities(entity_rows)
            hidden_states, coordinates, log_mass = (packed.pack(x) for x in (hidden_states, coordinates, log_mass))
            entity_rows = packed.rows
        for layer, state in zip(self._entity_layers(), states, strict=True):
            if outputs.keeps("hidden_states"):
                unpacked = hidden_states if packed is None else packed.unpack(hidden_states)
                at_bytes = outputs.add_hidden_states(layout.scatter_to_samples(unpacked))
                unpacked = layout.gather_from_samples(at_bytes)
                hidden_states = unpacked if packed is None else packed.pack(unpacked)
            if hidden_states.shape[1] == 0:
                continue  # no entity was completed in this call
            hidden_states, origin, _, entities, _ = layer(
                hidden_states, origin, entity_rows, coordinates, log_mass, past_key_values=state
            )
            if outputs.keeps("entities"):
                outputs.add(entities=entities if packed is None else unpack_entities(entities, packed))
        hidden_states = apply_chunked(self.entity_norm, hidden_states)
        return hidden_states if packed is None else packed.unpack(hidden_states)

    def _entity_layers(self) -> nn.ModuleList:
        """The first `num_hidden_layers` layers: early-exit decoding lowers that number to draft tokens."""
        return self.layers[: self.config.num_hidden_layers]

    def _read_out(self, hidden_states, influence, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        """Average the last `readout_window` states, weighted by softmax of influence.

        This is s̄ of Dynamic Flow Networks (Stürtz), §3.

        Args:
            hidden_states: `[B, M, hidden_size]`.
            influence: `[B, H, M]`, of the last layer.
            state: the first layer's cache, or None.
        """
        before = self.config.readout_window - 1
        weight = influence.mean(dim=1).unsqueeze(-1)
        recent = torch.cat([hidden_states.to(weight.dtype), weight], dim=-1)
        recent = state.roll("readout", recent, before) if state is not None else F.pad(recent, (0, 0, before, 0))
        length = hidden_states.shape[1]
        windows = recent[..., -1:].unfold(1, before + 1, 1).flatten(2)  # [B, M, window], oldest first
        age = torch.arange(before, -1, -1, device=recent.device)
        weights = windows.masked_fill(age > rows.segment_positions[..., None], -math.inf).softmax(dim=-1)
        weighted = (weights[..., step, None] * recent[:, step : step + length, :-1] for step in range(before + 1))
        mean: torch.Tensor = sum(weighted)  # type: ignore[assignment]  # at least one state
        return mean.to(hidden_states.dtype)


class DFNForCausalLM(FlowGenerationMixin, DFNPreTrainedModel, GenerationMixin):
    """DFN with a next-token head: P(t) = softmax(W_o s̄) (Dynamic Flow Networks (Stürtz), §3).

    Example:
        >>> import torch
        >>> from dfn_hf import DFNConfig, DFNForCausalLM
        >>> model = DFNForCausalLM(DFNConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)).eval()
        >>> ids = torch.randint(32, (1, 50))
        >>> outputs = model(ids, labels=ids)
        >>> outputs.logits.shape, outputs.loss.shape
        (torch.Size([1, 50, 32]), torch.Size([]))
        >>> model.generate(ids, max_new_tokens=5, do_sample=False).shape
        torch.Size([1, 55])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError("DFNForCausalLM requires `is_causal=True`, got False: set it in the configuration.")
        self.model = DFNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        segment_ids: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_entities: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> DFNCausalLMOutput:
        """
        Args:
            labels: int64 `[B, M]`, the input ids (the model shifts them). −100 is ignored, and so is the first token
                of each packed document, whether the documents are described by `segment_ids`, `cu_seq_lens_q`,
                `seq_idx` or `position_ids`.
            logits_to_keep: number of last columns, or indices of columns, to compute logits for; 0 for all columns.

        The other arguments are those of `DFNModel.forward`.
        """
        past_key_values = resolve_cache_argument(past_key_values, cache)
        outputs: DFNModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_entities=output_entities,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        losses: dict[str, Any] = {}
        if self.training:
            losses = sampling_losses(outputs, 1, len(logits), self.config.ratio_loss_coef)
        if labels is not None:
            is_plain = attention_mask is None and past_key_values is None
            segments = packed_documents(labels.shape, segment_ids, position_ids, is_plain, **kwargs)
            labels = next_token_labels(labels, segments)
            losses = self._losses(logits, labels, outputs, **kwargs)
        return DFNCausalLMOutput(
            logits=logits,
            **losses,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            entities=outputs.entities,
            boundary_probs=outputs.boundary_probs,
            boundary_mask=outputs.boundary_mask,
        )

    def _losses(self, logits, labels, outputs, num_items_in_batch=None, **kwargs) -> dict[str, torch.Tensor]:
        """Return the loss and its parts; the auxiliary losses of rows are weighted by their numbers of labels."""
        loss = self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )
        scored = (labels[:, 1:] != -100).sum(dim=1)
        total = scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        losses = sampling_losses(outputs, scored, total, self.config.ratio_loss_coef)
        return {"loss": loss + losses["aux_loss"], "token_loss": loss, **losses} if losses else {"loss": loss}


class DFNForSequenceClassification(LastTokenClassificationMixin, DFNPreTrainedModel):
    """DFN with a linear head on the state of the last real token of each row.

    With `entity_sampling="adaptive"` the loss includes `ratio_loss_coef` times the mean `ratio_loss` of the rows, and
    its gradient includes the gradient of their mean `prediction_loss`.

    Example:
        >>> import torch
        >>> from dfn_hf import DFNConfig, DFNForSequenceClassification
        >>> config = DFNConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_labels=3)
        >>> model = DFNForSequenceClassification(config).eval()
        >>> ids = torch.randint(32, (2, 50))
        >>> model(ids, attention_mask=torch.ones_like(ids)).logits.shape
        torch.Size([2, 3])
    """

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DFNModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def _auxiliary_loss(self, outputs: DFNModelOutput) -> torch.Tensor | None:
        rows = len(outputs.last_hidden_state)
        return sampling_losses(outputs, 1, rows, self.config.ratio_loss_coef).get("aux_loss")


def sampling_losses(
    outputs: DFNModelOutput, row_weights: torch.Tensor | int, total, ratio_loss_coef: float
) -> dict[str, torch.Tensor]:
    """Return the losses of `EntitySampling`, and `aux_loss`, which is to be added to the loss of tokens or classes.

    Args:
        row_weights: weight of each row's losses, `[B]` or one number for all.
        total: divisor of the weighted sums.

    Returns:
        `ratio_loss`, `prediction_loss` if the model is causal, and `aux_loss`, scalars; nothing without
        `entity_sampling="adaptive"`.
    """
    if outputs.ratio_loss is None:
        return {}
    losses = {"ratio_loss": (row_weights * outputs.ratio_loss).sum() / total}
    losses["aux_loss"] = ratio_loss_coef * losses["ratio_loss"]
    if outputs.prediction_loss is not None:
        losses["prediction_loss"] = (row_weights * outputs.prediction_loss).sum() / total
        # Only the gradient is added, so that the losses of different models remain comparable.
        losses["aux_loss"] = add_grad_only(losses["aux_loss"], losses["prediction_loss"])
    return losses


__all__ = ["DFNForCausalLM", "DFNForSequenceClassification", "DFNModel", "DFNPreTrainedModel"]
