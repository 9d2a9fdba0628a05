"""The original FlowNetworks' functions, for converted checkpoints: logits from tokens; no language models.

A flow layer is a linear map whose matrix a token chooses for itself: of learnt patterns A_p `[out, in]`,

    W(x) = σ(b · x + c) Σ_p softmax_p(S x + t) A_p

F1  LayerNorm(sparse(W(x)) x + bias), then GELU; of the matrix the tenth with the largest entries stays
F5  LayerNorm(GELU(W(x) x))
F4  the same for embeddings; its layers choose by the mean over the row too, have a second flow that tells words'
    boundaries, and a feed-forward network

Nothing passes between tokens in F1 and F5, which have an embedding of the place. In F4 the means see the whole row,
the future included, and how many layers run hangs on a mean over the batch: a row's logits depend on the other rows.
Parameters have the original's names.

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

SPARSITY = 0.1  # share of a flow matrix that stays
CHANNELS = 3  # sets of patterns of a layer of F4, mixed by the mean over the row
HIDDEN = 64  # of the small networks of F4 that decide something
MIN_LAYERS = 2  # of F4 that always run
SORT_CHUNK = 2**22  # of flow matrices that are held at a time


@dataclass
class FlowNetworkNativeOutput(ModelOutput):
    """
    Attributes:
        logits: `[B, S, vocab_size]`.
    """

    logits: torch.Tensor | None = None


def mix_patterns(patterns: torch.Tensor, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Σ_p w_p A_p x: `[P, out, in]`, `[B, S, P]`, `[B, S, in]` → `[B, S, out]`."""
    mixed = weights[..., :1] * F.linear(x, patterns[0])
    for number in range(1, len(patterns)):
        mixed = mixed + weights[..., number, None] * F.linear(x, patterns[number])
    return mixed


class FlowRouter(nn.Module):
    """W(x) x."""

    def __init__(self, config: FlowNetworkNativeConfig, input_dim: int, output_dim: int):
        super().__init__()
        self.flow_patterns = nn.Parameter(torch.empty(config.num_patterns, output_dim, input_dim))
        self.pattern_selector = nn.Sequential(nn.Linear(input_dim, config.num_patterns), nn.Softmax(dim=-1))
        self.flow_intensity = nn.Sequential(nn.Linear(input_dim, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, in]` → `[B, S, out]`."""
        return mix_patterns(self.flow_patterns, self.pattern_selector(x), x) * self.flow_intensity(x)


class SparseFlowRouter(FlowRouter):
    """sparse(W(x)) x."""

    def __init__(self, config: FlowNetworkNativeConfig, input_dim: int, output_dim: int):
        super().__init__(config, input_dim, output_dim)
        entries = input_dim * output_dim
        self.kept = entries if entries <= config.dense_limit else max(1, int(entries * SPARSITY))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, in]` → `[B, S, out]`."""
        tokens = max(1, SORT_CHUNK // self.flow_patterns[0].numel())
        return torch.cat([self._flow(some) for some in x.flatten(0, 1).split(tokens)]).unflatten(0, x.shape[:2])

    def _flow(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, in]` → `[T, out]`."""
        matrix = self.pattern_selector(x) @ self.flow_patterns.flatten(1) * self.flow_intensity(x)
        kept = matrix.abs().topk(self.kept, dim=-1).indices
        matrix = torch.zeros_like(matrix).scatter(-1, kept, matrix.gather(-1, kept))
        return (matrix.unflatten(-1, self.flow_patterns.shape[1:]) @ x.unsqueeze(-1)).squeeze(-1)


class SparseFlowLayer(nn.Module):
    """The layer of F1."""

    def __init__(self, config: FlowNetworkNativeConfig, input_dim: int, output_dim: int):
        super().__init__()
        self.flow_router = SparseFlowRouter(config, input_dim, output_dim)
        self.bias = nn.Parameter(torch.empty(output_dim))
        self.layer_norm = nn.LayerNorm(output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, in]` → `[B, S, out]`."""
        return F.gelu(self.layer_norm(self.flow_router(x) + self.bias))


class FlowLayer(nn.Module):
    """The layer of F5, and of F4 for embeddings."""

    def __init__(self, config: FlowNetworkNativeConfig, input_dim: int, output_dim: int):
        super().__init__()
        self.router = FlowRouter(config, input_dim, output_dim)
        self.norm = nn.LayerNorm(output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, in]` → `[B, S, out]`."""
        return self.norm(F.gelu(self.router(x)))


class ChannelRouter(nn.Module):
    """A flow whose patterns the token and the mean over the row choose; the mean alone mixes channels of patterns."""

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
        shares = self.channel_mixer(mean).unbind(dim=-1)
        channels = zip(self.channel_patterns, shares, strict=True)
        flow = sum(mix_patterns(patterns, weights, x) * share[..., None] for patterns, share in channels)
        return flow * self.flow_intensity(x)


class BoundaryRouter(nn.Module):
    """One linear map for tokens that separate words, one for the others, blended by how likely a token is either."""

    def __init__(self, width: int):
        super().__init__()
        self.patterns = nn.Parameter(torch.empty(2, width, width))
        self.classifier = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor, boundaries: torch.Tensor | None) -> torch.Tensor:
        """`[B, S, width]` → the same; boundaries: `[B, S, 1]`, 1 where known to be one, or None: it guesses."""
        share = self.classifier(x) if boundaries is None else boundaries
        inside, between = (F.linear(x, pattern) for pattern in self.patterns)
        return (1 - share) * inside + share * between


class EnhancedFlowLayer(nn.Module):
    """The layer of F4; its input is added only where it is as wide as the output."""

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
        """`[B, S, in]` → `[B, S, out]`; boundaries: as for `BoundaryRouter`."""
        flow = self.flow_router(self.norm1(x))
        flow = flow + self.spatial_router(flow, boundaries)
        x = self.norm2(x + flow if self.has_residual else flow)
        return x + self.ffn(x)


LAYERS = {"F1": SparseFlowLayer, "F4": EnhancedFlowLayer, "F5": FlowLayer}


class FlowNetworkNativePreTrainedModel(PreTrainedModel):
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
        """
        Args:
            input_ids: int64 `[B, S]`; in F1 and F5 S is at most `max_seq_len`.
            attention_mask: not read, as in the original: give F4 rows of one length, without padding.

        Raises:
            ValueError: no or too many tokens, or ids outside the vocabulary.
        """
        config = self.config
        check_ids(input_ids, config.vocab_size, "input_ids")
        if not input_ids.numel():
            raise ValueError(f"The input is empty: `input_ids` is {list(input_ids.shape)}. Pass at least one token.")
        x = self.token_embedding(input_ids)
        if self.pos_embedding is not None:
            length = input_ids.shape[1]
            if length > config.max_seq_len:
                raise ValueError(
                    f"`input_ids` holds {length} tokens per row, but there are embeddings for {config.max_seq_len} "
                    "places (`max_seq_len`): pass shorter rows."
                )
            places = self.pos_embedding(torch.arange(length, device=x.device))
            x = torch.cat([x, places.expand_as(x)], dim=-1)
        x = self.dropout(self.norm_embedding(self.embedding_flow(x))) * self.global_flow_gate
        boundaries = ()
        if config.boundary_token_ids:
            known = torch.tensor(config.boundary_token_ids, device=x.device)
            boundaries = (torch.isin(input_ids, known).unsqueeze(-1).to(x.dtype),)
        for layer in self.flow_layers[: self._active_layers(x)]:
            x = self.dropout(layer(x, *boundaries))
        return FlowNetworkNativeOutput(logits=self.output_flow(self.final_norm(x)))

    def _active_layers(self, x: torch.Tensor) -> int:
        """How many layers run for states `[B, S, D]`; in F4 it synchronises with the device."""
        number = self.config.num_layers
        if self.adaptive_controller is None:
            return number
        wanted = float(self.adaptive_controller(x.mean(dim=1)).detach().mean() * number)
        if not math.isfinite(wanted):
            return number
        # Twice rounded down, as the original does: number · (n / number) may lie just below n.
        return max(MIN_LAYERS, int(number * (int(wanted) / number)))


__all__ = ["FlowNetworkNativeModel", "FlowNetworkNativePreTrainedModel"]
