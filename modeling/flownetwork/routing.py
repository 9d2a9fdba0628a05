"""Pattern-based flow routing: which predecessors flow into an entity, and with which weights.

A token mixes learnt patterns with softmax weights a_ip, of which the strongest are kept. Each pattern consists of a
low-rank query map Q_p and a profile over relative offsets; all patterns share the keys:

    q_i  = Σ_p a_ip Q_p x_i                                            q and k scaled to a mean square of 1
    F_ij = exp(q_i · k_j / √R) · Σ_p a_ip softplus(profile_p(i − j)) · sigmoid((w_i − (i − j)) / τ)

for offsets i − j < `window`, where w_i is the window that the router chooses for entity i. Each row of F keeps its
strongest entries, relu(F_ij − θ_i), is normalised to sum to 1, and is multiplied by an intensity in (0, 1). The result
is the flow matrix, which mixes the values.

Shape letters: B batch, M entities of this call, W window, P patterns, R rank, N blocks, T queries of a block.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ..modules.cache import FlowCacheLayer
from ..modules.chunk_memory import ChunkMemory
from ..modules.linear import linear_in_weight_dtype
from ..modules.row_layout import RowLayout, make_row_layout
from ..ops.band import block_length, by_key, by_offset, join_blocks, key_blocks, query_blocks

CONTEXT_SIZE = 16  # features of the router's context
MIN_FRACTION, MAX_FRACTION = 0.5, 1.5  # bounds of the router's fraction, in units of `base_sparsity`
# Entries up to a relative margin of TIE_MARGIN / min(count, TIE_CAP) below the threshold are kept: ties stay together,
# no row becomes empty, and no weight depends on a rounding error.
TIE_MARGIN, TIE_CAP = 0.08, 8
NEAR_OFFSETS = 8  # a profile has a knot at each of these offsets and at powers of two beyond them
FARTHEST_KNOT = 2**20
QUERY_CHUNK = 2048  # rows of the flow per chunk; bounds peak memory


def soft_top_k(flow: torch.Tensor, count: torch.Tensor, max_count: int) -> torch.Tensor:
    """Keep the strongest entries of each row, reduced by a threshold and normalised to sum to 1.

    Computes relu(F − θ). θ is interpolated between the sorted entries so that max(1, round(count)) entries exceed it.
    The weights are continuous in F and `count`, and both receive a gradient.

    Args:
        flow: `[..., W]`, not negative, with at least one positive entry per row.
        count: number of entries to keep, broadcasts to `[...]`.
        max_count: upper bound of `count`.

    Returns:
        `[..., W]`.
    """
    strongest = flow.topk(min(max_count + 2, flow.shape[-1]), dim=-1).values
    strongest = F.pad(strongest, (0, max_count + 2 - strongest.shape[-1]))
    rank = (count - 0.5).clamp(min=0.5, max=float(max_count)).expand(flow.shape[:-1])
    below = (
        rank.detach().floor().long().clamp(0, max_count)
    )  # the cast of NaN is undefined; clamp keeps the index valid
    upper, lower = (strongest.gather(-1, (below + step).unsqueeze(-1)) for step in (0, 1))
    threshold = upper + (lower - upper) * (rank - below).unsqueeze(-1)
    margin = TIE_MARGIN / (rank + 0.5).clamp(max=TIE_CAP).unsqueeze(-1)
    kept = (flow - (1 - margin) * threshold).relu()
    return kept / kept.sum(dim=-1, keepdim=True)


def unit_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Scale x to a mean square of 1, which bounds dot products: exp() of them does not overflow or saturate."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def profile_knots(window: int) -> list[int]:
    """Return the offsets at which profiles are learnt: the nearest ones, then powers of two that cover the window."""
    knots = list(range(min(NEAR_OFFSETS, window)))
    while knots[-1] < window - 1:
        knots.append(max(NEAR_OFFSETS, 2 * knots[-1]) if knots[-1] >= NEAR_OFFSETS else NEAR_OFFSETS)
    return knots


def interpolate_knots(values: torch.Tensor, knots: list[int], width: int) -> torch.Tensor:
    """Interpolate `[P, knots]` to one value per offset, `[P, width]`.

    Linear between the knots, constant beyond the last one.
    """
    at = torch.tensor(knots, device=values.device)
    offsets = torch.arange(width, device=values.device)
    right = (at < offsets.unsqueeze(-1)).sum(dim=-1).clamp(max=len(knots) - 1)
    left = torch.where(at[right] > offsets, right - 1, right)
    fraction = ((offsets - at[left]) / (at[right] - at[left]).clamp(min=1)).clamp(max=1).to(values.dtype)
    return values[:, left] + (values[:, right] - values[:, left]) * fraction


def check_sizes(**sizes: int) -> None:
    """Raise `ValueError` if a size is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}.")


def check_sparsity(base_sparsity: float) -> None:
    """Raise `ValueError` if `base_sparsity` is outside (0, 1]."""
    if not 0 < base_sparsity <= 1:
        raise ValueError(f"`base_sparsity` must lie in (0, 1], got {base_sparsity}.")


class FlowLayer(nn.Module):
    """Flow layer of the FlowNetwork paper: builds the flow matrix from patterns and mixes values with it.

    Args:
        input_dim: number of input features.
        output_dim: number of value features.
        num_patterns: number of patterns P.
        base_sparsity: fraction of the reachable entities that flow into an entity if no routing is given; in (0, 1].
        window: number of most recent entities that can flow into an entity, itself included; None for all.
        rank: rank R of the query maps; reduced to `input_dim` if larger.

    Raises:
        ValueError: a size is below 1, or `base_sparsity` is outside (0, 1].

    Example:
        >>> import torch
        >>> from dfn_hf import FlowLayer
        >>> layer = FlowLayer(input_dim=64, output_dim=64, num_patterns=8)
        >>> x = torch.randn(2, 10, 64)
        >>> flow, metrics = layer(x)
        >>> flow.shape, layer.apply(flow, x).shape
        (torch.Size([2, 10, 10]), torch.Size([2, 10, 64]))
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_patterns: int,
        base_sparsity: float = 0.1,
        window: int | None = None,
        rank: int = 16,
    ):
        super().__init__()
        check_sizes(input_dim=input_dim, output_dim=output_dim, num_patterns=num_patterns, rank=rank)
        if window is not None:
            check_sizes(window=window)
        check_sparsity(base_sparsity)
        self.base_sparsity = base_sparsity
        self.window = window
        self.rank = min(rank, input_dim)
        self.kept_patterns = max(2, num_patterns // 2)
        self.knots = profile_knots(window or FARTHEST_KNOT)
        self.temperature = max(1.0, (window or 1) / 16)
        self.pattern_selector = nn.Linear(input_dim, num_patterns, bias=False) if num_patterns > 1 else None
        self.query_maps = nn.Linear(input_dim, num_patterns * self.rank, bias=False)
        self.key_proj = nn.Linear(input_dim, self.rank, bias=False)
        self.value_proj = nn.Linear(input_dim, output_dim, bias=False)
        self.intensity_proj = nn.Linear(input_dim, 1)
        self.profile = nn.Parameter(torch.empty(num_patterns, len(self.knots)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the profiles so that mainly the preceding entity flows in.

        With random profiles a language model learns more slowly and ends worse than without flow.
        """
        profile = torch.randn_like(self.profile) - 4
        profile[:, min(1, len(self.knots) - 1)] = 5
        init.copy_(self.profile, profile)
        init.constant_(self.intensity_proj.bias, 2)

    def forward(
        self, x: torch.Tensor, routing: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the dense flow matrix in O(M²) memory; `mix` applies the same operator without materialising it.

        Args:
            x: `[B, M, input_dim]`, rows without padding.
            routing: window and kept fraction of each entity, each `[B, M]`, as `ContextAwareFlowRouter` returns them;
                None uses `window` and `base_sparsity` for all entities.

        Returns:
            (flow matrix `[B, M, M]`, lower triangular, each row sums to the entity's intensity; metrics with the
            scalars `sparsity_kept` and `pattern_entropy`).
        """
        batch, length, _ = x.shape
        rows = make_row_layout(batch, length, x.device)
        patterns, query, key, intensity = self._assemble(x)
        age = (rows.positions[0][:, None] - rows.positions[0]).expand(batch, -1, -1)
        profile = self._profile(length)[:, age[0].clamp(min=0)]
        with torch.autocast(x.device.type, enabled=False):
            mixture = torch.einsum("bip,pij->bij", patterns, profile)
            scores = query @ key.transpose(1, 2)
        flow, reachable = self._route(scores, mixture, age, rows.segment_positions, routing, self.window or length)
        return flow * intensity, self._metrics(patterns, (flow > 0).sum(dim=-1) / reachable, rows)

    def apply(self, flow: Any, x: torch.Tensor | None = None):
        """Mix values with a flow matrix: flow @ W_v x.

        Args:
            flow: `[B, M, M]`; or a function, for which this is `nn.Module.apply`.
            x: `[B, M, input_dim]`; None with a function.

        Returns:
            `[B, M, output_dim]`.
        """
        if x is None:
            return super().apply(flow)
        return flow @ self.value_proj(x).to(flow.dtype)

    def mix(
        self,
        x: torch.Tensor,
        routing: tuple[torch.Tensor, torch.Tensor] | None = None,
        rows: RowLayout | None = None,
        state: FlowCacheLayer | None = None,
        output_flow: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        """Mix values with the flow in O(M · W) time and memory.

        Args:
            x: `[B, M, input_dim]`.
            routing: window and kept fraction of each entity, each `[B, M]`, or None.
            rows: `row_layout.RowLayout` of this call; None for rows without padding.
            state: cache layer that holds the window before this call, or None.
            output_flow: whether to return the flow.

        Returns:
            (mixed values `[B, M, output_dim]`; detached flow by offset `[B, M, W]`, oldest first, or None; metrics).

        Raises:
            ValueError: `state` is given and the layer has no `window`.
        """
        batch, length, _ = x.shape
        rows = make_row_layout(batch, length, x.device) if rows is None else rows
        patterns, query, key, intensity = self._assemble(x)
        value = self.value_proj(x)
        if self.window is None and state is not None:
            raise ValueError(
                "`state` requires a FlowLayer with `window`: set `window`, or pass whole rows without a state."
            )
        width = self.window or length
        before = width - 1
        block = block_length(length, before)
        if state is None:
            key, value = (F.pad(inputs, (0, 0, before, 0)) for inputs in (key, value))
        else:
            key, value = state.roll("flow_key", key, before), state.roll("flow_value", value, before)
        keys, values = key_blocks(key, before, block), key_blocks(value, before, block)
        profile = self._profile(width).flip(1)
        age = torch.arange(before, -1, -1, device=x.device)
        per_entity = [query, patterns, rows.segment_positions[..., None], intensity]
        if routing is not None:
            per_entity += [one[..., None] for one in routing]
        blocks = [keys, values, *(query_blocks(one, block) for one in per_entity)]

        parts, flows, kept_fractions = [], [], []
        blocks_per_chunk = max(1, QUERY_CHUNK // block)
        for keys, values, queries, weights, preceding, block_intensity, *routed in zip(
            *(one.split(blocks_per_chunk, dim=1) for one in blocks), strict=True
        ):
            with torch.autocast(x.device.type, enabled=False):
                scores, mixture = by_offset(queries @ keys.transpose(-1, -2)), weights @ profile
            route = tuple(one[..., 0] for one in routed) or None
            flow, reachable = self._route(scores, mixture, age, preceding[..., 0], route, width)
            kept_fractions.append((flow.detach() > 0).sum(dim=-1) / reachable)
            flow = flow * block_intensity
            parts.append(by_key(flow).to(value.dtype) @ values)
            if output_flow:
                flows.append(flow.detach())
        mixed = join_blocks(torch.cat(parts, dim=1), length)
        flow = join_blocks(torch.cat(flows, dim=1), length) if output_flow else None
        kept_fraction = torch.cat(kept_fractions, dim=1).flatten(1)[:, :length]
        return mixed, flow, self._metrics(patterns, kept_fraction, rows)

    def _assemble(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute pattern weights, queries, keys and intensity in at least float32.

        Returns:
            (pattern weights `[B, M, P]`, queries `[B, M, R]`, keys `[B, M, R]`, intensity `[B, M, 1]`).
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            intensity = linear_in_weight_dtype(self.intensity_proj, x).to(dtype).sigmoid()
            query = self.query_maps(x).to(dtype).unflatten(-1, (-1, self.rank))
            key = linear_in_weight_dtype(self.key_proj, x).to(dtype)
            if self.pattern_selector is None:
                patterns = torch.ones_like(intensity)
            else:
                patterns = linear_in_weight_dtype(self.pattern_selector, x).to(dtype).softmax(dim=-1)
                if patterns.shape[-1] > self.kept_patterns:
                    count = patterns.new_tensor(self.kept_patterns)
                    patterns = soft_top_k(patterns, count, self.kept_patterns)
            query = (patterns.unsqueeze(-1) * query).sum(dim=-2)
            return patterns, unit_mean_square(query) / math.sqrt(self.rank), unit_mean_square(key), intensity

    def _profile(self, width: int) -> torch.Tensor:
        """Return softplus of each pattern's profile for the offsets 0 … width − 1, `[P, width]`."""
        profile = self.profile.to(torch.promote_types(self.profile.dtype, torch.float32))
        return F.softplus(interpolate_knots(profile, self.knots, width))

    def _route(self, scores, mixture, age, preceding, routing, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Select and normalise rows of the flow.

        Args:
            scores: `[..., W]`, scaled products of queries and keys.
            mixture: `[..., W]`, mixed profiles.
            age: int64 offset i − j, broadcasts to `[..., W]`.
            preceding: int64 `[...]`, number of entities of the segment before i.
            routing: window and kept fraction, each `[...]`, or None.
            width: number of offsets W.

        Returns:
            (rows that sum to 1, `[..., W]`; number of reachable entities, `[...]`).
        """
        tiny = torch.finfo(scores.dtype).tiny
        flow = scores + mixture.clamp(min=tiny).log()
        reachable = (preceding + 1).clamp(max=width).to(scores.dtype)
        fraction = self.base_sparsity
        if routing is not None:
            window, fraction = routing
            flow = flow + F.logsigmoid((window.unsqueeze(-1) - age) / self.temperature)
            reachable = torch.minimum(reachable, window)
        allowed = (age >= 0) & (age <= preceding.clamp(max=width - 1).unsqueeze(-1))
        flow = flow.masked_fill(~allowed, -math.inf)
        flow = (flow - flow.detach().amax(dim=-1, keepdim=True)).exp()
        max_count = math.ceil(min(1.0, MAX_FRACTION * self.base_sparsity) * width)
        return soft_top_k(flow, fraction * reachable, max_count), reachable.detach()

    def _metrics(
        self, patterns: torch.Tensor, kept_fraction: torch.Tensor, rows: RowLayout
    ) -> dict[str, torch.Tensor]:
        """Average `kept_fraction` `[B, M]` and the entropy of `patterns` `[B, M, P]` (nats) over the real entities."""
        patterns = patterns.detach()
        entropy = -(patterns * patterns.clamp(min=torch.finfo(patterns.dtype).tiny).log()).sum(dim=-1)
        return {"sparsity_kept": rows.mean(kept_fraction), "pattern_entropy": rows.mean(entropy)}


class FlowMixer(FlowLayer):
    """`FlowLayer` whose `forward` is `mix`.

    Hooks of PEFT, quantization and offloading run when a module is called, not when one of its methods is.
    """

    def forward(self, x, routing=None, rows=None, state=None, output_flow=False):
        """Call `FlowLayer.mix`."""
        return self.mix(x, routing, rows, state, output_flow)


class ContextAwareFlowRouter(nn.Module):
    """Router of the FlowNetwork paper: chooses a window and a kept fraction for each entity.

    Both depend on the entity and on a context, a decaying average over closed chunks (`ChunkMemory`). They do not
    depend on later entities, other rows or padding.

    Args:
        input_dim: number of input features.
        flow_window: largest window, in entities.
        min_flow_window: smallest window, in entities.
        base_sparsity: base b of the kept fraction, which lies in [b / 2, min(1, 3b / 2)].
        chunk_length: entities per chunk of the context.
        context_decay: initial decay of the context per chunk, in (0, 1).

    Raises:
        ValueError: a size is below 1, `min_flow_window` exceeds `flow_window`, or `base_sparsity` is outside (0, 1].

    Example:
        >>> import torch
        >>> from dfn_hf import ContextAwareFlowRouter
        >>> router = ContextAwareFlowRouter(input_dim=64, flow_window=32)
        >>> window, fraction = router(torch.randn(2, 10, 64))
        >>> window.shape, fraction.shape
        (torch.Size([2, 10]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        input_dim: int,
        flow_window: int = 128,
        min_flow_window: int = 8,
        base_sparsity: float = 0.1,
        chunk_length: int = 64,
        context_decay: float = 0.9,
    ):
        super().__init__()
        check_sizes(
            input_dim=input_dim, flow_window=flow_window, min_flow_window=min_flow_window, chunk_length=chunk_length
        )
        check_sparsity(base_sparsity)
        if min_flow_window > flow_window:
            raise ValueError(f"`min_flow_window` ({min_flow_window}) must be at most `flow_window` ({flow_window}).")
        self.flow_window, self.min_flow_window = flow_window, min_flow_window
        self.base_sparsity = base_sparsity
        self.context_proj = nn.Linear(input_dim, CONTEXT_SIZE, bias=False)
        self.context = ChunkMemory(CONTEXT_SIZE, 1, chunk_length, context_decay, name="context")
        self.route_proj = nn.Linear(input_dim + CONTEXT_SIZE, 2)
        self.context.reset_parameters(CONTEXT_SIZE**-0.5)

    def forward(
        self, x: torch.Tensor, rows: RowLayout | None = None, state: FlowCacheLayer | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose windows and kept fractions.

        Args:
            x: `[B, M, input_dim]`.
            rows: `row_layout.RowLayout` of this call; None for rows without padding.
            state: cache layer that holds the context, or None.

        Returns:
            (window, kept fraction), each `[B, M]` in at least float32.
        """
        rows = make_row_layout(x.shape[0], x.shape[1], x.device) if rows is None else rows
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            slots, layout = self.context(linear_in_weight_dtype(self.context_proj, x), rows, state)
            context = layout.of_chunks(slots[:, :, 0])
            routed = (
                linear_in_weight_dtype(self.route_proj, torch.cat([x, context.to(x.dtype)], dim=-1))
                .to(dtype)
                .sigmoid()
            )
        window = self.min_flow_window + (self.flow_window - self.min_flow_window) * routed[..., 0]
        fraction = self.base_sparsity * (MIN_FRACTION + (MAX_FRACTION - MIN_FRACTION) * routed[..., 1])
        return window, fraction.clamp(max=1.0)
