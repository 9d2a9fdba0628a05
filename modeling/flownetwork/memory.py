"""Memory of a FlowNetwork: a bank that training writes, and slots that a sequence fills as it runs.

The bank is one for the model: a buffer, written by an exponential moving average between optimizer steps and never by
a gradient, read by all sequences. The slots are one set per layer and sequence, written by closed chunks, kept in the
cache and reset with it.

Shape letters: B batch, M entities of this call, D features, H memory heads, C chunks, S slots of the bank.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ..modules.chunk_memory import ChunkLayout, ChunkMemory
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout, make_row_layout
from .configuration_flownetwork import adjust_num_heads
from .routing import check_sizes

BANK_SHARPNESS = 4.0


class MemoryBank(nn.Module):
    """Slots `memory_bank` `[S, D]` that hold moving averages of the entities assigned to them.

    An entity x is shared out over the slots by a_j = softmax_j(4 x · m_j / √D), sharp enough that slots stay apart; a
    slot moves towards the mean of what it got, m_j ← β m_j + (1 − β) Σ_i a_ij x_i / Σ_i a_ij. Sums are float64: their
    order does not matter.

    Args:
        d_model: D; memory_size: S; memory_bank_decay: β, in (0, 1).
    """

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
        """Random slots as large as normalised states, the same ones in every bank of this size."""
        start = torch.randn(self.memory_bank.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        init.copy_(self.memory_bank, start)

    @torch.no_grad()
    def stage(self, x: torch.Tensor, rows: RowLayout) -> torch.Tensor:
        """Add a batch to what the next `commit` writes; gives the norm of what it alone would change, a scalar.

        Args:
            x: `[B, M, D]`; entities that are not real do not count.
        """
        x = x.detach().double()
        bank = self.memory_bank.double()
        scores = BANK_SHARPNESS * x @ bank.T / math.sqrt(x.shape[-1])
        shares = scores.softmax(dim=-1) * rows.token_mask()[..., None]
        total, count = torch.einsum("bms,bmd->sd", shares, x), shares.sum(dim=(0, 1))
        if self.staged is None:
            self.staged = total, count
        else:
            self.staged = self.staged[0] + total, self.staged[1] + count
        return (self._moved(total, count) - bank).norm()

    @torch.no_grad()
    def commit(self) -> None:
        """Write what was staged since the last commit, once, the same on every process; all must call it."""
        total = torch.zeros_like(self.memory_bank, dtype=torch.float64)
        count = total.new_zeros(total.shape[0])
        if self.staged is not None:
            total, count = self.staged
        self.staged = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            both = torch.cat([total, count[:, None]], dim=1)
            torch.distributed.all_reduce(both)
            total, count = both[:, :-1], both[:, -1]
        self.memory_bank.copy_(self._moved(total, count))

    def _moved(self, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """The bank after the write, float64; slots that got nothing, or nothing finite, stay."""
        bank = self.memory_bank.double()
        mean = total / count.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        written = (count > 0) & mean.to(self.memory_bank.dtype).isfinite().all(dim=1)
        return torch.where(written[:, None], self.memory_bank_decay * bank + (1 - self.memory_bank_decay) * mean, bank)


class SequenceMemory(ChunkMemory):
    """Slots that a sequence fills as it runs: like the bank, each holds a moving mean of the entities assigned to it.

    An entity x is shared out over the slots by a_j = softmax_j(q_j · x / √D), q_j learnt. Chunk by chunk,

        m_j ← κ_j m_j + (1 − κ_j) Σ_t a_tj x_t / Σ_t a_tj,     κ_j = β_j^(Σ_t a_tj · S / T):

    a slot that gets its even share keeps β_j, and one that gets nothing keeps what it holds, for as long as it takes.
    """

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Queries far enough apart that entities of different content go to different slots from the start."""
        super().reset_parameters(std)
        init.normal_(self.pooling_query, std=2.0)

    def _aggregate(self, laid: torch.Tensor, layout: ChunkLayout) -> tuple[torch.Tensor, torch.Tensor]:
        held = layout.lay(torch.ones_like(layout.slot, dtype=laid.dtype)[..., None])
        scores = laid @ self.pooling_query.to(laid.dtype).T / math.sqrt(laid.shape[-1])
        shares = (scores.softmax(dim=-1) * held).transpose(2, 3)  # [B, C, S, T]
        mass = shares.sum(dim=-1, keepdim=True)
        pooled = shares @ laid / mass.clamp(min=torch.finfo(laid.dtype).tiny)
        even_share = self.chunk_length / mass.shape[2]
        return pooled, self._decay(laid.dtype)[:, None] ** (mass / even_share)


class MemoryAttention(nn.Module):
    """Attention of each entity over slots: those of the bank, and those its sequence had filled before its chunk.

    Heads share keys and values (multi-query attention, arXiv 1911.02150); queries and keys are normalised per head.

    Args:
        size: D, features of entities and slots; num_heads: H, must divide it.
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
        """`[B, M, D]` → the same; at least one of `bank` and `slots`.

        Args:
            bank: `[S, D]` or `[B, S, D]`.
            slots: `[B, C, S', D]`, those that the entities of each chunk read; layout: where these lie.
        """
        batch, length, _ = x.shape
        memory = [] if slots is None else [slots.to(x.dtype)]
        if bank is not None:
            chunks = 1 if slots is None else slots.shape[1]
            memory.append(bank.to(x.dtype).expand(batch, -1, -1).unsqueeze(1).expand(-1, chunks, -1, -1))
        memory = torch.cat(memory, dim=2)
        in_chunks = memory.shape[1] > 1
        memory = memory.flatten(0, 1)
        key, value = (project(memory).unsqueeze(1) for project in (self.k_proj, self.v_proj))
        query = self.q_proj(x)
        query = layout.lay(query) if in_chunks else query.unsqueeze(1)  # [B, C, T, D]
        query = query.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query, key = self.q_norm(query), self.k_norm(key)
        key, value = (one.expand(-1, self.num_heads, -1, -1) for one in (key, value))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        y = y.transpose(1, 2).flatten(2).unflatten(0, (batch, -1))
        return self.o_proj(layout.take(y) if in_chunks else y.flatten(1, 2))


class FlowMemoryNetwork(MemoryBank):
    """A memory that stands alone: read by attention, written at once, in training only.

    Args:
        d_model: D; memory_size: S; num_memory_heads: H, lowered to what divides D; memory_bank_decay: β.
    """

    def __init__(self, d_model: int, memory_size: int, num_memory_heads: int, memory_bank_decay: float = 0.99):
        check_sizes(num_memory_heads=num_memory_heads)
        super().__init__(d_model, memory_size, memory_bank_decay)
        self.attention = MemoryAttention(d_model, adjust_num_heads(d_model, num_memory_heads))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: torch.Tensor, update_memory: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x and what it reads from the bank; then the bank takes x in.

        Args:
            x: `[B, M, d_model]`, rows without padding.
            update_memory: False never writes; in eval mode nothing is ever written.

        Returns:
            (`[B, M, d_model]`, metrics: scalar `memory_write_norm`).
        """
        if x.dim() != 3 or x.shape[-1] != self.memory_bank.shape[1]:
            raise ValueError(f"x must be [batch, length, {self.memory_bank.shape[1]}], got {list(x.shape)}.")
        out = x + self.attention(self.norm(x), self.memory_bank.clone())
        write_norm = x.new_zeros((), dtype=torch.float64)
        if update_memory and self.training:
            write_norm = self.stage(x, make_row_layout(*x.shape[:2], x.device))
            self.commit()
        return out, {"memory_write_norm": write_norm}
