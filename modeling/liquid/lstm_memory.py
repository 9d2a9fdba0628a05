"""Recurrent memory that follows each decoder block (Liquid paper, §3.7)."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..modules.cache import FlowCacheLayer
from ..modules.row_layout import RowLayout
from ..ops.chunking import apply_chunked
from ..ops.higher_order import is_vmapped


class EnhancedLSTM(nn.Module):
    """Recurrent memory Dropout(x + W₂ GELU(W₁ h + b₁) + b₂), where h is the output of an LSTM over x (Liquid paper,
    §3.7).

    Args:
        size: number of features of x.
        hidden_size: width of the LSTM.
        num_layers: number of layers of the LSTM.
        dropout: dropout rate on the output.

    Example:
        >>> import torch
        >>> from dfn_hf import EnhancedLSTM
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> lstm = EnhancedLSTM(size=8, hidden_size=16, num_layers=1)
        >>> x = torch.randn(2, 10, 8)
        >>> lstm(x, make_row_layout(2, 10, x.device)).shape
        torch.Size([2, 10, 8])
    """

    def __init__(self, size: int, hidden_size: int, num_layers: int, dropout: float = 0.0):
        super().__init__()
        self.lstm = nn.LSTM(size, hidden_size, num_layers, batch_first=True)
        self.output_layer = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None = None) -> torch.Tensor:
        """Run the LSTM over the rows; padding does not change its state.

        Args:
            x: `[B, M, size]`.
            rows: `row_layout.RowLayout` of this call.
            state: cache layer that holds h and c after the last real entity of each row, or None.

        Returns:
            `[B, M, size]`.

        Raises:
            RuntimeError: called under `torch.func.vmap`.
        """
        if not torch.compiler.is_compiling() and is_vmapped(x):
            raise RuntimeError(
                "torch.func.vmap does not support nn.LSTM: set `lstm_hidden_size=0`, or call the model once per row."
            )
        stored = None if state is None else state.data("lstm")
        before = None
        if stored is not None:
            before = tuple(part.transpose(0, 1).contiguous() for part in stored.unbind(dim=1))
        if rows.lengths is None or state is None:  # padding follows a row's end, so it cannot affect real entities
            h, after = self.lstm(x, before)
        else:
            packed = pack_padded_sequence(x, rows.lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
            h, after = self.lstm(packed, before)
            h, _ = pad_packed_sequence(h, batch_first=True, total_length=x.shape[1])
            earlier = before if before is not None else tuple(map(torch.zeros_like, after))
            has_tokens = (rows.lengths > 0)[:, None]
            after = tuple(torch.where(has_tokens, new, old) for new, old in zip(after, earlier, strict=True))
        if state is not None:
            state.replace("lstm", torch.stack([part.transpose(0, 1) for part in after], dim=1).detach())
        return apply_chunked(self._add_memory, x, h)

    def _add_memory(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Add the projected LSTM output h to x."""
        return self.dropout(x + self.output_layer(h))
