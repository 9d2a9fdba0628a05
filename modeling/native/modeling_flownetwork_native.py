"""Functions of the original FlowNetworks, for converted checkpoints. They map tokens to logits; they are not language
models.

A flow layer is a linear map whose matrix depends on the token. With learnt patterns A_p `[out, in]`,

    W(x) = σ(b · x + c) Σ_p softmax_p(S x + t) A_p

F1  GELU(LayerNorm(sparse(W(x)) x + bias)); sparse keeps the tenth of the matrix with the largest magnitudes
F5  LayerNorm(GELU(W(x) x))
F4  as F5 for the embeddings; the weights of its layers also depend on the mean over the row. They have a second flow
    for word boundaries, and a feed-forward network

F1 and F5 mix no tokens; they have position embeddings. In F4 the means include later tokens, and the number of layers
that run depends on a mean over the batch, so that a row's logits depend on the other rows. Parameters have the names
of the original.

Shape letters: B batch, S tokens, D d_model, V vocab_size, P patterns, T tokens of any row.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from ..modules.forward_utils import check_ids
from .configuration_flownetwork_native import FlowNetworkNativeConfig

SPARSITY = 0.1  # fraction of a flow matrix that is kept
CHANNELS = 3  # pattern sets of an F4 layer
HIDDEN = 64  # width of the routing networks of F4
MIN_LAYERS = 2  # minimum number of layers of F4 that run
SORT_CHUNK = 2**22  # matrix entries per chunk; bounds peak memory


@dataclass
class FlowNetworkNativeOutput(ModelOutput):
    """
    Attributes:
        logits: `[B, S, vocab_size]`.
    """

    logits: torch.Tensor | None = None


def mix_patterns(patterns: torch.Tensor, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Compute Σ_p w_p A_p x: patterns `[P, out, in]`, weights `[B, S, P]`, x `[B, S, in]` → `[B, S, out]`."""
    mixed = weights[..., :1] * F.linear(x, patterns[0])
    for number in range(1, len(patterns)):
        mixed = mixed + weights[..., number, None] * F.linear(x, patterns[number])
    return mixed


class FlowRouter(nn.Module):
    """Dense flow W(x) x."""

    def __init__(self, config: FlowNetworkNativeConfig, input_dim: int, output_dim: int):
        super().__init__()
        self.flow_patterns = nn.Parameter(torch.empty(config.num_patterns, output_dim, input_dim))
        self.pattern_selector = nn.Sequential(nn.Linear(input_dim, config.num_patterns), nn.Softmax(dim=-1))
        self.flow_intensity = nn.Sequential(nn.Linear(input_dim, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, in]` → `[B, S, out]`."""
        return mix_patterns(self.flow_patterns, self.pattern_selector(x), x) * self.flow_intensity(x)


class SparseFlowRouter(FlowRouter):
    """Sparse flow sparse(W(x)) x."""

    def __init__(self, config: FlowNetworkNativeConfig, input_dim: int, output_dim: int):
        super().__init__(config, input_dim, output_dim)
        entries = input_dim * output_dim
        self.kept = entries if entries <= config.dense_limit else max(1, int(entries * SPARSITY))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, in]` → `[B, S, out]`."""
        tokens = max(1, SORT_CHUNK // self.flow_patterns[0].numel())
        return torch.cat([self._flow(chunk) for chunk in x.flatten(0, 1).split(tokens)]).unflatten(0, x.shape[:2])

    def _flow(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, in]` → `[T, out]`."""
        matrix = self.pattern_selector(x) @ self.flow_patterns.flatten(1) * self.flow_intensity(x)
        kept = matrix.abs().topk(self.kept, dim=-1).indices
        matrix = torch.zeros_like(matrix).scatter(-1, kept, matrix.gather(-1, kept))
        return (matrix.unflatten(-1, self.flow_patterns.shape[1:]) @ x.unsqueeze(-1)).squeeze(-1)


class SparseFlowLayer(nn.Module):
    """Layer of F1."""

    def __init__(self, config: FlowNetworkNativeConfig, input_dim: int, output_dim: int):
        super().__init__()
        self.flow_router = SparseFlowRouter(config, input_dim, output_dim)
        self.bias = nn.Parameter(torch.empty(output_dim))
        self.layer_norm = nn.LayerNorm(output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, in]` → `[B, S, out]`."""
        return F.gelu(self.layer_norm(self.flow_router(x) + self.bias))


class FlowLayer(nn.Module):
    """Layer of F5, and embedding layer of F4."""

    def __init__(self, config: FlowNetworkNativeConfig, input_dim: int, output_dim: int):
        super().__init__()
        self.router = FlowRouter(config, input_dim, output_dim)
        self.norm = nn.LayerNorm(output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, in]` → `[B, S, out]`."""
        return self.norm(F.gelu(self.router(x)))


class ChannelRouter(nn.Module):
    """Flow whose pattern weights depend on the token and the row mean; the row mean mixes three pattern sets."""

    def __init__(self, config: FlowNetworkNativeConfig, input_dim: int, output_dim: int):
        super().__init__()
        patterns, context = max(1, config.num_patterns // CHANNELS), min(input_dim, output_dim)
        self.channel_patterns = nn.ParameterList(
            [nn.Parameter(torch.empty(patterns, output_dim, input_dim)) for _ in range(CHANNELS)]
        )
        self.channel_mixer = nn.Sequential(
            nn.Linear(input_dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, CHANNELS), nn.Softmax(dim=-1)
        )
        self.context_projection = nn.Linear(input_dim, context)
        self.context_selector = nn.Sequential(nn.Linear(input_dim + context, patterns), nn.Softmax(dim=-1))
        self.flow_intensity = nn.Sequential(nn.Linear(input_dim, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, in]` → `[B, S, out]`."""
        mean = x.mean(dim=1, keepdim=True)
        context = self.context_projection(mean).expand(-1, x.shape[1], -1)
        weights = self.context_selector(torch.cat([x, context], dim=-1))
        channel_weights = self.channel_mixer(mean).unbind(dim=-1)
        channels = zip(self.channel_patterns, channel_weights, strict=True)
        flow = sum(mix_patterns(patterns, weights, x) * factor[..., None] for patterns, factor in channels)
        return flow * self.flow_intensity(x)


class BoundaryRouter(nn.Module):
    """Blend of two linear maps, one for word boundaries and one for other tokens, by the boundary probability."""

    def __init__(self, width: int):
        super().__init__()
        self.patterns = nn.Parameter(torch.empty(2, width, width))
        self.classifier = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor, boundaries: torch.Tensor | None) -> torch.Tensor:
        """Apply the blended map.

        Args:
            x: `[B, S, width]`.
            boundaries: `[B, S, 1]`, 1 at word boundaries; None uses the classifier's probabilities.

        Returns:
            `[B, S, width]`.
        """
        probability = self.classifier(x) if boundaries is None else boundaries
        inside, between = (F.linear(x, pattern) for pattern in self.patterns)
        return (1 - probability) * inside + probability * between


class EnhancedFlowLayer(nn.Module):
    """Layer of F4; it has a residual only if input and output have the same width."""

    def __init__(self, config: FlowNetworkNativeConfig, input_dim: int, output_dim: int):
        super().__init__()
        self.has_residual = input_dim == output_dim
        self.norm1 = nn.LayerNorm(input_dim)
        self.norm2 = nn.LayerNorm(output_dim)
        self.flow_router = ChannelRouter(config, input_dim, output_dim)
        self.spatial_router = BoundaryRouter(output_dim)
        self.ffn = nn.Sequential(
            nn.Linear(output_dim, 4 * output_dim),
            nn.GELU(),
            nn.Linear(4 * output_dim, output_dim),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: torch.Tensor, boundaries: torch.Tensor | None = None) -> torch.Tensor:
        """Run the layer.

        Args:
            x: `[B, S, in]`.
            boundaries: as for `BoundaryRouter`.

        Returns:
            `[B, S, out]`.
        """
        flow = self.flow_router(self.norm1(x))
        flow = flow + self.spatial_router(flow, boundaries)
        x = self.norm2(x + flow if self.has_residual else flow)
        return x + self.ffn(x)


LAYERS = {"F1": SparseFlowLayer, "F4": EnhancedFlowLayer, "F5": FlowLayer}


class FlowNetworkNativePreTrainedModel(PreTrainedModel):
    """Base class of `FlowNetworkNativeModel`: initialisation and loading."""

    config: FlowNetworkNativeConfig
    _no_split_modules = ["SparseFlowLayer", "FlowLayer", "EnhancedFlowLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FlowRouter):
            init.normal_(module.flow_patterns, std=0.1)
        elif isinstance(module, nn.ParameterList):
            for patterns in module:
                init.normal_(patterns, std=0.05)
        elif isinstance(module, BoundaryRouter):
            init.normal_(module.patterns, std=0.05)
        elif isinstance(module, SparseFlowLayer):
            init.zeros_(module.bias)
        elif isinstance(module, FlowNetworkNativeModel):
            init.ones_(module.global_flow_gate)
            if module.config.memory_size:
                init.constant_(module.memory_gate, 0.3)
                init.normal_(module.global_memory, std=0.1)
        else:
            super()._init_weights(module)


class FlowNetworkNativeModel(FlowNetworkNativePreTrainedModel):
    """The original `FlowNetwork` (F1, F5) or `EnhancedFlowTransformer` (F4)."""

    norm_embedding: nn.Module
    final_norm: nn.Module
    embedding_flow: nn.Module
    global_memory: torch.Tensor

    def __init__(self, config: FlowNetworkNativeConfig):
        super().__init__(config)
        width, layer = config.d_model, LAYERS[config.version]
        self.global_flow_gate = nn.Parameter(torch.empty(1))
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.pos_embedding = self.adaptive_controller = None
        self.norm_embedding = self.final_norm = nn.Identity()
        if config.version == "F4":
            self.embedding_flow = FlowLayer(config, width, width)
            self.norm_embedding = nn.LayerNorm(width)
            self.final_norm = nn.LayerNorm(width)
            self.adaptive_controller = nn.Sequential(
                nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1), nn.Sigmoid()
            )
        else:
            self.pos_embedding = nn.Embedding(config.max_seq_len, width)
            self.embedding_flow = layer(config, 2 * width, width)
        if config.memory_size:
            self.memory_gate = nn.Parameter(torch.empty(1))
            self.register_buffer("global_memory", torch.empty(config.memory_size, width))
        self.flow_layers = nn.ModuleList([layer(config, width, width) for _ in range(config.num_layers)])
        self.output_flow = layer(config, width, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> FlowNetworkNativeOutput:
        """Compute logits.

        Args:
            input_ids: int64 `[B, S]`; in F1 and F5, S is at most `max_seq_len`.
            attention_mask: ignored, as in the original; for F4, pass rows of equal length without padding.

        Raises:
            ValueError: no tokens, too many tokens, or ids outside the vocabulary.
        """
        config = self.config
        check_ids(input_ids, config.vocab_size, "input_ids")
        if not input_ids.numel():
            raise ValueError(f"`input_ids` of shape {list(input_ids.shape)} is empty; pass at least one token.")
        x = self.token_embedding(input_ids)
        if self.pos_embedding is not None:
            length = input_ids.shape[1]
            if length > config.max_seq_len:
                raise ValueError(
                    f"`input_ids` has {length} tokens per row, but there are {config.max_seq_len} position embeddings "
                    "(`max_seq_len`): pass shorter rows."
                )
            positions = self.pos_embedding(torch.arange(length, device=x.device))
            x = torch.cat([x, positions.expand_as(x)], dim=-1)
        x = self.dropout(self.norm_embedding(self.embedding_flow(x))) * self.global_flow_gate
        boundaries: tuple[torch.Tensor, ...] = ()
        if config.boundary_token_ids:
            known = torch.tensor(config.boundary_token_ids, device=x.device)
            boundaries = (torch.isin(input_ids, known).unsqueeze(-1).to(x.dtype),)
        for layer in self.flow_layers[: self._active_layers(x)]:
            x = self.dropout(layer(x, *boundaries))
        return FlowNetworkNativeOutput(logits=self.output_flow(self.final_norm(x)))

    def _active_layers(self, x: torch.Tensor) -> int:
        """Return the number of layers that run for states `[B, S, D]`; F4 synchronises with the device."""
        number = self.config.num_layers
        if self.adaptive_controller is None:
            return number
        wanted = float(self.adaptive_controller(x.mean(dim=1)).detach().mean() * number)
        if not math.isfinite(wanted):
            return number
        # The original rounds down twice: number · (n / number) can be slightly below n.
        return max(MIN_LAYERS, int(number * (int(wanted) / number)))


__all__ = ["FlowNetworkNativeModel", "FlowNetworkNativePreTrainedModel"]
