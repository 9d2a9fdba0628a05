"""Rows without holes: real entities of a batch moved to the left at a model's boundary, and scattered back.

Behind the boundary every row is left-aligned, so convolutions, windows, time and chunks need no mask: padding stands
after the last real entity of its row, where nothing causal can see it.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class RowLayout:
    """How the entities of one call lie in their rows.

    Attributes:
        mask: bool `[batch, length]`, which columns are real; None if all are.
        order: int64 `[batch, length]`, the column of each place of the compact row; None if all are real.
        lengths: int64 `[batch]`, real entities of this call; None if all are real.
        positions: int64 `[batch, length]`, place in the whole row, the entities of earlier calls included.
        segment_positions: int64 `[batch, length]`, how many of the entities just before it belong to the same segment.
        segment: int64 `[batch, length]`, number of the segment within its row; None if rows are one segment.
    """

    mask: torch.Tensor | None
    order: torch.Tensor | None
    lengths: torch.Tensor | None
    positions: torch.Tensor
    segment_positions: torch.Tensor
    segment: torch.Tensor | None

    def span(self, places: slice) -> "RowLayout":
        """The rows of a span of places, for what happens within rows: columns are no longer known."""
        length = places.stop - places.start
        counts = None if self.lengths is None else (self.lengths - places.start).clamp(0, length)
        segment = None if self.segment is None else self.segment[:, places]
        return RowLayout(None, None, counts, self.positions[:, places], self.segment_positions[:, places], segment)

    def unpad(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns `[batch, length, ...]` → rows of the same shape, zero after the last real entity."""
        if self.order is None:
            return columns
        trailing = (1,) * (columns.dim() - 2)
        rows = columns.gather(1, self.order.view(*self.order.shape, *trailing).expand_as(columns))
        return torch.where(self.token_mask().view(*self.positions.shape, *trailing), rows, rows.new_zeros(()))

    def token_mask(self) -> torch.Tensor:
        """Which places of the rows hold a real entity, bool `[batch, length]`."""
        places = torch.arange(self.positions.shape[1], device=self.positions.device)
        counts = self.positions.shape[1] if self.lengths is None else self.lengths[:, None]
        return (places < counts).expand_as(self.positions)

    def tokens_after(self) -> torch.Tensor:
        """Real entities of this call behind each one, int64 `[batch, length]`; negative where it is not real."""
        places = torch.arange(self.positions.shape[1], device=self.positions.device)
        counts = self.positions.shape[1] if self.lengths is None else self.lengths[:, None]
        return (counts - 1 - places).expand_as(self.positions)

    def segment_sizes(self) -> torch.Tensor:
        """Real entities of each one's segment, int64 `[batch, length]`; of its row, without segments."""
        real = self.token_mask()
        if self.segment is None:
            return real.sum(dim=1, keepdim=True).expand_as(real)
        sizes = torch.zeros_like(self.segment).scatter_add_(1, self.segment, real.long())
        return sizes.gather(1, self.segment)

    def segment_mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean of `[batch, length, features]` over the real entities of each one's segment, of the same shape."""
        segment = torch.zeros_like(self.positions) if self.segment is None else self.segment
        segment = segment[..., None].expand_as(x)
        sums = torch.zeros_like(x).scatter_add(1, segment, x * self.token_mask()[..., None])
        return sums.gather(1, segment) / self.segment_sizes().clamp(min=1)[..., None]

    def flip_positions(self, places: torch.Tensor) -> torch.Tensor:
        """Where the entities at `places` `[batch, ...]` stand when each row is read from its end; −1 stays."""
        counts = self.positions.shape[1] if self.lengths is None else self.lengths.view(-1, *(1,) * (places.dim() - 1))
        return torch.where(places < 0, places, counts - 1 - places)

    def flip(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Rows along `dim` of `x`, read from their end; what stands behind their last real entity stays there."""
        if self.lengths is None:
            return x.flip(dim)
        places = torch.arange(self.positions.shape[1], device=x.device)
        places = torch.where(self.token_mask(), self.lengths[:, None] - 1 - places, places)
        shape = [1] * x.dim()
        shape[0], shape[dim] = places.shape
        return x.gather(dim, places.view(shape).expand_as(x))

    def flipped(self) -> "RowLayout":
        """The rows read from their end, for what asks for places and reach alone. Only without a past."""
        reach = (
            self.segment_positions
            if self.segment is None
            else self.flip((self.segment_sizes() - 1 - self.segment_positions).clamp(min=0))
        )
        return RowLayout(None, None, self.lengths, self.positions, reach, None)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of `[batch, length]` over the real entities, a scalar."""
        real = self.token_mask()
        return values.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[batch, length, ...]` → columns of the same shape, zero where padded."""
        if self.order is None:
            return rows
        trailing = (1,) * (rows.dim() - 2)
        place = self.order.argsort(dim=1)
        columns = rows.gather(1, place.view(*place.shape, *trailing).expand_as(rows))
        return torch.where(self.mask.view(*self.mask.shape, *trailing), columns, columns.new_zeros(()))

    def pad_with_grad(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows → (columns, the rows read back from them), so that what becomes of the rows has a gradient there."""
        columns = self.pad(rows)
        return columns, self.unpad(columns)

    def pad_queries_with_grad(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`pad_with_grad` of weights `[batch, heads, length, ...]`."""
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
    """The rows of one call.

    Args:
        mask: bool `[batch, length]`, True where real.
        segment_ids: int `[batch, length]`; a run of equal ids is a segment, negative is padding. Only without a past.
        past: int64 `[batch]`, entities of earlier calls; None if `aligned_past` says it all.
        aligned_past: their number if it is the same in every row.
        look: whether a mask may be read for whether it masks anything, which waits for the device.
    """
    if segment_ids is not None:
        real = segment_ids >= 0
        mask = real if mask is None else mask & real
    if mask is not None and look and not torch.compiler.is_compiling() and mask.all():
        mask = None
    places = torch.arange(length, device=device)
    if aligned_past is not None:
        index = (places + aligned_past).expand(batch, length)
    else:
        index = places + past[:, None]
    rows = RowLayout(None, None, None, index, index, None)
    if mask is not None:
        order = (~mask).int().argsort(dim=1, stable=True)
        rows = replace(rows, mask=mask, order=order, lengths=mask.sum(dim=1))
    if segment_ids is None:
        return rows
    segments = rows.unpad(segment_ids)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(starts, places, 0).cummax(dim=1).values
    return replace(rows, segment_positions=index - first, segment=starts.cumsum(dim=1) - 1)


def column_mask(
    attention_mask: torch.Tensor | None, batch: int, length: int, past: int | None, name: str = "attention_mask"
) -> torch.Tensor | None:
    """The mask of this call's columns, bool `[batch, length]`, from one of these or of all columns so far.

    Args:
        past: columns of earlier calls; None if that is not known, so that any number will do.
    """
    if attention_mask is None:
        return None
    if past is None:
        past = max(attention_mask.shape[-1] - length, 0)
    columns = f"{[batch, length]}"
    if past:
        columns += f" or, with the {past} columns before, {[batch, past + length]}"
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != batch
        or attention_mask.shape[1] not in (length, past + length)
    ):
        raise ValueError(f"{name} must be [batch, length] = {columns}; got {list(attention_mask.shape)}.")
    return attention_mask[:, -length:].bool()


def packed_segments(position_ids: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """Segment ids from positions that start again, None if they never do."""
    if position_ids is None:
        return None
    if position_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"position_ids must be [batch, length] = {[batch, length]} or {[1, length]}, "
            f"got {list(position_ids.shape)}."
        )
    jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not jumps.any():
        return None
    return torch.nn.functional.pad(jumps.long().cumsum(dim=1), (1, 0)).expand(batch, -1)


def pad_index(rows: RowLayout, state=None) -> torch.Tensor:
    """Column of each entity of the rows so far, int64 `[batch, N]`; those of this call last.

    Args:
        state: `cache.FlowCacheLayer` before its `commit`, or None.
    """
    batch, length = rows.positions.shape
    mask = rows.mask if rows.mask is not None else rows.positions.new_ones(batch, length, dtype=torch.bool)
    if state is not None:
        before = state.mask if state.mask is not None else mask.new_ones(batch, state.seq_length)
        mask = torch.cat([before, mask], dim=1)
    return (~mask).int().argsort(dim=1, stable=True)


def pad_attention(weights: torch.Tensor, rows: RowLayout, state=None) -> torch.Tensor:
    """Weights `[batch, heads, M, N]` between rows' entities → between columns, zero where padded.

    Args:
        state: as for `pad_index`.
    """
    places = torch.arange(weights.shape[-1], device=weights.device)[None]
    return pad_attention_with_grad(weights, places, rows, state)[0]


def pad_attention_with_grad(
    weights: torch.Tensor, places: torch.Tensor, rows: RowLayout, state=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights between rows' entities → (between columns, the weights read back from there), as `RowLayout.pad_with_grad`.

    Args:
        weights: `[batch, heads, M, N]`.
        places: int64 `[batch or 1, N]`, place in its row of each entity that is read; outside its row it weighs 0.
        state: as for `pad_index`.

    Returns:
        (`[batch, heads, M, columns so far]`, zero where padded; `[batch, heads, M, N]`).
    """
    columns = pad_index(rows, state)
    inside = (places >= 0) & (places < columns.shape[1])
    places = places.clamp(0, columns.shape[1] - 1).expand(columns.shape[0], -1)
    columns, length = columns.gather(1, places)[:, None, None].expand_as(weights), columns.shape[1]
    dense = weights.new_zeros(*weights.shape[:3], length).scatter_add(-1, columns, weights)
    dense, back = rows.pad_queries_with_grad(dense)
    return dense, back.gather(-1, columns) * inside[:, None, None]
