"""The interface of the FlowNetwork paper: the same layers, built from sizes in the place of a configuration.

    model = FlowNetwork(vocab_size=30000, d_model=512, num_layers=8, max_seq_len=2048)
    logits, metrics = model(ids)

For training, generation and the Hub take `model.causal_lm`, a `FlowNetworkForCausalLM` of the same weights. Numbers of
heads that do not divide a width are lowered to one that does (`adjust_num_heads`).
"""

import math

import torch
from torch import nn
from transformers.utils import logging

from ..modules.row_layout import make_row_layout
from ..modules.windowed_attention import RotaryEmbedding
from .configuration_flownetwork import FlowNetworkConfig, adjust_num_heads
from .modeling_flownetwork import FlowNetworkForCausalLM, FlowNetworkLayer
from .routing import check_sizes

logger = logging.get_logger(__name__)


def safe_tensor_to_int(tensor: torch.Tensor, default: int) -> int:
    """A tensor of one finite element as int, truncated; anything else is the default, and logged.

    Synchronises with the device: not for a forward pass.
    """
    if tensor.numel() == 1 and math.isfinite(tensor.item()):
        return int(tensor.item())
    logger.warning(f"A tensor of shape {list(tensor.shape)} is no finite number: taking {default}.")
    return default


class EnhancedFlowLayer(nn.Module):
    """Flow with self-attention, cross-attention to a memory, and a feed-forward network.

    Args:
        input_dim, output_dim: features of what it reads and gives; a projection joins them where they differ.
        num_patterns: flow patterns; num_heads: of the self-attention and of the memory, lowered to what divides
            `output_dim`.
        dropout: on what each block adds; memory_size: slots of the memory of the sequence, 0 for none.
        flow_window: most recent entities that can flow into one.
        base_sparsity: share of the reachable entities that flow into one.

    Raises:
        ValueError: a size below 1, or a value out of range.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_patterns: int = 16,
        num_heads: int = 8,
        *,
        dropout: float = 0.1,
        memory_size: int = 16,
        flow_window: int = 128,
        base_sparsity: float = 0.1,
    ):
        super().__init__()
        check_sizes(input_dim=input_dim, output_dim=output_dim, num_heads=num_heads)
        num_heads = adjust_num_heads(output_dim, num_heads)
        config = FlowNetworkConfig(
            hidden_size=output_dim,
            num_attention_heads=num_heads,
            num_memory_heads=num_heads,
            intermediate_size=feed_forward_size(output_dim),
            num_patterns=num_patterns,
            base_sparsity=base_sparsity,
            flow_window=flow_window,
            min_flow_window=min(8, flow_window),
            memory_size=memory_size,
            hidden_dropout=dropout,
            attn_implementation="sdpa",
        )
        self.rotary = RotaryEmbedding(config)
        self.layer = FlowNetworkLayer(config, input_dim)
        if self.layer.sequence_memory is not None:
            self.layer.sequence_memory.reset_parameters(config.initializer_range)

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`[batch, length, input_dim]` → (`[batch, length, output_dim]`, metrics).

        Args:
            x: rows without padding; causal: a place sees itself and what is before it.
            memory: `[slots, output_dim]` or `[batch, slots, output_dim]` to attend to, beside the sequence's own.

        Raises:
            ValueError: `memory` for a layer whose `memory_size` is 0.
        """
        if memory is not None and self.layer.memory_attention is None:
            raise ValueError("`memory` needs a layer with memory: `memory_size` is 0, make it at least 1.")
        rows = make_row_layout(*x.shape[:2], x.device)
        out, _, _, metrics = self.layer(x, memory, self.rotary(x, rows.segment_positions), rows)
        return out, metrics


class FlowNetwork(nn.Module):
    """A whole causal model with windowed attention: cost grows with the length, not with its square.

    `causal_lm` is the `FlowNetworkForCausalLM` inside, which generates, saves and loads.

    Args:
        vocab_size, d_model, num_layers: sizes; max_seq_len: longest input that it is meant for.
        num_patterns: flow patterns; num_heads: lowered to what divides `d_model`.
        dropout: on what each block adds.

    Raises:
        ValueError: a size below 1, or a value out of range.
    """

    block_type = "enhanced_flow"

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        num_layers: int = 6,
        max_seq_len: int = 2048,
        dropout: float = 0.1,
        num_patterns: int = 8,
        num_heads: int = 8,
    ):
        super().__init__()
        check_sizes(
            vocab_size=vocab_size,
            d_model=d_model,
            num_layers=num_layers,
            max_seq_len=max_seq_len,
            num_patterns=num_patterns,
            num_heads=num_heads,
        )
        num_heads = adjust_num_heads(d_model, num_heads)
        self.causal_lm = FlowNetworkForCausalLM(
            FlowNetworkConfig(
                block_type=self.block_type,
                vocab_size=vocab_size,
                hidden_size=d_model,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                num_memory_heads=num_heads,
                intermediate_size=feed_forward_size(d_model),
                num_patterns=num_patterns,
                hidden_dropout=dropout,
                max_position_embeddings=max_seq_len,
            )
        )

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """int64 `[batch, length]` → (logits `[batch, length, vocab_size]`, metrics)."""
        outputs = self.causal_lm(input_ids, use_cache=False)
        return outputs.logits, outputs.metrics

    def commit_memory(self) -> None:
        """As `FlowNetworkForCausalLM.commit_memory`: once per optimizer step."""
        self.causal_lm.commit_memory()


class EnhancedFlowTransformer(FlowNetwork):
    """A whole causal model whose attention sees everything before, with flow in a branch beside it.

    Args:
        those of `FlowNetwork`.
    """

    block_type = "flow_transformer"

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        num_layers: int = 8,
        max_seq_len: int = 4096,
        dropout: float = 0.1,
        num_patterns: int = 16,
        num_heads: int = 8,
    ):
        super().__init__(vocab_size, d_model, num_layers, max_seq_len, dropout, num_patterns, num_heads)


def feed_forward_size(width: int) -> int:
    """8/3 of the width: a gated network of as many weights as a plain one of four times the width."""
    return max(1, round(8 * width / 3))
