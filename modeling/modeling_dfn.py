"""Dynamic Flow Networks: entities that flow to a place and read what is near, layer upon layer (`dfn_layer.py`).

Rows are left-aligned behind the model's boundary (`padding.py`); state lives in `state_cache.StateLayer`.

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

from .chunk_memory import ChunkMemory
from .classification import LastStateClassification
from .configuration_dfn import SEARCHES, DFNConfig
from .dfn_layer import DFNLayer, DynamicFlowAttention, Entities, FlowNorm, PersistentFieldMemory, near_identity
from .model_inputs import GrowingStateMixin, begin_call, embed, end_call, next_token_labels
from .padding import Rows, row_columns
from .pieces import in_pieces
from .rms_norm import RMSNorm
from .state_cache import CACHE_NAME, StateLayer, given_cache


@dataclass
class DFNModelOutput(BaseModelOutputWithPast):
    """
    Attributes:
        last_hidden_state: `[B, M, hidden_size]`, zero where padded.
        past_key_values: the state for continuation; named `cache` by transformers 5.24 and later.
        hidden_states: embeddings and each layer's output, the last one after the final norm.
        attentions: per layer the flow weights among tokens `[B, H, M, N]`; memory takes what is left to 1.
        entities: per layer `Entities`.
    """

    entities: tuple[Entities, ...] | None = None


@dataclass
class DFNCausalLMOutput(CausalLMOutputWithPast):
    """
    Attributes:
        loss: scalar, next-token cross-entropy.
        logits: `[B, M, vocab_size]`.
        past_key_values, hidden_states, attentions, entities: see `DFNModelOutput`.
    """

    entities: tuple[Entities, ...] | None = None


class DFNPreTrainedModel(PreTrainedModel):
    config: DFNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DFNLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_context_parallel = False
    _keep_in_fp32_modules = ["flow_map", "position_proj", "flow_proj", "influence_proj"]
    _keep_in_fp32_modules_strict = ["log_sharpness", "log_fading", "decay_logit"]

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
            init.copy_(module.weight, near_identity(module.weight, module.ahead))
        elif isinstance(module, (RMSNorm, FlowNorm)):
            init.ones_(module.weight)
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


class DFNModel(DFNPreTrainedModel):
    """Embeddings, DFN layers, readout and final norm."""

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DFNLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
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
            past_key_values: `DynamicCache(config=model.config)` to continue from; updated in place.
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
        past_key_values = given_cache(past_key_values, cache)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        inputs_embeds = embed(self, input_ids, inputs_embeds)
        if not config.is_causal:
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values is of no use where `is_causal` is False: tokens to come are read too."
                )
            use_cache = False
        rows, states, past_key_values = begin_call(
            self, inputs_embeds, attention_mask, position_ids, segment_ids, past_key_values, use_cache
        )
        check_search(config, states[0])
        layers = self.layers[: config.num_hidden_layers]  # early-exit decoding lowers it for its drafts
        hidden_states = rows.compact(inputs_embeds)
        del inputs_embeds  # a million tokens are a gigabyte of it
        all_states, all_weights, all_entities = [], [], []
        origin = None
        for layer, state in zip(layers, states, strict=True):
            if output_hidden_states:
                columns, hidden_states = rows.observe(hidden_states)
                all_states.append(columns)
            hidden_states, origin, influence, entities, weights = layer(
                hidden_states, origin, rows, past_key_values=state, output_attentions=output_attentions
            )
            if output_attentions:
                all_weights.append(weights)
            if output_entities:
                all_entities.append(entities_to_columns(entities, rows, state))
        if config.readout_window > 1:
            # Kept by the first layer, whose refusal of a crop comes before any layer was cropped.
            hidden_states = self._read_out(hidden_states, influence, rows, states[0])
        hidden_states = rows.scatter(in_pieces(self.norm, hidden_states))
        if output_hidden_states:
            all_states.append(hidden_states)
        end_call(past_key_values, states)
        return DFNModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: past_key_values},
            hidden_states=tuple(all_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            entities=tuple(all_entities) if output_entities else None,
        )

    def _read_out(self, hidden_states, influence, rows: Rows, state: StateLayer | None) -> torch.Tensor:
        """s̄ (paper §3): mean of the `readout_window` most recent entities, weighted by softmax of their influence."""
        before = self.config.readout_window - 1
        weight = influence.mean(dim=1).unsqueeze(-1)
        recent = torch.cat([hidden_states.to(weight.dtype), weight], dim=-1)
        recent = state.tail("readout", recent, before) if state is not None else F.pad(recent, (0, 0, before, 0))
        length = hidden_states.shape[1]
        windows = recent[..., -1:].unfold(1, before + 1, 1).flatten(2)  # [B, M, window], oldest first
        age = torch.arange(before, -1, -1, device=recent.device)
        weights = windows.masked_fill(age > rows.reach[..., None], -math.inf).softmax(dim=-1)
        mean = sum(weights[..., step, None] * recent[:, step : step + length, :-1] for step in range(before + 1))
        return mean.to(hidden_states.dtype)


def check_search(config: DFNConfig, state: StateLayer | None) -> None:
    """The search may be changed between calls, but the index of one is not kept up by the other."""
    if config.search_implementation not in SEARCHES:
        raise ValueError(f"`search_implementation` must be one of {SEARCHES}, got {config.search_implementation!r}.")
    if torch.compiler.is_exporting():
        check_export(config)
    if state is None or state.columns == 0 or config.num_neighbors == 0:
        return
    if (state.data("cell") is None) != (config.search_implementation == "exact"):
        raise ValueError(
            "`search_implementation` was changed while past_key_values was in use: start with an empty cache."
        )


def check_export(config: DFNConfig) -> None:
    """An exported program can search exactly; an ONNX one not at all."""
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            "DFN's search orders candidates by the bits of their distances, for which ONNX has no operator: "
            "use `torch.export.export`."
        )
    if config.search_implementation != "exact":
        raise ValueError(
            "Cell lists are walked as the data ask, which no exported program can do: set "
            "`model.config.search_implementation = 'exact'` first."
        )


def entities_to_columns(entities: Entities, rows: Rows, state: StateLayer | None) -> Entities:
    """Entities of the rows → of the columns; neighbours are named by their column."""
    columns = row_columns(rows, state)

    def scatter(x):
        return rows.scatter(x.transpose(1, 2)).transpose(1, 2)

    found = entities.neighbors
    named = columns[:, None, None].expand(*found.shape[:3], -1).gather(-1, found.clamp(min=0))
    # Shifted by one, so that the zero of padding means none.
    neighbors = scatter(torch.where(found < 0, 0, named + 1)) - 1
    return Entities(
        *(scatter(x) for x in (entities.rest_positions, entities.moved_positions, entities.influence)), neighbors
    )


class DFNForCausalLM(GrowingStateMixin, DFNPreTrainedModel, GenerationMixin):
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
            cache=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_entities=output_entities,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = None
        if labels is not None:
            labels = next_token_labels(labels, segment_ids)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return DFNCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            entities=outputs.entities,
        )


class DFNForSequenceClassification(LastStateClassification, DFNPreTrainedModel):
    """DFN with a linear head on the last real entity of each row."""

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DFNModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = ["DFNForCausalLM", "DFNForSequenceClassification", "DFNModel", "DFNPreTrainedModel"]
