"""Pattern-based flow routing: which predecessors flow into an entity, and how strongly.

A token mixes learnt patterns with weights a_ip, of which the strongest are kept. A pattern is a low-rank query map Q_p
and a profile over relative offsets; keys are shared by all patterns:

    q_i  = Σ_p a_ip Q_p x_i                                            q and k scaled to a mean square of 1
    F_ij = exp(q_i · k_j / √R) · Σ_p a_ip softplus(profile_p(i − j)) · sigmoid((w_i − (i − j)) / τ)

over the window i − j < `window`; w_i is the window that the router gives entity i. Of each row of F the strongest
share is kept, relu(F_ij − θ_i), made to sum to 1 and multiplied by an intensity in (0, 1): the flow matrix, which then
mixes values.

Shape letters: B batch, M entities of this call, W window, P patterns, R rank, N blocks, T queries of a block.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ..modules.cache import FlowCacheLayer
from ..modules.chunk_memory import ChunkMemory
from ..modules.linear import linear_in_weight_dtype
from ..modules.row_layout import RowLayout, make_row_layout
from ..ops.band import block_length, by_key, by_offset, join_blocks, key_blocks, query_blocks

CONTEXT_SIZE = 16  # features of the context that the router sees
MIN_FRACTION, MAX_FRACTION = 0.5, 1.5  # what the router's share lies between, in units of `base_sparsity`
# Entries this share below the threshold stay, so that ties are kept together, no row is empty and no weight hangs on a
# last bit: TIE_MARGIN where one is kept, TIE_MARGIN / count where more are, TIE_MARGIN / FEW where many are.
TIE_MARGIN, FEW = 0.08, 8
NEAR_OFFSETS = 8  # offsets that a profile tells apart; beyond them it is linear between powers of two
FARTHEST_KNOT = 2**20
QUERY_CHUNK = 2048  # rows of the flow that are held at a time


def soft_top_k(flow: torch.Tensor, count: torch.Tensor, most: int) -> torch.Tensor:
    """The strongest entries of each row, lowered by what the first one left out has, and made to sum to 1.

    relu(F − θ) with θ interpolated between the sorted entries so that round(count) of them, but at least 1, lie above
    it: the weights are continuous in F and in `count`, and both get a gradient.

    Args:
        flow: `[..., W]`, not negative, at least one entry of each row above 0.
        count: broadcasts to `[...]`, how many to keep.
        most: no count is larger.
    """
    strongest = flow.topk(min(most + 2, flow.shape[-1]), dim=-1).values
    strongest = F.pad(strongest, (0, most + 2 - strongest.shape[-1]))
    place = (count - 0.5).clamp(min=0.5, max=float(most)).expand(flow.shape[:-1])
    below = place.detach().floor().long().clamp(0, most)  # a NaN becomes any integer
    upper, lower = (strongest.gather(-1, (below + step).unsqueeze(-1)) for step in (0, 1))
    threshold = upper + (lower - upper) * (place - below).unsqueeze(-1)
    margin = TIE_MARGIN / (place + 0.5).clamp(max=FEW).unsqueeze(-1)
    kept = (flow - (1 - margin) * threshold).relu()
    return kept / kept.sum(dim=-1, keepdim=True)


def unit_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Scaled so that products of any two are bounded: exp() of them then neither overflows nor picks one alone."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def profile_knots(window: int) -> list[int]:
    """Offsets at which profiles are learnt: each of the nearest, then powers of two until the window is covered."""
    knots = list(range(min(NEAR_OFFSETS, window)))
    while knots[-1] < window - 1:
        knots.append(max(NEAR_OFFSETS, 2 * knots[-1]) if knots[-1] >= NEAR_OFFSETS else NEAR_OFFSETS)
    return knots


def interpolate_knots(values: torch.Tensor, knots: list[int], width: int) -> torch.Tensor:
    """`[P, knots]` → `[P, width]`, one value per offset: linear between the knots, constant beyond the last."""
    at = torch.tensor(knots, device=values.device)
    offsets = torch.arange(width, device=values.device)
    right = (at < offsets.unsqueeze(-1)).sum(dim=-1).clamp(max=len(knots) - 1)
    left = torch.where(at[right] > offsets, right - 1, right)
    share = ((offsets - at[left]) / (at[right] - at[left]).clamp(min=1)).clamp(max=1).to(values.dtype)
    return values[:, left] + (values[:, right] - values[:, left]) * share


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}.")


def check_sparsity(base_sparsity: float) -> None:
    """Raise ValueError for a share outside (0, 1]."""
    if not 0 < base_sparsity <= 1:
        raise ValueError(f"`base_sparsity` must lie in (0, 1], got {base_sparsity}.")


class FlowLayer(nn.Module):
    """Patterns of a token assembled into its row of the flow matrix, and the mixing of values by that matrix.

    Args:
        input_dim: features of what it reads.
        output_dim: features of what flows.
        num_patterns: P.
        base_sparsity: share of the reachable entities that flow into one, where no router says otherwise; in (0, 1].
        window: most recent entities that can flow into one, the entity itself included; None for all.
        rank: R, at most `input_dim`.

    Raises:
        ValueError: a size below 1, or `base_sparsity` outside (0, 1].
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
        """Mostly the entity just before flows in at the start: what is learnt in few steps then is worth having.

        From random profiles a language model learns much slower, and worse than without flow.
        """
        profile = torch.randn_like(self.profile) - 4
        profile[:, min(1, len(self.knots) - 1)] = 5
        init.copy_(self.profile, profile)
        init.constant_(self.intensity_proj.bias, 2)

    def forward(
        self, x: torch.Tensor, routing: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The flow matrix itself, O(M²): the operator that `mix` applies without ever holding it.

        Args:
            x: `[B, M, input_dim]`, rows without padding.
            routing: window and kept share of each entity, each `[B, M]` (`ContextAwareFlowRouter`); None for all
                within `window` and `base_sparsity`.

        Returns:
            (flow matrix `[B, M, M]`, lower triangular, each row summing to its entity's intensity; metrics: scalars
            `sparsity_kept` and `pattern_entropy`).
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

    def apply(self, flow: torch.Tensor | Callable, x: torch.Tensor | None = None):
        """flow @ W_v x: `[B, M, M]`, `[B, M, input_dim]` → `[B, M, output_dim]`.

        With a function alone it is `nn.Module.apply`.
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
        """What flows into each entity, in O(M · W).

        Args:
            x: `[B, M, input_dim]`.
            routing: as for `forward`.
            rows: `row_layout.RowLayout` of this call; None for rows without padding.
            state: the window before this call, or None.
            output_flow: return the flow too.

        Returns:
            (`[B, M, output_dim]`; flow by offset `[B, M, W]`, oldest first, without gradient, or None; metrics).
        """
        batch, length, _ = x.shape
        rows = make_row_layout(batch, length, x.device) if rows is None else rows
        patterns, query, key, intensity = self._assemble(x)
        value = self.value_proj(x)
        if self.window is None and state is not None:
            raise ValueError("A state keeps a window: give the FlowLayer a `window`, or mix whole rows.")
        width = self.window or length
        before = width - 1
        block = block_length(length, before)
        if state is None:
            key, value = (F.pad(past, (0, 0, before, 0)) for past in (key, value))
        else:
            key, value = state.roll("flow_key", key, before), state.roll("flow_value", value, before)
        keys, values = key_blocks(key, before, block), key_blocks(value, before, block)
        profile = self._profile(width).flip(1)
        age = torch.arange(before, -1, -1, device=x.device)
        of_entities = [query, patterns, rows.segment_positions[..., None], intensity]
        if routing is not None:
            of_entities += [one[..., None] for one in routing]
        blocks = [keys, values, *(query_blocks(one, block) for one in of_entities)]

        mixed, flows, shares = [], [], []
        at_once = max(1, QUERY_CHUNK // block)
        for keys, values, queries, weights, reach, strength, *routed in zip(
            *(one.split(at_once, dim=1) for one in blocks), strict=True
        ):
            with torch.autocast(x.device.type, enabled=False):
                scores, mixture = by_offset(queries @ keys.transpose(-1, -2)), weights @ profile
            routed = tuple(one[..., 0] for one in routed) or None
            flow, reachable = self._route(scores, mixture, age, reach[..., 0], routed, width)
            shares.append((flow.detach() > 0).sum(dim=-1) / reachable)
            flow = flow * strength
            mixed.append(by_key(flow).to(value.dtype) @ values)
            if output_flow:
                flows.append(flow.detach())
        mixed = join_blocks(torch.cat(mixed, dim=1), length)
        flow = join_blocks(torch.cat(flows, dim=1), length) if output_flow else None
        share = torch.cat(shares, dim=1).flatten(1)[:, :length]
        return mixed, flow, self._metrics(patterns, share, rows)

    def _assemble(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Weights of the patterns `[B, M, P]`, queries and keys `[B, M, R]`, intensity `[B, M, 1]`, as float32."""
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
        """softplus of each pattern's profile, by offset from 0: `[P, width]`."""
        profile = self.profile.to(torch.promote_types(self.profile.dtype, torch.float32))
        return F.softplus(interpolate_knots(profile, self.knots, width))

    def _route(self, scores, mixture, age, reach, routing, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the flow that sum to 1, and how many entities each could have reached.

        Args:
            scores, mixture: `[..., W]`, of the products and of the profiles.
            age: int64, broadcasts to `[..., W]`: i − j; reach: int64 `[...]`, entities of the segment before i.
            routing: window and share, each `[...]`, or None.
        """
        tiny = torch.finfo(scores.dtype).tiny
        flow = scores + mixture.clamp(min=tiny).log()
        reachable = (reach + 1).clamp(max=width).to(scores.dtype)
        share = self.base_sparsity
        if routing is not None:
            window, share = routing
            flow = flow + F.logsigmoid((window.unsqueeze(-1) - age) / self.temperature)
            reachable = torch.minimum(reachable, window)
        allowed = (age >= 0) & (age <= reach.clamp(max=width - 1).unsqueeze(-1))
        flow = flow.masked_fill(~allowed, -math.inf)
        flow = (flow - flow.detach().amax(dim=-1, keepdim=True)).exp()
        most = math.ceil(min(1.0, MAX_FRACTION * self.base_sparsity) * width)
        return soft_top_k(flow, share * reachable, most), reachable.detach()

    def _metrics(self, patterns: torch.Tensor, share: torch.Tensor, rows: RowLayout) -> dict[str, torch.Tensor]:
        patterns = patterns.detach()
        entropy = -(patterns * patterns.clamp(min=torch.finfo(patterns.dtype).tiny).log()).sum(dim=-1)
        return {"sparsity_kept": rows.mean(share), "pattern_entropy": rows.mean(entropy)}


class FlowMixer(FlowLayer):
    """A `FlowLayer` that mixes where it is called: hooks that bring weights from elsewhere see calls, not methods."""

    def forward(self, x, routing=None, rows=None, state=None, output_flow=False):
        """As `FlowLayer.mix`."""
        return self.mix(x, routing, rows, state, output_flow)


class ContextAwareFlowRouter(nn.Module):
    """How far an entity looks back and which share of what it reaches is kept, from itself and its context.

    The context is a decaying average over closed chunks (`ChunkMemory`): nothing of the future, of other rows or of
    padding is in it.

    Args:
        input_dim: features of what it reads.
        flow_window: largest window; min_flow_window: smallest.
        base_sparsity: the share lies between a half and one and a half of it, and is at most 1.
        chunk_length: entities of a chunk; context_decay: weight of the chunks before, initially.

    Raises:
        ValueError: sizes below 1, `min_flow_window` above `flow_window`, or `base_sparsity` outside (0, 1].
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
            raise ValueError(f"`min_flow_window` ({min_flow_window}) must not be above `flow_window` ({flow_window}).")
        self.flow_window, self.min_flow_window = flow_window, min_flow_window
        self.base_sparsity = base_sparsity
        self.context_proj = nn.Linear(input_dim, CONTEXT_SIZE, bias=False)
        self.context = ChunkMemory(CONTEXT_SIZE, 1, chunk_length, context_decay, name="context")
        self.route_proj = nn.Linear(input_dim + CONTEXT_SIZE, 2)
        self.context.reset_parameters(CONTEXT_SIZE**-0.5)

    def forward(
        self, x: torch.Tensor, rows: RowLayout | None = None, state: FlowCacheLayer | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, M, input_dim]` → (window, kept share), each `[B, M]`, in at least float32.

        Args:
            rows: `row_layout.RowLayout` of this call; None for rows without padding.
            state: holds the context, or None.
        """
        rows = make_row_layout(*x.shape[:2], x.device) if rows is None else rows
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
        share = self.base_sparsity * (MIN_FRACTION + (MAX_FRACTION - MIN_FRACTION) * routed[..., 1])
        return window, share.clamp(max=1.0)
