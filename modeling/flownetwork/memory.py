"""Memory of FlowNetwork: a bank that is updated during training, and a memory of the current sequence.

`MemoryBank` is one buffer per model, shared by all sequences. An exponential moving average updates it between
optimizer steps; no gradient flows into it. `SequenceMemory` holds one set of slots per layer and sequence. Closed
chunks update the slots, which live in the cache and are reset with it.

Shape letters: B batch, M entities of this call, D features, H memory heads, C chunks, S slots of the bank.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ..modules.chunk_memory import ChunkLayout, ChunkMemory
from ..modules.linear import linear_of_batch
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout, make_row_layout
from .configuration_flownetwork import adjust_num_heads
from .routing import check_sizes

BANK_INV_TEMPERATURE = 4.0


class MemoryBank(nn.Module):
    """Slots `memory_bank` `[S, D]` that hold moving averages of the entities assigned to them.

    An entity x is assigned to the slots with weights a_j = softmax_j(4 x · m_j / √D). The factor 4 keeps the slots
    distinct. Each slot moves towards the weighted mean of its entities: m_j ← β m_j + (1 − β) Σ_i a_ij x_i / Σ_i a_ij.
    The sums are float64, so that their order does not matter.

    Args:
        d_model: number of features D.
        memory_size: number of slots S.
        memory_bank_decay: decay β of the moving average, in (0, 1).

    Raises:
        ValueError: a size is below 1, or `memory_bank_decay` is outside (0, 1).
    """

    memory_bank: torch.Tensor

    def __init__(self, d_model: int, memory_size: int, memory_bank_decay: float = 0.99):
        super().__init__()
        check_sizes(d_model=d_model, memory_size=memory_size)
        if not 0 < memory_bank_decay < 1:
            raise ValueError(f"`memory_bank_decay` must lie in (0, 1), got {memory_bank_decay}.")
        self.memory_bank_decay = memory_bank_decay
        self.register_buffer("memory_bank", torch.empty(memory_size, d_model, dtype=torch.float32))
        self.staged: tuple[torch.Tensor, torch.Tensor] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the slots with normal noise of unit variance; banks of equal size start with equal slots."""
        start = torch.randn(self.memory_bank.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        init.copy_(self.memory_bank, start)

    @torch.no_grad()
    def stage(self, x: torch.Tensor, rows: RowLayout) -> torch.Tensor:
        """Add a batch to the statistics that the next `commit` writes.

        Args:
            x: `[B, M, D]`.
            rows: `row_layout.RowLayout` of this call; padding is excluded.

        Returns:
            Norm of the update that this batch alone would cause, a float64 scalar.
        """
        x = x.detach().double()
        bank = self.memory_bank.double()
        scores = BANK_INV_TEMPERATURE * x @ bank.T / math.sqrt(x.shape[-1])
        assignment = scores.softmax(dim=-1) * rows.token_mask()[..., None]
        total, count = torch.einsum("bms,bmd->sd", assignment, x), assignment.sum(dim=(0, 1))
        if self.staged is None:
            self.staged = total, count
        else:
            self.staged = self.staged[0] + total, self.staged[1] + count
        return (self._updated_bank(total, count) - bank).norm()

    @torch.no_grad()
    def commit(self) -> None:
        """Update the bank with the statistics staged since the last commit.

        In distributed training all processes must call it: it sums the statistics over the processes.
        """
        total = torch.zeros_like(self.memory_bank, dtype=torch.float64)
        count = total.new_zeros(total.shape[0])
        if self.staged is not None:
            total, count = self.staged
        self.staged = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            statistics = torch.cat([total, count[:, None]], dim=1)
            torch.distributed.all_reduce(statistics)
            total, count = statistics[:, :-1], statistics[:, -1]
        self.memory_bank.copy_(self._updated_bank(total, count))

    def _updated_bank(self, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Return the bank after an update, float64 `[S, D]`.

        Slots without assigned entities, or whose mean is not finite, keep their value.
        """
        bank = self.memory_bank.double()
        mean = total / count.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        is_updated = (count > 0) & mean.to(self.memory_bank.dtype).isfinite().all(dim=1)
        return torch.where(
            is_updated[:, None], self.memory_bank_decay * bank + (1 - self.memory_bank_decay) * mean, bank
        )


class SequenceMemory(ChunkMemory):
    """Slots that a sequence fills: each holds a moving average of the entities assigned to it.

    An entity x is assigned to the slots with weights a_j = softmax_j(q_j · x / √D), where q_j is learnt. Each chunk
    updates

        m_j ← κ_j m_j + (1 − κ_j) Σ_t a_tj x_t / Σ_t a_tj,     κ_j = β_j^(Σ_t a_tj · S / T).

    A slot that receives an equal part of a chunk decays by β_j; a slot that receives nothing keeps its value.
    """

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Initialise as `ChunkMemory` does, with queries of standard deviation 2.

        The large queries send entities of different content to different slots from the first step.
        """
        super().reset_parameters(std)
        init.normal_(self.pooling_query, std=2.0)

    def _aggregate(self, laid: torch.Tensor, layout: ChunkLayout) -> tuple[torch.Tensor, torch.Tensor]:
        held = layout.to_chunks(torch.ones_like(layout.slot, dtype=laid.dtype)[..., None])
        scores = laid @ self.pooling_query.to(laid.dtype).T / math.sqrt(laid.shape[-1])
        assignment = (scores.softmax(dim=-1) * held).transpose(2, 3)  # [B, C, S, T]
        mass = assignment.sum(dim=-1, keepdim=True)
        pooled = assignment @ laid / mass.clamp(min=torch.finfo(laid.dtype).tiny)
        even_mass = self.chunk_length / mass.shape[2]
        return pooled, self._decay(laid.dtype)[:, None] ** (mass / even_mass)


class MemoryAttention(nn.Module):
    """Attention of each entity to the slots of the bank and to the slots that its sequence had filled before its
    chunk.

    Heads share keys and values (multi-query attention, arXiv 1911.02150). Queries and keys are normalised per head.

    Args:
        size: number of features D of entities and slots.
        num_heads: number of heads H; must divide D.
        dropout: dropout rate on the attention weights.
        norm_eps: epsilon of the query and key norms.
    """

    def __init__(self, size: int, num_heads: int, dropout: float = 0.0, norm_eps: float = 1e-6):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size // num_heads, bias=False)
        self.v_proj = nn.Linear(size, size // num_heads, bias=False)
        self.q_norm = RMSNorm(size // num_heads, norm_eps)
        self.k_norm = RMSNorm(size // num_heads, norm_eps)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        bank: torch.Tensor | None,
        slots: torch.Tensor | None = None,
        layout: ChunkLayout | None = None,
    ) -> torch.Tensor:
        """Attend to the slots; at least one of `bank` and `slots` must be given.

        Args:
            x: `[B, M, D]`.
            bank: `[S, D]` or `[B, S, D]`.
            slots: `[B, C, S', D]`, the slots that the entities of each chunk attend to.
            layout: assignment of the entities to the C chunks; required with `slots`.

        Returns:
            `[B, M, D]`.
        """
        batch, length, _ = x.shape
        parts = [] if slots is None else [slots.to(x.dtype)]
        if bank is not None:
            chunks = 1 if slots is None else slots.shape[1]
            parts.append(bank.to(x.dtype).expand(batch, -1, -1).unsqueeze(1).expand(-1, chunks, -1, -1))
        memory = torch.cat(parts, dim=2)
        in_chunks = memory.shape[1] > 1
        key, value = (
            linear_of_batch(linear, memory).flatten(0, 1).unsqueeze(1) for linear in (self.k_proj, self.v_proj)
        )
        query = self.q_proj(x)
        query = layout.to_chunks(query) if in_chunks else query.unsqueeze(1)  # [B, C, T, D]
        query = query.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query, key = self.q_norm(query), self.k_norm(key)
        key, value = (one.expand(-1, self.num_heads, -1, -1) for one in (key, value))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        y = y.transpose(1, 2).flatten(2).unflatten(0, (batch, -1))
        return self.o_proj(layout.from_chunks(y) if in_chunks else y.flatten(1, 2))


class FlowMemoryNetwork(MemoryBank):
    """Stand-alone memory: attention to a bank that each training forward pass updates (FlowNetwork paper).

    Args:
        d_model: number of features D.
        memory_size: number of slots S.
        num_memory_heads: number of heads H; `adjust_num_heads` lowers it to a divisor of D.
        memory_bank_decay: decay β of the moving average, in (0, 1).

    Raises:
        ValueError: a size is below 1, or `memory_bank_decay` is outside (0, 1).

    Example:
        >>> import torch
        >>> from dfn_hf import FlowMemoryNetwork
        >>> memory = FlowMemoryNetwork(d_model=64, memory_size=16, num_memory_heads=4)
        >>> out, metrics = memory(torch.randn(2, 10, 64))
        >>> out.shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, d_model: int, memory_size: int, num_memory_heads: int, memory_bank_decay: float = 0.99):
        check_sizes(num_memory_heads=num_memory_heads)
        super().__init__(d_model, memory_size, memory_bank_decay)
        self.attention = MemoryAttention(d_model, adjust_num_heads(d_model, num_memory_heads))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: torch.Tensor, update_memory: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Add the attention to the bank to x; then update the bank with x.

        Args:
            x: `[B, M, d_model]`, rows without padding.
            update_memory: whether to update the bank in training mode. In eval mode the bank never changes.

        Returns:
            (states `[B, M, d_model]`; metrics with the scalar `memory_write_norm`).

        Raises:
            ValueError: x has another shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.memory_bank.shape[1]:
            raise ValueError(f"`x` must have shape [batch, length, {self.memory_bank.shape[1]}], got {list(x.shape)}.")
        out = x + self.attention(self.norm(x), self.memory_bank.clone())
        write_norm = x.new_zeros((), dtype=torch.float64)
        if update_memory and self.training:
            write_norm = self.stage(x, make_row_layout(x.shape[0], x.shape[1], x.device))
            self.commit()
        return out, {"memory_write_norm": write_norm}
