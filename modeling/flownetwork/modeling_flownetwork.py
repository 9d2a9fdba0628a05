"""FlowNetwork: pattern-based flow routing with adaptive sparsity, combined with attention and memory.

One layer computes, for the states s of a row:

    u  = RMSNorm(s)
    f  = FlowMixer(u)                          windows and fractions from ContextAwareFlowRouter(u)
    y  = Attention(u + f)                      over the flow's window        (`block_type="enhanced_flow"`)
    y  = Attention(u) + f                      over all preceding tokens     (`block_type="flow_transformer"`)
    s += W_o (y ⊙ silu(W_g (u + f)))
    s += MemoryAttention(RMSNorm(s))           over the model's bank and the slots of the sequence memory
    s += FeedForward(RMSNorm(s))

Inside the model rows are left-aligned (`row_layout.py`). The cache consists of one `cache.FlowCacheLayer` per layer.

Shape letters: B batch, M entities of this call, N entities so far, H heads.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from ..modules.cache import CACHE_NAME, FlowCacheLayer, resolve_cache_argument
from ..modules.chunk_memory import ChunkMemory
from ..modules.chunked_forward import forward_chunk_length, forward_in_chunks
from ..modules.classification import LastTokenClassificationMixin
from ..modules.forward_utils import (
    FlowGenerationMixin,
    embed_inputs,
    finish_forward,
    prepare_forward,
)
from ..modules.outputs import OutputCollector
from ..modules.packing import next_token_labels, packed_documents
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout, pad_attention
from ..modules.windowed_attention import RotaryEmbedding, SelfAttention
from ..ops.band import to_dense
from ..ops.chunking import apply_chunked
from .configuration_flownetwork import FlowNetworkConfig
from .memory import MemoryAttention, MemoryBank, SequenceMemory
from .routing import ContextAwareFlowRouter, FlowMixer

# Of one layer: flow by offset `[B, M, W]` or None, window `[B, M]`, kept fraction `[B, M]`.
Routes = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]


@dataclass
class Flows:
    """Routing of one layer.

    Attributes:
        matrix: `[B, M, N]`, weight with which each column so far flows into each column of this call.
        window: `[B, M]`, window of each column, in tokens.
        fraction: `[B, M]`, fraction of the reachable tokens that the router keeps.
    """

    matrix: torch.Tensor
    window: torch.Tensor
    fraction: torch.Tensor


@dataclass
class FlowNetworkModelOutput(BaseModelOutputWithPast):
    """
    Attributes:
        last_hidden_state: `[B, M, hidden_size]`, zero at padding.
        past_key_values: the cache; named `cache` from transformers 5.24 on.
        hidden_states: embeddings and the output of each layer, the last one after the final norm.
        attentions: per layer, self-attention weights `[B, H, M, N]`.
        flows: per layer, `Flows`.
        metrics: scalar tensors, averaged over layers and real tokens: `sparsity_kept` (kept fraction of the reachable
            tokens), `pattern_entropy` in nats, `window_mean` in tokens; and `memory_write_norm`, the norm of the bank
            update that this batch causes (0 in eval mode and without gradients). Returned in training mode, with
            labels, or with `output_metrics`.
    """

    flows: tuple[Flows, ...] | None = None
    metrics: dict[str, torch.Tensor] | None = None


@dataclass
class FlowNetworkCausalLMOutput(CausalLMOutputWithPast):
    """
    Attributes:
        loss: scalar, next-token cross-entropy.
        logits: `[B, M, vocab_size]`.
        past_key_values, hidden_states, attentions, flows, metrics: see `FlowNetworkModelOutput`.
    """

    flows: tuple[Flows, ...] | None = None
    metrics: dict[str, torch.Tensor] | None = None


class FeedForward(nn.Module):
    """Gated feed-forward network W_d (silu(W_g s) ⊙ W_u s)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))


class FlowNetworkLayer(GradientCheckpointingLayer):
    """Residual layer of flow and attention, memory attention, and feed-forward network.

    Args:
        config: sizes of the layer.
        input_size: number of input features; a projection forms the residual if it differs from `config.hidden_size`.
    """

    def __init__(self, config: FlowNetworkConfig, input_size: int | None = None):
        super().__init__()
        size = config.hidden_size
        input_size = size if input_size is None else input_size
        self.parallel = config.block_type == "flow_transformer"
        self.residual_proj = nn.Linear(input_size, size, bias=False) if input_size != size else nn.Identity()
        self.input_norm = RMSNorm(input_size, config.norm_eps)
        self.router = ContextAwareFlowRouter(
            input_size,
            config.flow_window,
            config.min_flow_window,
            config.base_sparsity,
            config.memory_chunk,
            config.memory_decay,
        )
        self.flow = FlowMixer(input_size, size, config.num_patterns, config.base_sparsity, config.flow_window)
        self.attention = SelfAttention(config, None if self.parallel else config.flow_window)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.out_proj = nn.Linear(size, size, bias=False)
        self.sequence_memory = self.memory_norm = self.memory_attention = None
        if config.memory_size:
            self.sequence_memory = SequenceMemory(size, config.memory_size, config.memory_chunk, config.memory_decay)
            self.memory_norm = RMSNorm(size, config.norm_eps)
            self.memory_attention = MemoryAttention(
                size, config.num_memory_heads, config.attention_dropout, config.norm_eps
            )
        self.mlp_norm = RMSNorm(size, config.norm_eps)
        self.mlp = FeedForward(size, config.intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.forward_chunk_length = forward_chunk_length(config.memory_chunk, block=max(1, config.flow_window - 1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        bank: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        rows: RowLayout,
        past_key_values: FlowCacheLayer | None = None,
        output_attentions: bool = False,
        output_flow: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Routes | None, dict[str, torch.Tensor]]:
        """Run the layer; long rows run in chunks to bound peak memory.

        Args:
            hidden_states: `[B, M, input_size]`.
            bank: slots of the memory bank, `[S, hidden_size]` or `[B, S, hidden_size]`, or None.
            rotary: cosines and sines, each `[B, M, rotated features]`.
            rows: `row_layout.RowLayout` of this call.
            past_key_values: cache layer, or None.
            output_attentions: whether to return the attention weights.
            output_flow: whether to return the flow.

        Returns:
            (states `[B, M, hidden_size]`; self-attention weights `[B, H, M, N]` or None; `Routes`, None if the rows
            ran in chunks; metrics).
        """
        can_chunk = rows.segment is None and (past_key_values is None or not torch.is_grad_enabled())
        is_long = hidden_states.shape[1] > self.forward_chunk_length
        if self.parallel or output_attentions or output_flow or not (can_chunk and is_long):
            return self._forward(rows, past_key_values, hidden_states, *rotary, bank, output_attentions, output_flow)
        forward = partial(self._forward, bank=bank)
        chunks = forward_in_chunks(forward, past_key_values, rows, self.forward_chunk_length, hidden_states, *rotary)
        hidden_states = torch.cat([states for _, (states, *_) in chunks], dim=1)
        return hidden_states, None, None, mean_metrics([(chunk, metrics) for chunk, (*_, metrics) in chunks])

    def _forward(
        self,
        rows: RowLayout,
        state: FlowCacheLayer | None,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        bank: torch.Tensor | None,
        output_attentions: bool = False,
        output_flow: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Routes, dict[str, torch.Tensor]]:
        """Run the layer on whole rows or on one chunk of them."""
        u = self.input_norm(hidden_states)
        routing = self.router(u, rows, state)
        flowed, flow, metrics = self.flow(u, routing, rows, state, output_flow)
        flowed = flowed.to(u.dtype)
        u = self.residual_proj(u)
        mixed = u + flowed
        y, weights = self.attention(u if self.parallel else mixed, (cos, sin), rows, state, output_attentions)
        y = y + flowed if self.parallel else y
        # Keep the dtype of the input: autocast would return bf16 to the next layer.
        residual = self.residual_proj(hidden_states).to(hidden_states.dtype)
        hidden_states = residual + self.dropout(self.out_proj(y * F.silu(self.gate_proj(mixed))))
        if self.memory_attention is not None:
            normed = self.memory_norm(hidden_states)
            with torch.autocast(u.device.type, enabled=False):
                slots, layout = self.sequence_memory(normed, rows, state)
            hidden_states = hidden_states + self.dropout(self.memory_attention(normed, bank, slots, layout))
        hidden_states = hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        metrics = metrics | {"window_mean": rows.mean(routing[0].detach())}
        return hidden_states, weights, (flow, *routing), metrics


def mean_metrics(chunks: list[tuple[RowLayout, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Average metrics of chunks, weighted by their numbers of real entities."""
    counts = torch.stack([chunk.token_mask().sum() for chunk, _ in chunks])
    weights = counts / counts.sum().clamp(min=1)
    return {name: (torch.stack([metrics[name] for _, metrics in chunks]) * weights).sum() for name in chunks[0][1]}


class FlowNetworkPreTrainedModel(PreTrainedModel):
    """Base class of the FlowNetwork models: initialisation and the update of the memory bank."""

    config: FlowNetworkConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlowNetworkLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_context_parallel = False
    _keep_in_fp32_modules = ["context_proj", "route_proj", "pattern_selector", "key_proj", "intensity_proj"]
    _keep_in_fp32_modules_strict = ["decay_logit", "memory_bank"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ChunkMemory):
            module.reset_parameters(std)
        elif isinstance(module, (FlowMixer, MemoryBank)):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def commit_memory(self) -> None:
        """Update the memory bank with the statistics that training forward passes staged since the last call.

        Call it once per optimizer step, in every process; `FlowMemoryCallback` does so for a `Trainer`. It does
        nothing if no memory parameter is trained, as with most PEFT configurations.
        """
        model: Any = self.base_model
        if model.memory is None:
            return
        if model.memory_trains:
            model.memory.commit()


class FlowNetworkModel(FlowNetworkPreTrainedModel):
    """FlowNetwork without a head: embeddings, layers, memory bank and final norm."""

    def __init__(self, config: FlowNetworkConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.rotary = RotaryEmbedding(config)
        self.memory = None
        if config.memory_size:
            self.memory = MemoryBank(config.hidden_size, config.memory_size, config.memory_bank_decay)
        self.layers = nn.ModuleList([FlowNetworkLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def memory_trains(self) -> bool:
        """Whether a parameter of the sequence memories is trained; the bank is updated only in that case."""
        memories: list[Any] = [layer.sequence_memory for layer in self.layers]
        return any(parameter.requires_grad for memory in memories for parameter in memory.parameters())

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
        output_flows: bool = False,
        output_metrics: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> FlowNetworkModelOutput:
        """Run the model on a batch of rows.

        Args:
            input_ids: int64 `[B, M]`; exactly one of `input_ids` and `inputs_embeds` is required.
            attention_mask: `[B, M]`, or `[B, columns before + M]` with a cache; 0 marks padding, at any position.
            position_ids: `[B, M]` or `[1, M]`. Positions follow from the mask; without a mask and a cache, positions
                that restart mark packed segments.
            past_key_values: `DynamicCache(config=model.config)` to continue from; updated in place.
            inputs_embeds: `[B, M, hidden_size]`.
            use_cache: whether to return the cache; defaults to `config.use_cache`. Disabled during gradient
                checkpointing.
            segment_ids: int64 `[B, M]`, ids of packed documents: a token sees its own segment only; negative ids mark
                padding.
            output_attentions: whether to return the self-attention weights, O(M²) memory.
            output_hidden_states: whether to return the states of every layer.
            output_flows: whether to return flow matrix, windows and fractions of every layer, O(M²) memory.
            output_metrics: whether to return metrics in evaluation mode.
            cache: name of `past_key_values` from transformers 5.24 on.
            kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, or `seq_idx`, also describe packed documents, as in
                transformers' recurrent models. Of several descriptions the first counts: `segment_ids`,
                `cu_seq_lens_q`, `seq_idx`, `position_ids`. Other names are ignored.

        Raises:
            ValueError: the inputs contradict each other; the message names them and the remedy.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        inputs_embeds = embed_inputs(self, input_ids, inputs_embeds)
        past_key_values = resolve_cache_argument(past_key_values, cache)
        is_plain = attention_mask is None and past_key_values is None
        segments = packed_documents(inputs_embeds.shape, segment_ids, position_ids, is_plain, **kwargs)
        rows, states, past_key_values = prepare_forward(
            self, inputs_embeds, attention_mask, segments, past_key_values, use_cache
        )
        hidden_states = rows.unpad(inputs_embeds)
        rotary = self.rotary(hidden_states, rows.segment_positions)
        # A copy: gradient checkpointing runs layers again in the backward pass, after `stage` and `commit`.
        bank = None if self.memory is None else self.memory.memory_bank.clone()
        collected = OutputCollector(
            rows, hidden_states=output_hidden_states, attentions=output_attentions, flows=output_flows, metrics=True
        )
        for layer, state in zip(self.layers[: config.num_hidden_layers], states, strict=True):
            hidden_states = collected.add_hidden_states(hidden_states)
            hidden_states, weights, routes, metrics = layer(
                hidden_states,
                bank,
                rotary,
                rows,
                past_key_values=state,
                output_attentions=output_attentions,
                output_flow=output_flows,
            )
            collected.add(attentions=weights, metrics=metrics)
            if output_flows:
                flow, window, fraction = routes
                collected.add(flows=pad_flows(flow, window, fraction, rows, state))
        hidden_states = apply_chunked(self.norm, hidden_states)
        metrics = mean_over_layers(collected.get("metrics"))
        if self.memory is not None:
            metrics["memory_write_norm"] = self._stage_memory(hidden_states, rows)
        hidden_states = rows.pad(hidden_states)
        collected.add(hidden_states=hidden_states)
        finish_forward(past_key_values, states)

        return FlowNetworkModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: past_key_values},
            hidden_states=collected.get("hidden_states"),
            attentions=collected.get("attentions"),
            flows=collected.get("flows"),
            metrics=metrics if output_metrics or self.training else None,
        )

    def _stage_memory(self, hidden_states: torch.Tensor, rows: RowLayout) -> torch.Tensor:
        """Stage states `[B, M, hidden_size]` for the bank if it is trained; return the norm of the update or 0."""
        # generate() must not update the bank, even in training mode.
        if self.training and torch.is_grad_enabled() and self.memory_trains:
            return self.memory.stage(hidden_states, rows)
        return self.memory.memory_bank.new_zeros(())


def mean_over_layers(metrics: tuple[dict[str, torch.Tensor], ...]) -> dict[str, torch.Tensor]:
    """Average scalar metrics over layers."""
    return {name: torch.stack([of_layer[name] for of_layer in metrics]).mean() for name in metrics[0]}


def pad_flows(
    flow: torch.Tensor,
    window: torch.Tensor,
    fraction: torch.Tensor,
    rows: RowLayout,
    state: FlowCacheLayer | None,
) -> Flows:
    """Convert one layer's `Routes` from rows and offsets to the columns of the input."""
    matrix = to_dense(flow.unsqueeze(1), rows.positions, int(rows.positions.max()) + 1)
    matrix = pad_attention(matrix, rows, state)[:, 0]
    return Flows(matrix, rows.pad(window), rows.pad(fraction))


class FlowNetworkForCausalLM(FlowGenerationMixin, FlowNetworkPreTrainedModel, GenerationMixin):
    """FlowNetwork with a next-token head.

    Example:
        >>> import torch
        >>> from dfn_hf import FlowNetworkConfig, FlowNetworkForCausalLM
        >>> model = FlowNetworkForCausalLM(FlowNetworkConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2))
        >>> input_ids = torch.randint(100, (2, 10))
        >>> model(input_ids, labels=input_ids).logits.shape
        torch.Size([2, 10, 100])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FlowNetworkConfig):
        super().__init__(config)
        self.model = FlowNetworkModel(config)
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
        output_flows: bool = False,
        output_metrics: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> FlowNetworkCausalLMOutput:
        """Compute next-token logits; the arguments that are not listed are those of `FlowNetworkModel.forward`.

        Args:
            labels: int64 `[B, M]`, usually the input ids. −100 is ignored, as is the first token of each packed
                document, whether the documents are described by `segment_ids`, `cu_seq_lens_q`, `seq_idx` or
                `position_ids`.
            logits_to_keep: number of last columns whose logits are computed, or the indices of these columns; 0 means
                all.
        """
        past_key_values = resolve_cache_argument(past_key_values, cache)
        outputs: FlowNetworkModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_flows=output_flows,
            output_metrics=output_metrics or labels is not None,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            is_plain = attention_mask is None and past_key_values is None
            segments = packed_documents(labels.shape, segment_ids, position_ids, is_plain, **kwargs)
            labels = next_token_labels(labels, segments)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return FlowNetworkCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            flows=outputs.flows,
            metrics=outputs.metrics,
        )


class FlowNetworkForSequenceClassification(LastTokenClassificationMixin, FlowNetworkPreTrainedModel):
    """FlowNetwork with a linear classification head on the last real token of each row."""

    def __init__(self, config: FlowNetworkConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = FlowNetworkModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = [
    "FlowNetworkForCausalLM",
    "FlowNetworkForSequenceClassification",
    "FlowNetworkModel",
    "FlowNetworkPreTrainedModel",
]
