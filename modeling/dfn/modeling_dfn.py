"""Dynamic Flow Networks: entities that flow to a place and read what is near, layer upon layer (`dfn_layer.py`).

Rows are left-aligned behind the model's boundary (`row_layout.py`); state lives in `cache.FlowCacheLayer`.

Shape letters: B batch, M entities of this call, N stored entities, H heads, P position_dim, D value features per head,
K neighbours, C memory chunks, S memory slots.
"""

import math
from dataclasses import dataclass

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
from ..modules.forward_utils import (
    FlowGenerationMixin,
    embed_inputs,
    finish_forward,
    next_token_labels,
    prepare_forward,
)
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout, pad_index
from ..ops.chunking import apply_chunked
from .configuration_dfn import SEARCHES, DFNConfig
from .dynamic_chunking import (
    COORDINATE_FEATURES,
    Dechunking,
    EntitySampling,
    PackedEntities,
    SampledEntities,
    should_pack,
)
from .layers import DFNLayer, DynamicFlowAttention, Entities, FlowNorm, PersistentFieldMemory, identity_conv_init


@dataclass
class DFNModelOutput(BaseModelOutputWithPast):
    """
    Attributes:
        last_hidden_state: `[B, M, hidden_size]`, zero where padded.
        past_key_values: the state for continuation; named `cache` by transformers 5.24 and later.
        hidden_states: embeddings and each layer's output, the last one after the final norm. With `entity_sampling`,
            of the layers over bytes too; an entity's stands at the byte that completed it, with zeros elsewhere.
        attentions: per layer the flow weights among tokens `[B, H, M, N]`; memory takes what is left to 1.
        entities: per layer `Entities`; with `entity_sampling` those completed in this call, left-aligned.
        boundary_probs: `[B, M]`, how uncertain what follows a byte is; from 1/2 on it completes an entity. 0 where padded.
            With `entity_sampling`, as the next two.
        boundary_mask: int64 `[B, M]`, 1 at bytes that complete an entity.
        ratio_loss: `[B]`, how far each row is from `entity_rate`; with `entity_sampling="adaptive"`.
        prediction_loss: `[B]`, how far from the flow of a byte the next one lies; likewise, where the model is causal. Bytes
            of this call count alone, not one that follows in the next.
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
        loss: scalar, next-token cross-entropy; with `entity_sampling="adaptive"`, and `ratio_loss_coef` times `ratio_loss`.
            Its gradient is that of `prediction_loss`, too.
        logits: `[B, M, vocab_size]`.
        token_loss, ratio_loss, prediction_loss: scalars, what such a loss is made of.
        past_key_values, hidden_states, attentions, entities, boundary_probs, boundary_mask: see `DFNModelOutput`.
    """

    token_loss: torch.Tensor | None = None
    ratio_loss: torch.Tensor | None = None
    prediction_loss: torch.Tensor | None = None
    entities: tuple[Entities, ...] | None = None
    boundary_probs: torch.Tensor | None = None
    boundary_mask: torch.Tensor | None = None


class DFNPreTrainedModel(PreTrainedModel):
    config: DFNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DFNLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_context_parallel = False
    _keep_in_fp32_modules = ["flow_map", "position_proj", "flow_proj", "influence_proj"]
    _keep_in_fp32_modules_strict = ["log_sharpness", "log_fading", "decay_logit"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Stated here: transformers guesses it from the source file, which differs in a saved folder."""
        return True

    @property
    def _can_compile_fullgraph(self) -> bool:
        """A step has the same shapes whatever the data, and a cache of fixed shape can hold its state."""
        return self.config.entity_sampling == "token"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=getattr(module, "init_std", config.initializer_range))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, nn.Conv1d):
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
            # ‖q − k‖² grows with the dimension: 1.2 / P keeps the first logits within a few units.
            init.constant_(module.log_sharpness, math.log(1.2 / config.position_dim))
            init.copy_(module.log_fading, torch.linspace(0.7, -3.0, module.num_heads))
            module.reset_grids()


class Seen:
    """What the layers of one call are asked to show."""

    def __init__(self, wants_weights: bool, wants_states: bool, wants_entities: bool):
        self.wants_weights, self.wants_states, self.wants_entities = wants_weights, wants_states, wants_entities
        self.states: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        self.entities: list[Entities] = []


class DFNModel(DFNPreTrainedModel):
    """Embeddings, DFN layers, readout and final norm; with `entity_sampling`, the layers over samples around them."""

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.sampling = None
        if config.entity_sampling != "token":
            sample_config, sides = config.of_sample_layers(), range(config.num_sample_layers)
            self.sample_encoder = nn.ModuleList([DFNLayer(sample_config, layer_idx) for layer_idx in sides])
            self.sampling = EntitySampling(config)
            self._keep_in_fp32_modules = [*self._keep_in_fp32_modules, "coordinate_proj"]
            self._keep_in_fp32_modules_strict = [*self._keep_in_fp32_modules_strict, *EntitySampling.scales]
            self.entity_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.dechunking = Dechunking()
            self.sample_decoder = nn.ModuleList([DFNLayer(sample_config, layer_idx) for layer_idx in sides])
        features = 0 if self.sampling is None else COORDINATE_FEATURES
        self.layers = nn.ModuleList(
            [DFNLayer(config, layer_idx, features) for layer_idx in range(config.num_hidden_layers)]
        )
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
        inputs_embeds: torch.FloatTensor | None = None,
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
            input_ids: int64 `[B, M]`, or `inputs_embeds` `[B, M, hidden_size]`: exactly one of them.
            attention_mask: `[B, M]`, or `[B, columns before + M]` with a cache; 0 is padding, anywhere in a row.
            position_ids: `[B, M]` or `[1, M]`. There are no position embeddings; without mask and cache, positions
                that start again mark packed segments.
            past_key_values: `DynamicCache(config=model.config)`, or `StaticCache` with a `max_cache_len` too, to
                continue from; updated in place.
            use_cache: return the state; the config's value by default, never while gradients are checkpointed.
            segment_ids: int64 `[B, M]`, packed documents: an entity sees its own segment only; negative is padding.
            output_attentions: return dense flow weights, O(M²) memory.
            output_hidden_states: return the states of every layer.
            output_entities: return positions, influence and neighbours of every layer.
            cache: what transformers 5.24 and later call `past_key_values`.

        Raises:
            ValueError: inputs that do not fit together; the message names them and the remedy.
        """
        config = self.config
        past_key_values = resolve_cache_argument(past_key_values, cache)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        inputs_embeds = embed_inputs(self, input_ids, inputs_embeds)
        if not config.is_causal:
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values is of no use where `is_causal` is False: tokens to come are read too."
                )
            use_cache = False
        rows, states, past_key_values = prepare_forward(
            self, inputs_embeds, attention_mask, position_ids, segment_ids, past_key_values, use_cache
        )
        check_search(config, states[-1])
        hidden_states = rows.unpad(inputs_embeds)
        del inputs_embeds  # a million tokens are a gigabyte of it
        seen = Seen(output_attentions, output_hidden_states, output_entities)
        if self.sampling is None:
            hidden_states, sampled = self._run_tokens(hidden_states, rows, states, seen), {}
        else:
            hidden_states, sampled = self._run_sampled(hidden_states, rows, states, seen)
        hidden_states = rows.pad(apply_chunked(self.norm, hidden_states))
        if output_hidden_states:
            seen.states.append(hidden_states)
        finish_forward(past_key_values, states)
        return DFNModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: past_key_values},
            hidden_states=tuple(seen.states) if output_hidden_states else None,
            attentions=tuple(seen.weights) if output_attentions else None,
            entities=tuple(seen.entities) if output_entities else None,
            **sampled,
        )

    def _run_tokens(self, hidden_states: torch.Tensor, rows: RowLayout, states: list, seen: "Seen") -> torch.Tensor:
        """Each token an entity."""
        origin = None
        for layer, state in zip(self._entity_layers(), states, strict=True):
            if seen.wants_states:
                columns, hidden_states = rows.pad_with_grad(hidden_states)
                seen.states.append(columns)
            hidden_states, origin, influence, entities, weights = layer(
                hidden_states, origin, rows, past_key_values=state, output_attentions=seen.wants_weights
            )
            if seen.wants_weights:
                seen.weights.append(weights)
            if seen.wants_entities:
                seen.entities.append(pad_entities(entities, rows, state))
        if self.config.readout_window > 1:
            # Kept by the first layer, whose refusal of a crop comes before any layer was cropped.
            hidden_states = self._read_out(hidden_states, influence, rows, states[0])
        return hidden_states

    def _run_sampled(
        self, hidden_states: torch.Tensor, rows: RowLayout, states: list, seen: "Seen"
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Bytes → entities → bytes."""
        if seen.wants_weights:
            raise ValueError(
                "output_attentions is of tokens, and with `entity_sampling` "
                f"{self.config.entity_sampling!r} layers read entities: ask for output_entities."
            )
        sides = len(self.sample_encoder)
        encoder_states, decoder_states, entity_states = states[:sides], states[sides : 2 * sides], states[2 * sides :]
        # States that have seen both sides have seen what would be foretold.
        embeddings = hidden_states if self.config.is_causal else None
        hidden_states = self._run_sample_layers(self.sample_encoder, hidden_states, rows, encoder_states, seen)
        sampled = self.sampling(hidden_states, rows, encoder_states[-1], entity_states[0], embeddings)
        del embeddings
        for state in entity_states:
            if state is not None:
                state.set_layout(sampled.layout.rows)
        entities = self._run_entities(sampled, rows, entity_states, seen)
        hidden_states = self.dechunking(hidden_states, entities, sampled, entity_states[0])
        hidden_states = self._run_sample_layers(self.sample_decoder, hidden_states, rows, decoder_states, seen)
        ratio_loss = self.sampling.ratio_loss(sampled, rows) if self.sampling.adaptive else None
        boundary_probs, boundary_mask = (
            rows.pad(sampled.boundary_probs * rows.token_mask()),
            sampled.layout.rows.mask.long(),
        )
        losses = {"ratio_loss": ratio_loss, "prediction_loss": sampled.prediction_loss}
        return hidden_states, {"boundary_probs": boundary_probs, "boundary_mask": boundary_mask, **losses}

    def _run_sample_layers(
        self, layers, hidden_states: torch.Tensor, rows: RowLayout, states, seen: "Seen"
    ) -> torch.Tensor:
        for layer, state in zip(layers, states, strict=True):
            if seen.wants_states:
                columns, hidden_states = rows.pad_with_grad(hidden_states)
                seen.states.append(columns)
            hidden_states = layer(hidden_states, None, rows, past_key_values=state)[0]
        return hidden_states

    def _run_entities(self, sampled: SampledEntities, rows: RowLayout, states: list, seen: "Seen") -> torch.Tensor:
        """The DFN layers over entities, and a norm: `[B, E, hidden_size]`."""
        layout, hidden_states, origin = sampled.layout, sampled.states, None
        coordinates, log_mass, entity_rows, packed = sampled.coordinates, sampled.log_mass, layout.rows, None
        # A running mean over one packed row would be a difference of sums over other rows.
        if states[0] is None and self.config.flow_norm != "running" and should_pack(entity_rows):
            packed = PackedEntities(entity_rows)
            hidden_states, coordinates, log_mass = (packed.pack(x) for x in (hidden_states, coordinates, log_mass))
            entity_rows = packed.rows
        for layer, state in zip(self._entity_layers(), states, strict=True):
            if seen.wants_states:
                laid = hidden_states if packed is None else packed.unpack(hidden_states)
                columns, of_columns = rows.pad_with_grad(layout.at_samples(laid))
                seen.states.append(columns)
                laid = layout.of_samples(of_columns)
                hidden_states = laid if packed is None else packed.pack(laid)
            if hidden_states.shape[1] == 0:
                continue  # no entity was completed in this call
            hidden_states, origin, _, entities, _ = layer(
                hidden_states, origin, entity_rows, coordinates, log_mass, past_key_values=state
            )
            if seen.wants_entities:
                seen.entities.append(entities if packed is None else unpack_entities(entities, packed))
        hidden_states = apply_chunked(self.entity_norm, hidden_states)
        return hidden_states if packed is None else packed.unpack(hidden_states)

    def _entity_layers(self) -> nn.ModuleList:
        return self.layers[: self.config.num_hidden_layers]  # early-exit decoding lowers it for its drafts

    def _read_out(self, hidden_states, influence, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        """s̄ (paper §3): mean of the `readout_window` most recent entities, weighted by softmax of their influence."""
        before = self.config.readout_window - 1
        weight = influence.mean(dim=1).unsqueeze(-1)
        recent = torch.cat([hidden_states.to(weight.dtype), weight], dim=-1)
        recent = state.roll("readout", recent, before) if state is not None else F.pad(recent, (0, 0, before, 0))
        length = hidden_states.shape[1]
        windows = recent[..., -1:].unfold(1, before + 1, 1).flatten(2)  # [B, M, window], oldest first
        age = torch.arange(before, -1, -1, device=recent.device)
        weights = windows.masked_fill(age > rows.segment_positions[..., None], -math.inf).softmax(dim=-1)
        mean = sum(weights[..., step, None] * recent[:, step : step + length, :-1] for step in range(before + 1))
        return mean.to(hidden_states.dtype)


def check_search(config: DFNConfig, state: FlowCacheLayer | None) -> None:
    """The search may be changed between calls, but the index of one is not kept up by the other."""
    if config.search_implementation not in SEARCHES:
        raise ValueError(f"`search_implementation` must be one of {SEARCHES}, got {config.search_implementation!r}.")
    if torch.compiler.is_exporting():
        check_export(config)
    if state is None or state.data("place") is None:
        return
    if (state.data("cell") is None) != (config.search_implementation == "exact") and state.seq_length > 0:
        raise ValueError(
            "`search_implementation` was changed while past_key_values was in use: start with an empty cache."
        )


def check_export(config: DFNConfig) -> None:
    """An exported program can search exactly, an ONNX one not at all, and neither samples entities."""
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            "DFN's search orders candidates by the bits of their distances, for which ONNX has no operator: "
            "use `torch.export.export`."
        )
    if config.entity_sampling != "token":
        raise ValueError(
            f"With `entity_sampling` {config.entity_sampling!r} there are as many entities as the bytes ask for, "
            "which no exported program can have: export a model of tokens."
        )
    if config.search_implementation != "exact":
        raise ValueError(
            "Cell lists are walked as the data ask, which no exported program can do: set "
            "`model.config.search_implementation = 'exact'` first."
        )


def pad_entities(entities: Entities, rows: RowLayout, state: FlowCacheLayer | None) -> Entities:
    """Entities of the rows → of the columns; neighbours are named by their column."""
    columns = pad_index(rows, state)

    def scatter(x):
        return rows.pad(x.transpose(1, 2)).transpose(1, 2)

    found = entities.neighbors
    named = columns[:, None, None].expand(*found.shape[:3], -1).gather(-1, found.clamp(min=0))
    # Shifted by one, so that the zero of padding means none.
    neighbors = scatter(torch.where(found < 0, 0, named + 1)) - 1
    return Entities(
        *(scatter(x) for x in (entities.rest_positions, entities.moved_positions, entities.influence)), neighbors
    )


def unpack_entities(entities: Entities, packed: PackedEntities) -> Entities:
    """Entities of one row → of the rows they were packed from; neighbours are places in their own row."""

    def unpack(x):
        return packed.unpack(x.transpose(1, 2)).transpose(1, 2)

    found = entities.neighbors
    own = found - (packed.rows.positions - packed.place)[:, None, :, None]
    neighbors = unpack(torch.where(found < 0, 0, own + 1)) - 1
    return Entities(
        *(unpack(x) for x in (entities.rest_positions, entities.moved_positions, entities.influence)), neighbors
    )


class DFNForCausalLM(FlowGenerationMixin, DFNPreTrainedModel, GenerationMixin):
    """DFN with a next-token head: P(t) = softmax(W_o s̄) (paper §3)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError("A causal language model needs `is_causal`, which this configuration has set to False.")
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
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
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
            labels: int64 `[B, M]`, the input ids themselves; −100 is not scored, nor is the first token of a segment.
            logits_to_keep: compute the last so many logits, or those at these columns; 0 is all.

        The others are those of `DFNModel.forward`.
        """
        outputs: DFNModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=resolve_cache_argument(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_entities=output_entities,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        losses = {}
        if labels is not None:
            labels = next_token_labels(labels, segment_ids)
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
        """Next-token loss, and the rows' other losses as means over rows weighted by their labels."""
        loss = self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )
        scored = (labels[:, 1:] != -100).sum(dim=1)
        total = scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return _with_sampling(loss, outputs, scored, total, self.config.ratio_loss_coef)


class DFNForSequenceClassification(LastTokenClassificationMixin, DFNPreTrainedModel):
    """DFN with a linear head on the last real entity of each row.

    With `entity_sampling="adaptive"` its loss holds `ratio_loss_coef` times the rows' mean `ratio_loss` too, and its
    gradient that of their `prediction_loss`.
    """

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DFNModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def _loss(self, logits, labels, outputs) -> torch.Tensor:
        """The labels', and the mean over rows of what trains the sampling of entities."""
        loss = super()._loss(logits, labels, outputs)
        return _with_sampling(loss, outputs, 1, len(logits), self.config.ratio_loss_coef)["loss"]


def _with_sampling(loss, outputs: DFNModelOutput, scored, total, ratio_loss_coef: float) -> dict[str, torch.Tensor]:
    """A loss of tokens or labels, and those of the sampling of entities, where rows count as `scored` of `total`."""
    if outputs.ratio_loss is None:
        return {"loss": loss}
    parts = {"token_loss": loss, "ratio_loss": (scored * outputs.ratio_loss).sum() / total}
    loss = loss + ratio_loss_coef * parts["ratio_loss"]
    if outputs.prediction_loss is not None:
        parts["prediction_loss"] = (scored * outputs.prediction_loss).sum() / total
        loss = (
            loss + parts["prediction_loss"] - parts["prediction_loss"].detach()
        )  # losses of models remain comparable
    return {"loss": loss, **parts}


__all__ = ["DFNForCausalLM", "DFNForSequenceClassification", "DFNModel", "DFNPreTrainedModel"]
