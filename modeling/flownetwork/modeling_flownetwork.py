"""FlowNetwork: pattern-based flow routing with adaptive sparsity, beside attention and memory.

A layer, for the states s of a row:

    u  = RMSNorm(s)
    f  = FlowMixer(u)                          windows and shares from ContextAwareFlowRouter(u)
    y  = Attention(u + f)                      over the flow's window        (`block_type="enhanced_flow"`)
    y  = Attention(u) + f                      over everything before        (`block_type="flow_transformer"`)
    s += W_o (y ⊙ silu(W_g (u + f)))
    s += MemoryAttention(RMSNorm(s))           over the model's bank and the slots that the row has filled so far
    s += feed-forward(RMSNorm(s))

Rows are left-aligned behind the model's boundary (`row_layout.py`); state lives in `cache.FlowCacheLayer`.

Shape letters: B batch, M entities of this call, N entities so far, H heads.
"""

from dataclasses import dataclass
from functools import partial

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
    next_token_labels,
    prepare_forward,
)
from ..modules.outputs import OutputCollector
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout, pad_attention
from ..modules.windowed_attention import RotaryEmbedding, SelfAttention
from ..ops.band import to_dense
from ..ops.chunking import apply_chunked
from .configuration_flownetwork import FlowNetworkConfig
from .memory import MemoryAttention, MemoryBank, SequenceMemory
from .routing import ContextAwareFlowRouter, FlowMixer


@dataclass
class Flows:
    """How one layer routed.

    Attributes:
        matrix: `[B, M, N]`, how much of each column flows into each column of this call.
        window: `[B, M]`, how far each looked back; share: `[B, M]`, of what it reached, how much the router kept.
    """

    matrix: torch.Tensor
    window: torch.Tensor
    share: torch.Tensor


@dataclass
class FlowNetworkModelOutput(BaseModelOutputWithPast):
    """
    Attributes:
        last_hidden_state: `[B, M, hidden_size]`, zero where padded.
        past_key_values: the state for continuation; named `cache` by transformers 5.24 and later.
        hidden_states: embeddings and each layer's output, the last one after the final norm.
        attentions: per layer the weights of the self-attention `[B, H, M, N]`.
        flows: per layer `Flows`.
        metrics: scalar tensors, means over layers and real tokens: `sparsity_kept` (kept of reachable),
            `pattern_entropy` in nats, `window_mean` in tokens; and `memory_write_norm`, what this batch will change in
            the bank (0 in eval, and where no gradients are taken).
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
    """W_d (silu(W_g s) ⊙ W_u s)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))


class FlowNetworkLayer(GradientCheckpointingLayer):
    """Flow with attention, memory, and a feed-forward network; each adds to the state.

    Args:
        input_size: features of what it reads if they are not `config.hidden_size`; a projection then joins the two.
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
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
        """Args: hidden_states `[B, M, input_size]`; bank: slots `[S, hidden_size]` or `[B, S, hidden_size]`, or None.

        Returns:
            (states `[B, M, hidden_size]`; weights of the self-attention or None; flow by offset, window and share;
            metrics).
        """
        can_split = rows.segment is None and (past_key_values is None or not torch.is_grad_enabled())
        long = hidden_states.shape[1] > self.forward_chunk_length
        if self.parallel or output_attentions or output_flow or not (can_split and long):
            return self._read(rows, past_key_values, hidden_states, *rotary, bank, output_attentions, output_flow)
        read = partial(self._read, bank=bank)
        spans = forward_in_chunks(read, past_key_values, rows, self.forward_chunk_length, hidden_states, *rotary)
        hidden_states = torch.cat([states for _, (states, *_) in spans], dim=1)
        return hidden_states, None, None, mean_metrics([(span, metrics) for span, (*_, metrics) in spans])

    def _read(
        self,
        rows: RowLayout,
        state: FlowCacheLayer | None,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        bank: torch.Tensor | None,
        output_attentions: bool = False,
        output_flow: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
        """The rows, or a span of them, at once."""
        u = self.input_norm(hidden_states)
        routing = self.router(u, rows, state)
        flowed, flow, metrics = self.flow(u, routing, rows, state, output_flow)
        flowed = flowed.to(u.dtype)
        u = self.residual_proj(u)
        met = u + flowed
        y, weights = self.attention(u if self.parallel else met, (cos, sin), rows, state, output_attentions)
        y = y + flowed if self.parallel else y
        # In the dtype it came in: autocast would hand the next layer bf16.
        residual = self.residual_proj(hidden_states).to(hidden_states.dtype)
        hidden_states = residual + self.dropout(self.out_proj(y * F.silu(self.gate_proj(met))))
        if self.memory_attention is not None:
            normed = self.memory_norm(hidden_states)
            with torch.autocast(u.device.type, enabled=False):
                slots, layout = self.sequence_memory(normed, rows, state)
            hidden_states = hidden_states + self.dropout(self.memory_attention(normed, bank, slots, layout))
        hidden_states = hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        metrics = metrics | {"window_mean": rows.mean(routing[0].detach())}
        return hidden_states, weights, (flow, *routing), metrics


def mean_metrics(spans: list[tuple[RowLayout, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Means over the real entities of spans → over those of the rows."""
    counts = torch.stack([span.token_mask().sum() for span, _ in spans])
    shares = counts / counts.sum().clamp(min=1)
    return {name: (torch.stack([one[name] for _, one in spans]) * shares).sum() for name in spans[0][1]}


class FlowNetworkPreTrainedModel(PreTrainedModel):
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
        """Write to the memory bank what forward passes in training have staged since the last call.

        To be called once per optimizer step, by every process (`FlowMemoryCallback` does it for a `Trainer`). Nothing
        happens where no memory trains, as under PEFT.
        """
        model = self.base_model
        if model.memory is None:
            return
        if model.memory_trains:
            model.memory.commit()


class FlowNetworkModel(FlowNetworkPreTrainedModel):
    """Embeddings, FlowNetwork layers, the memory bank and the final norm."""

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
        """Whether gradients train the memory of the layers; the bank is written only along with it."""
        return any(
            parameter.requires_grad for layer in self.layers for parameter in layer.sequence_memory.parameters()
        )

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
        output_flows: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> FlowNetworkModelOutput:
        """
        Args:
            input_ids: int64 `[B, M]`, or `inputs_embeds` `[B, M, hidden_size]`: exactly one of them.
            attention_mask: `[B, M]`, or `[B, columns before + M]` with a cache; 0 is padding, anywhere in a row.
            position_ids: `[B, M]` or `[1, M]`. Positions follow from the mask; without mask and cache, positions that
                start again mark packed segments.
            past_key_values: `DynamicCache(config=model.config)` to continue from; updated in place.
            use_cache: return the state; the config's value by default, never while gradients are checkpointed.
            segment_ids: int64 `[B, M]`, packed documents: a token sees its own segment only; negative is padding.
            output_attentions: return the weights of the self-attention, O(M²) memory.
            output_hidden_states: return the states of every layer.
            output_flows: return the flow matrix, windows and shares of every layer, O(M²) memory.
            cache: what transformers 5.24 and later call `past_key_values`.

        Raises:
            ValueError: inputs that do not fit together; the message names them and the remedy.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        inputs_embeds = embed_inputs(self, input_ids, inputs_embeds)
        past_key_values = resolve_cache_argument(past_key_values, cache)
        rows, states, past_key_values = prepare_forward(
            self, inputs_embeds, attention_mask, position_ids, segment_ids, past_key_values, use_cache
        )
        hidden_states = rows.unpad(inputs_embeds)
        rotary = self.rotary(hidden_states, rows.segment_positions)
        # Read before it is written: a checkpointed layer runs again in backward, and must see the same.
        bank = None if self.memory is None else self.memory.memory_bank.clone()
        collected = OutputCollector(
            rows,
            hidden_states=output_hidden_states,
            attentions=output_attentions,
            flows=output_flows,
            metrics=True,
        )
        for layer, state in zip(self.layers[: config.num_hidden_layers], states, strict=True):
            hidden_states = collected.add_hidden_states(hidden_states)
            hidden_states, weights, flow, metrics = layer(
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
                collected.add(flows=flows_to_columns(*flow, rows, state))
        hidden_states = apply_chunked(self.norm, hidden_states)
        per_layer = collected.get("metrics")
        metrics = {name: torch.stack([one[name] for one in per_layer]).mean() for name in per_layer[0]}
        if self.memory is not None:
            # generate() learns nothing, in training mode either.
            learns = self.training and torch.is_grad_enabled() and self.memory_trains
            metrics["memory_write_norm"] = self.memory.stage(hidden_states, rows) if learns else bank.new_zeros(())
        hidden_states = rows.pad(hidden_states)
        collected.add(hidden_states=hidden_states)
        finish_forward(past_key_values, states)

        return FlowNetworkModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: past_key_values},
            hidden_states=collected.get("hidden_states"),
            attentions=collected.get("attentions"),
            flows=collected.get("flows"),
            metrics=metrics,
        )


def flows_to_columns(flow, window, share, rows: RowLayout, state: FlowCacheLayer | None) -> Flows:
    """What a layer routed, of the rows and by offset → of the columns."""
    matrix = to_dense(flow.unsqueeze(1), rows.positions, int(rows.positions.max()) + 1)
    matrix = pad_attention(matrix, rows, state)[:, 0]
    return Flows(matrix, rows.pad(window), rows.pad(share))


class FlowNetworkForCausalLM(FlowGenerationMixin, FlowNetworkPreTrainedModel, GenerationMixin):
    """FlowNetwork with a next-token head."""

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
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        segment_ids: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_flows: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> FlowNetworkCausalLMOutput:
        """
        Args:
            labels: int64 `[B, M]`, the input ids themselves; −100 is not scored, nor is the first token of a segment.
            logits_to_keep: compute the last so many logits, or those at these columns; 0 is all.

        The others are those of `FlowNetworkModel.forward`.
        """
        outputs: FlowNetworkModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=resolve_cache_argument(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_flows=output_flows,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            labels = next_token_labels(labels, segment_ids)
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
    """FlowNetwork with a linear head on the last real token of each row."""

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
