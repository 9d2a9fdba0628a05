"""Llama with DFN's short convolution and gate, to separate their effect from that of the flow."""

from typing import Unpack

import torch
from torch import nn
from transformers import Cache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import TransformersKwargs

from dfn_hf.modeling.dfn.layers import identity_conv_init

CONV_KERNEL = 4


class ConvGatedAttention(LlamaAttention):
    """Attention over u = conv(x), a causal depthwise convolution; its output is multiplied by silu(W_g u).

    A training baseline without a cache: it raises a ValueError when it receives one.
    """

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.conv = nn.Conv1d(
            config.hidden_size, config.hidden_size, CONV_KERNEL, groups=config.hidden_size, bias=False
        )
        self.gate_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,  # its name since transformers 5.24
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `hidden_states` `[batch, length, hidden_size]` to an output with the same shape."""
        if past_key_values is not None or cache is not None:
            raise ValueError("past_key_values is given, but llama-conv has no cache: pass use_cache=False")
        assert position_embeddings is not None  # the decoder layer always passes them
        cos, sin = position_embeddings
        padded = nn.functional.pad(hidden_states.transpose(1, 2), (CONV_KERNEL - 1, 0))
        mixed = self.conv(padded).transpose(1, 2)
        head_shape = (*mixed.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(mixed).view(head_shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        gate = nn.functional.silu(self.gate_proj(mixed))
        return self.o_proj(output.reshape(gate.shape) * gate), weights


class ConvGatedLlamaModel(LlamaModel):
    """`LlamaModel` with `ConvGatedAttention` in every layer; convolutions are initialised as in DFN."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = ConvGatedAttention(config, index)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            init.copy_(module.weight, identity_conv_init(module.weight))


class ConvGatedLlamaForCausalLM(LlamaForCausalLM):
    """Causal language model over `ConvGatedLlamaModel`; use it with `use_cache=False`."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = ConvGatedLlamaModel(config)
        self.post_init()
