"""One DFN layer: norm, short convolution, flow attention, Dynamic Field MLP.

For each entity i with state s_i:

    u_i  = short convolution of FlowNorm(s), causal or two-sided
    p_i  = W_p u_i + W_c c_i,  f_i = W_f u_i            rest position and flow, per head; c_i: coordinates, if any
    k_i  = ball(p_i),  q_i = ball(p_i + α f_i)          key: rest position; query: moved position
    ℓ_ij = −γ ‖q_i − k_j‖² + w_j − λ log(1 + |i − j|)   Gaussian affinity, influence with log mass, power-law decay
    y_i  = Σ_j softmax(ℓ_i)_j W_v u_j                   over the local window and the nearest predecessors beyond it;
                                                        with `is_causal=False`, over both sides
    s_i += W_o (y_i ⊙ silu(W_g u_i)),   s_i += DynamicFieldMLP(FlowNorm(s_i), y_i)

`ball` is `entities.squash_to_ball`. Shape letters: B batch, M entities of this call, H heads, P position_dim,
F coordinate features, N stored entities.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modules.cache import FlowCacheLayer
from ..modules.causal_conv import CausalConv
from ..modules.linear import linear_in_weight_dtype
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout
from ..ops.chunking import apply_chunked
from .attention import DynamicFlowAttention
from .configuration_dfn import DFNConfig
from .entities import Entities, unit_variance_linear


class FlowNorm(nn.Module):
    """FlowNorm(s) = s / sqrt(E‖f‖² + ε) (Dynamic Flow Networks (Stürtz), §2.3).

    Built as g ⊙ s · rsqrt(E[mean(f²) + 1e-2 mean(s²)] + ε) with f = W_n s. The norm has its own flow map W_n, because
    the layer's flow is computed from normalised states. The term 1e-2 mean(s²) bounds the output when the flow
    vanishes. E is over the entity itself or, with `flow_norm="running"`, over the entities of its segment up to it;
    with `is_causal=False`, over the whole segment.

    Args:
        name: name of the running sums in the cache.

    Example:
        >>> import torch
        >>> from dfn_hf import DFNConfig, DFNModel
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> norm = DFNModel(DFNConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)).layers[0].flow_norm
        >>> states = 50 * torch.randn(2, 10, 16)
        >>> norm(states, make_row_layout(2, 10, states.device), state=None).shape
        torch.Size([2, 10, 16])
    """

    def __init__(self, config: DFNConfig, name: str):
        super().__init__()
        self.name = name
        self.running = config.flow_norm == "running"
        self.is_causal = config.is_causal
        self.flow_map = unit_variance_linear(config.hidden_size, config.num_attention_heads * config.position_dim)
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.norm_eps

    def forward(self, states: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        """Normalise states `[B, M, hidden_size]`; `state` is the layer's cache, or None."""
        energy = apply_chunked(self._energy, states)
        if self.running:
            energy = self._running_mean(energy, rows, state) if self.is_causal else rows.segment_mean(energy)
        return apply_chunked(self._scale, states, energy)

    def _energy(self, states: torch.Tensor) -> torch.Tensor:
        """mean(f²) + 1e-2 mean(s²), `[B, M, 1]`, in float32 or float64."""
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        flow = linear_in_weight_dtype(self.flow_map, states).to(wide.dtype)
        return flow.square().mean(dim=-1, keepdim=True) + 1e-2 * wide.square().mean(dim=-1, keepdim=True)

    def _scale(self, states: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
        return (self.weight * (states.to(energy.dtype) * torch.rsqrt(energy + self.eps))).to(states.dtype)

    def _running_mean(self, energy: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        """Mean of `[B, M, 1]` over each entity and its predecessors in the segment."""
        # float64: float32 sums would depend on how the sequence was split into calls.
        sums = energy.double().cumsum(dim=1)
        if state is not None:
            stored = state.data(self.name)
            if stored is not None:
                last = (state.lengths - 1).clamp(min=0).view(-1, 1, 1, 1)
                before = stored.gather(2, last)[:, :, 0]
                sums = sums + torch.where((state.lengths > 0)[:, None, None], before, 0)
            state.append(self.name, sums.unsqueeze(1))
        elif rows.segment is not None:
            positions = torch.arange(sums.shape[1], device=sums.device)
            before = (positions - rows.segment_positions - 1)[..., None]
            sums = sums - torch.where(before < 0, 0, sums.gather(1, before.clamp(min=0)))
        return (sums / (rows.segment_positions + 1)[..., None]).to(energy.dtype)


class BaselineNorm(nn.Module):
    """RMSNorm or the identity, called like FlowNorm; for ablations."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps) if config.flow_norm == "rms" else nn.Identity()

    def forward(self, states: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None) -> torch.Tensor:
        """Normalise states `[B, M, hidden_size]`."""
        return self.norm(states)


def make_norm(config: DFNConfig, name: str) -> FlowNorm | BaselineNorm:
    """Return the norm that `config.flow_norm` selects; `name` is the name of its running sums in the cache."""
    return FlowNorm(config, name) if config.flow_norm in ("entity", "running") else BaselineNorm(config)


class DynamicFieldMLP(nn.Module):
    """MLP([s, y]) (Dynamic Flow Networks (Stürtz), §2.4); with `gated_mlp`, SwiGLU (Shazeer 2020) of [s, y]."""

    def __init__(self, config: DFNConfig):
        super().__init__()
        self.up_proj = nn.Linear(2 * config.hidden_size, config.intermediate_size, bias=False)
        self.gate_proj = None
        if config.gated_mlp:
            self.gate_proj = nn.Linear(2 * config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Map states and the attention's output y, both `[B, M, hidden_size]`, to the same shape."""
        field = torch.cat([states, y], dim=-1)
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(field)))
        return self.down_proj(F.silu(self.gate_proj(field)) * self.up_proj(field))


class DFNLayer(GradientCheckpointingLayer):
    """Flow attention, gated if `output_gate`, and Dynamic Field MLP, each with a residual connection.

    Args:
        coordinate_features: F, size of the features of the entities' own coordinates; 0 for entities without them.

    Example:
        >>> import torch
        >>> from dfn_hf import DFNConfig, DFNModel
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> layer = DFNModel(DFNConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)).layers[0]
        >>> states = torch.randn(2, 50, 16)
        >>> states, _, influence, entities, _ = layer(states, None, make_row_layout(2, 50, states.device))
        >>> states.shape, influence.shape, entities.rest_positions.shape
        (torch.Size([2, 50, 16]), torch.Size([2, 4, 50]), torch.Size([2, 4, 50, 4]))
    """

    def __init__(self, config: DFNConfig, coordinate_features: int = 0):
        super().__init__()
        self.carry_positions = config.carry_positions
        self.flow_norm = make_norm(config, "flow_norm")
        ahead = 0 if config.is_causal else config.conv_kernel - 1
        self.conv = CausalConv(config.hidden_size, config.conv_kernel, ahead)
        self.attention = DynamicFlowAttention(config, coordinate_features)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if config.output_gate else None
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp_norm = make_norm(config, "mlp_norm")
        self.mlp = DynamicFieldMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        origin: torch.Tensor | None,
        rows: RowLayout,
        coordinates: torch.Tensor | None = None,
        log_mass: torch.Tensor | None = None,
        past_key_values: FlowCacheLayer | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Entities, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, M, hidden_size]`, left-aligned rows.
            origin: `[B, H, M, P]`, moved positions of the previous layer, or None.
            rows: layout of the call's rows.
            coordinates: `[B, M, F]`, features of the entities' coordinates, or None.
            log_mass: `[B, M]`, or None.
            past_key_values: this layer's cache, or None. The name is that of a model's cache because
                `GradientCheckpointingLayer` drops an argument of this name when it recomputes a layer.
            output_attentions: also return dense attention weights, O(M N) memory.

        Returns:
            (states `[B, M, hidden_size]`; with `carry_positions` the `origin` of the next layer, else None; influence
            `[B, H, M]`; entities; attention weights `[B, H, M, N]` or None). Tensors with a gradient are elements of
            the tuple, because re-entrant checkpointing does not look into `Entities`.
        """
        u = self.conv(self.flow_norm(hidden_states, rows, past_key_values), rows, past_key_values)
        u = u.to(hidden_states.dtype)
        y, moved, entities, weights = self.attention(
            u, rows, past_key_values, origin, output_attentions, coordinates, log_mass
        )
        hidden_states = apply_chunked(self._add_flow, hidden_states, u, y)
        normed = self.mlp_norm(hidden_states, rows, past_key_values)
        hidden_states = apply_chunked(self._add_field, hidden_states, normed, y)
        return hidden_states, moved if self.carry_positions else None, entities.influence, entities, weights

    def _add_flow(self, states: torch.Tensor, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gated = y if self.gate_proj is None else y * F.silu(self.gate_proj(u))
        return states + self.dropout(self.out_proj(gated))

    def _add_field(self, states: torch.Tensor, normed: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return states + self.dropout(self.mlp(normed, y.to(states.dtype)))


def identity_conv_init(weight: torch.Tensor, ahead: int = 0) -> torch.Tensor:
    """Return initial filters: 1 at the current input, normal with standard deviation 0.3 at the other taps.

    The other taps give an entity information about its predecessor, which associative recall needs as its key. With
    the identity alone recall is learnt too, but in twice the steps.

    Args:
        weight: `[channels, 1, taps]`.
        ahead: number of taps after the current input.
    """
    taps = 0.3 * torch.randn_like(weight)
    taps[..., -1 - ahead] = 1
    return taps
