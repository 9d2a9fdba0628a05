"""API of the FlowNetwork paper: the layers and models of this package, constructed from sizes.

    model = FlowNetwork(vocab_size=30000, d_model=512, num_layers=8, max_seq_len=2048)
    logits, metrics = model(ids)

`model.causal_lm` is the underlying `FlowNetworkForCausalLM`; use it for training, generation and the Hub.
`adjust_num_heads` lowers a number of heads that does not divide the width.
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
    """Convert a tensor with one finite element to int, truncating; return `default` and log a warning for any other
    tensor.

    Synchronises with the device, so do not call it in a forward pass.
    """
    if tensor.numel() == 1 and math.isfinite(tensor.item()):
        return int(tensor.item())
    logger.warning(f"A tensor of shape {list(tensor.shape)} is not one finite number; using the default {default}.")
    return default


class EnhancedFlowLayer(nn.Module):
    """Flow with self-attention, cross-attention to a memory, and a feed-forward network (FlowNetwork paper).

    Args:
        input_dim: number of input features.
        output_dim: number of output features; a projection forms the residual if it differs from `input_dim`.
        num_patterns: number of flow patterns.
        num_heads: number of heads of the self-attention and of the memory attention; lowered to a divisor of
            `output_dim`.
        dropout: dropout rate on the output of each sub-block.
        memory_size: number of slots of the sequence memory; 0 disables it.
        flow_window: number of most recent entities that can flow into an entity.
        base_sparsity: base fraction of the reachable entities that flow into an entity, in (0, 1].

    Raises:
        ValueError: a size is below 1, or a value is out of range.

    Example:
        >>> import torch
        >>> from dfn_hf import EnhancedFlowLayer
        >>> layer = EnhancedFlowLayer(input_dim=32, output_dim=64)
        >>> out, metrics = layer(torch.randn(2, 10, 32))
        >>> out.shape
        torch.Size([2, 10, 64])
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
            attn_implementation="sdpa",  # type: ignore[call-arg]  # a keyword of PreTrainedConfig, without a field
        )
        self.rotary = RotaryEmbedding(config)
        self.layer = FlowNetworkLayer(config, input_dim)
        if self.layer.sequence_memory is not None:
            self.layer.sequence_memory.reset_parameters(config.initializer_range)

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run the layer causally over whole rows.

        Args:
            x: `[batch, length, input_dim]`, rows without padding.
            memory: slots to attend to in addition to the sequence memory, `[slots, output_dim]` or
                `[batch, slots, output_dim]`, or None.

        Returns:
            (states `[batch, length, output_dim]`; metrics as in `FlowNetworkModelOutput`).

        Raises:
            ValueError: `memory` is given and `memory_size` is 0.
        """
        if memory is not None and self.layer.memory_attention is None:
            raise ValueError("`memory` requires a layer with memory, but `memory_size` is 0: set it to at least 1.")
        rows = make_row_layout(x.shape[0], x.shape[1], x.device)
        out, _, _, metrics = self.layer(x, memory, self.rotary(x, rows.segment_positions), rows)
        return out, metrics


class FlowNetwork(nn.Module):
    """Causal language model with windowed attention (FlowNetwork paper); cost is linear in the length.

    `causal_lm` is the underlying `FlowNetworkForCausalLM`, which generates, saves and loads.

    Args:
        vocab_size: number of tokens in the vocabulary.
        d_model: width of the hidden states.
        num_layers: number of layers.
        max_seq_len: intended maximum length in tokens.
        dropout: dropout rate on the output of each sub-block.
        num_patterns: number of flow patterns per layer.
        num_heads: number of attention heads; lowered to a divisor of `d_model`.

    Raises:
        ValueError: a size is below 1, or a value is out of range.

    Example:
        >>> import torch
        >>> from dfn_hf import FlowNetwork
        >>> model = FlowNetwork(vocab_size=100, d_model=64, num_layers=2)
        >>> logits, metrics = model(torch.randint(100, (2, 10)))
        >>> logits.shape
        torch.Size([2, 10, 100])
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
        """Compute next-token logits.

        Args:
            input_ids: int64 `[batch, length]`.

        Returns:
            (logits `[batch, length, vocab_size]`; metrics as in `FlowNetworkModelOutput`).
        """
        outputs = self.causal_lm(input_ids, use_cache=False, output_metrics=True)
        return outputs.logits, outputs.metrics

    def commit_memory(self) -> None:
        """Update the memory bank; call once per optimizer step. See `FlowNetworkPreTrainedModel.commit_memory`."""
        self.causal_lm.commit_memory()


class EnhancedFlowTransformer(FlowNetwork):
    """Causal language model with full attention and flow in parallel branches (FlowNetwork paper).

    Takes the arguments of `FlowNetwork`.
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
    """Return 8/3 of the width: a gated network then has as many weights as an ungated one of 4 times the width."""
    return max(1, round(8 * width / 3))
