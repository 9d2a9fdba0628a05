"""Unpads a batch at a model's input and pads it again at its output.

Inside a model every row is left-aligned: its real entities come first, padding after them. Causal convolutions,
windows and chunks therefore need no mask, because nothing causal reads what comes later.
"""

from dataclasses import dataclass, replace

import torch

from ..ops.higher_order import holds_values


@dataclass(frozen=True)
class RowLayout:
    """The layout of the entities of one call in their rows.

    Columns are the indices of the padded input; positions count the real entities of a row, including earlier calls.

    Attributes:
        mask: bool `[B, M]`, False at padded columns; None if no column is padding.
        order: int64 `[B, M]`, column of each entry of the unpadded row; None if no column is padding.
        lengths: int64 `[B]`, number of real entities of this call; None if no column is padding.
        positions: int64 `[B, M]`, position in the row.
        segment_positions: int64 `[B, M]`, position in the segment: the number of entities before it in its segment.
        segment: int64 `[B, M]`, number of the segment in its row; None if each row is one segment.

    Example:
        >>> import torch
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> mask = torch.tensor([[False, True, True], [True, True, True]])  # the first row is padded on the left
        >>> rows = make_row_layout(2, 3, torch.device("cpu"), mask=mask)
        >>> rows.unpad(torch.tensor([[0, 5, 6], [7, 8, 9]])).tolist()
        [[5, 6, 0], [7, 8, 9]]
        >>> rows.lengths.tolist()
        [2, 3]
    """

    mask: torch.Tensor | None
    order: torch.Tensor | None
    lengths: torch.Tensor | None
    positions: torch.Tensor
    segment_positions: torch.Tensor
    segment: torch.Tensor | None

    def chunk(self, start: int, stop: int) -> "RowLayout":
        """Return the layout of entries start … stop − 1 of the unpadded rows, without their columns."""
        entries = slice(start, stop)
        lengths = None if self.lengths is None else (self.lengths - start).clamp(0, stop - start)
        segment = None if self.segment is None else self.segment[:, entries]
        return RowLayout(None, None, lengths, self.positions[:, entries], self.segment_positions[:, entries], segment)

    def unpad(self, columns: torch.Tensor) -> torch.Tensor:
        """Gather columns `[B, M, ...]` into left-aligned rows `[B, M, ...]`, zero after the last real entity."""
        if self.order is None:
            return columns
        trailing = (1,) * (columns.dim() - 2)
        rows = columns.gather(1, self.order.view(*self.order.shape, *trailing).expand_as(columns))
        return torch.where(self.token_mask().view(*self.positions.shape, *trailing), rows, rows.new_zeros(()))

    def token_mask(self) -> torch.Tensor:
        """Return which entries of the unpadded rows are real entities, bool `[B, M]`."""
        entries = torch.arange(self.positions.shape[1], device=self.positions.device)
        lengths = self.positions.shape[1] if self.lengths is None else self.lengths[:, None]
        return (entries < lengths).expand_as(self.positions)

    def tokens_after(self) -> torch.Tensor:
        """Return the number of this call's entities after each entry, int64 `[B, M]`; negative at padding."""
        entries = torch.arange(self.positions.shape[1], device=self.positions.device)
        lengths = self.positions.shape[1] if self.lengths is None else self.lengths[:, None]
        return (lengths - 1 - entries).expand_as(self.positions)

    def segment_sizes(self) -> torch.Tensor:
        """Return the number of entities of each entry's segment, or of its row without segments, int64 `[B, M]`."""
        real = self.token_mask()
        if self.segment is None:
            return real.sum(dim=1, keepdim=True).expand_as(real)
        sizes = torch.zeros_like(self.segment).scatter_add_(1, self.segment, real.long())
        return sizes.gather(1, self.segment)

    def segment_mean(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean of `[B, M, features]` over the entities of each entry's segment, `[B, M, features]`."""
        segment = torch.zeros_like(self.positions) if self.segment is None else self.segment
        segment = segment[..., None].expand_as(x)
        sums = torch.zeros_like(x).scatter_add(1, segment, x * self.token_mask()[..., None])
        return sums.gather(1, segment) / self.segment_sizes().clamp(min=1)[..., None]

    def flip_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the positions `[B, ...]` of entities in the flipped rows; −1 stays −1."""
        lengths = (
            self.positions.shape[1] if self.lengths is None else self.lengths.view(-1, *(1,) * (positions.dim() - 1))
        )
        return torch.where(positions < 0, positions, lengths - 1 - positions)

    def flip(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Reverse the real entities of each row along `dim` of `x`; padding stays at the end."""
        if self.lengths is None:
            return x.flip(dim)
        entries = torch.arange(self.positions.shape[1], device=x.device)
        entries = torch.where(self.token_mask(), self.lengths[:, None] - 1 - entries, entries)
        shape = [1] * x.dim()
        shape[0], shape[dim] = entries.shape
        return x.gather(dim, entries.view(shape).expand_as(x))

    def flipped(self) -> "RowLayout":
        """Return the layout of the reversed rows, without columns and segments. Requires a call without a past."""
        segment_positions = (
            self.segment_positions
            if self.segment is None
            else self.flip((self.segment_sizes() - 1 - self.segment_positions).clamp(min=0))
        )
        return RowLayout(None, None, self.lengths, self.positions, segment_positions, None)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of `[B, M]` over the real entities, a scalar."""
        real = self.token_mask()
        return values.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Scatter rows `[B, M, ...]` back to columns `[B, M, ...]`, zero at padding."""
        if self.order is None:
            return rows
        trailing = (1,) * (rows.dim() - 2)
        entry = self.order.argsort(dim=1)
        columns = rows.gather(1, entry.view(*entry.shape, *trailing).expand_as(rows))
        return torch.where(self.mask.view(*self.mask.shape, *trailing), columns, columns.new_zeros(()))

    def pad_with_grad(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (padded columns, rows gathered back from them): later results have a gradient at the columns."""
        columns = self.pad(rows)
        return columns, self.unpad(columns)

    def pad_queries_with_grad(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`pad_with_grad` of weights `[B, H, M, ...]`."""
        columns = self.pad(weights.transpose(1, 2)).transpose(1, 2)
        return columns, self.unpad(columns.transpose(1, 2)).transpose(1, 2)


def make_row_layout(
    batch: int,
    length: int,
    device: torch.device,
    *,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
    aligned_past: int | None = 0,
    look: bool = True,
) -> RowLayout:
    """Return the layout of one call of `batch` rows and `length` columns.

    Args:
        mask: bool `[B, M]`, False at padding; None if no column is padding.
        segment_ids: int `[B, M]`; a run of equal ids is a segment, negative ids are padding. Requires a call without a
            past.
        past: int64 `[B]`, number of entities of earlier calls; not needed if `aligned_past` is an int.
        aligned_past: number of entities of earlier calls if equal in all rows, else None.
        look: whether to test if `mask` masks anything, which synchronises the device.

    Example:
        >>> import torch
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> rows = make_row_layout(1, 5, torch.device("cpu"), segment_ids=torch.tensor([[0, 0, 0, 1, 1]]))
        >>> rows.segment_positions.tolist()
        [[0, 1, 2, 0, 1]]
    """
    if segment_ids is not None:
        real = segment_ids >= 0
        mask = real if mask is None else mask & real
    if mask is not None and look and holds_values(mask) and mask.all():
        mask = None
    columns = torch.arange(length, device=device)
    if aligned_past is not None:
        positions = (columns + aligned_past).expand(batch, length)
    else:
        positions = columns + past[:, None]
    rows = RowLayout(None, None, None, positions, positions, None)
    if mask is not None:
        order = (~mask).int().argsort(dim=1, stable=True)
        rows = replace(rows, mask=mask, order=order, lengths=mask.sum(dim=1))
    if segment_ids is None:
        return rows
    segments = rows.unpad(segment_ids)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(starts, columns, 0).cummax(dim=1).values
    return replace(rows, segment_positions=positions - first, segment=starts.cumsum(dim=1) - 1)


def column_mask(
    attention_mask: torch.Tensor | None, batch: int, length: int, past: int | None, name: str = "attention_mask"
) -> torch.Tensor | None:
    """Return the mask of this call's columns, bool `[B, M]`; None if there is no mask.

    Args:
        attention_mask: `[B, M]`, or `[B, past + M]` with the columns of earlier calls.
        batch, length: B and M.
        past: columns of earlier calls; None if unknown, then any number is accepted.
        name: of the mask in error messages.

    Raises:
        ValueError: the mask has another shape.
    """
    if attention_mask is None:
        return None
    if past is None:
        past = max(attention_mask.shape[-1] - length, 0)
    expected = f"{[batch, length]}"
    if past:
        expected += f" or, with the {past} columns of earlier calls, {[batch, past + length]}"
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != batch
        or attention_mask.shape[1] not in (length, past + length)
    ):
        raise ValueError(f"{name} must be [batch, length] = {expected}, got {list(attention_mask.shape)}.")
    return attention_mask[:, -length:].bool()


def pad_index(rows: RowLayout, state=None) -> torch.Tensor:
    """Return the column of each entity of the rows so far, int64 `[B, N]`; this call's are last.

    Args:
        state: `cache.FlowCacheLayer` before its `finish_forward`, or None.
    """
    batch, length = rows.positions.shape
    mask = rows.mask if rows.mask is not None else rows.positions.new_ones(batch, length, dtype=torch.bool)
    if state is not None:
        before = state.mask if state.mask is not None else mask.new_ones(batch, state.seq_length)
        mask = torch.cat([before, mask], dim=1)
    return (~mask).int().argsort(dim=1, stable=True)


def pad_attention(weights: torch.Tensor, rows: RowLayout, state=None) -> torch.Tensor:
    """Convert weights `[B, H, M, N]` between entities to weights between columns, zero at padding.

    Args:
        state: as for `pad_index`.
    """
    positions = torch.arange(weights.shape[-1], device=weights.device)[None]
    return pad_attention_with_grad(weights, positions, rows, state)[0]


def pad_attention_with_grad(
    weights: torch.Tensor, positions: torch.Tensor, rows: RowLayout, state=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert weights between entities to weights between columns, and back, like `RowLayout.pad_with_grad`.

    Args:
        weights: `[B, H, M, N]`.
        positions: int64 `[B or 1, N]`, position of each key in its row. Keys outside the row must have weight 0.
        rows: layout of the call.
        state: as for `pad_index`.

    Returns:
        (weights between columns `[B, H, M, columns so far]`, zero at padding; the weights gathered back `[B, H, M,
        N]`).
    """
    columns = pad_index(rows, state)
    inside = (positions >= 0) & (positions < columns.shape[1])
    positions = positions.clamp(0, columns.shape[1] - 1).expand(columns.shape[0], -1)
    columns, length = columns.gather(1, positions)[:, None, None].expand_as(weights), columns.shape[1]
    dense = weights.new_zeros(*weights.shape[:3], length).scatter_add(-1, columns, weights)
    dense, back = rows.pad_queries_with_grad(dense)
    return dense, back.gather(-1, columns) * inside[:, None, None]
