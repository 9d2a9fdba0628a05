"""Recurrent memory behind the blocks of a decoder (Liquid, §3.7)."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..modules.cache import FlowCacheLayer
from ..modules.row_layout import RowLayout
from ..ops.chunking import apply_chunked


class EnhancedLSTM(nn.Module):
    """Dropout(x + W₂ GELU(W₁ h + b₁) + b₂), h an LSTM over x.

    Args:
        size: features of x; hidden_size: of the LSTM; num_layers: of the LSTM.
    """

    def __init__(self, size: int, hidden_size: int, num_layers: int, dropout: float = 0.0):
        super().__init__()
        self.lstm = nn.LSTM(size, hidden_size, num_layers, batch_first=True)
        self.output_layer = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None = None) -> torch.Tensor:
        """`[B, M, size]` → the same; entities that are not real move nothing.

        Args:
            rows: `row_layout.RowLayout` of this call.
            state: holds h and c after the last real entity of each row, or None.
        """
        before = None if state is None else state.data("lstm")
        if before is not None:
            before = tuple(half.transpose(0, 1).contiguous() for half in before.unbind(dim=1))
        if rows.lengths is None or state is None:  # what stands behind a row's end moves nothing before it
            h, after = self.lstm(x, before)
        else:
            packed = pack_padded_sequence(x, rows.lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
            h, after = self.lstm(packed, before)
            h, _ = pad_packed_sequence(h, batch_first=True, total_length=x.shape[1])
            earlier = before if before is not None else tuple(map(torch.zeros_like, after))
            moved = (rows.lengths > 0)[:, None]
            after = tuple(torch.where(moved, new, old) for new, old in zip(after, earlier, strict=True))
        if state is not None:
            state.replace("lstm", torch.stack([half.transpose(0, 1) for half in after], dim=1).detach())
        return apply_chunked(self._add_memory, x, h)

    def _add_memory(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return self.dropout(x + self.output_layer(h))
