"""Packed rows: how a call says which documents its rows consist of."""

import torch
from torch.nn import functional as F

PACKING_ARGUMENTS = ("segment_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def packed_documents(
    shape: tuple[int, ...],
    segment_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    is_plain: bool,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    **others,
) -> torch.Tensor | None:
    """Return the segment ids of packed documents, int64 `[B, M]`; None if each row is one document.

    They follow from the first of these that is given: `segment_ids`, `cu_seq_lens_q` and `cu_seq_lens_k`, `seq_idx`,
    and, in a plain call, `position_ids`.

    Args:
        shape: of the input, B and M first.
        segment_ids: int `[B, M]`; a run of equal ids is a document, negative ids are padding.
        position_ids: `[B, M]` or `[1, M]`; a document starts where they do not increase by 1.
        is_plain: whether the call has neither an attention mask nor a cache.
        cu_seq_lens_q, cu_seq_lens_k: int `[documents + 1]`, equal: 0 and the end of each document in the only row.
        seq_idx: int `[B, M]` or `[1, M]`, like `segment_ids`.
        others: further keyword arguments of the model, which are not read.

    Raises:
        ValueError: an argument has a wrong shape or value.

    Example:
        >>> import torch
        >>> from dfn_hf.modeling.modules.packing import packed_documents
        >>> packed_documents((1, 5), None, torch.tensor([[0, 1, 2, 0, 1]]), is_plain=True).tolist()
        [[0, 0, 0, 1, 1]]
    """
    batch, length = shape[:2]
    if segment_ids is not None:
        return _checked("segment_ids", segment_ids, batch, length)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        return _segments_of_ends(cu_seq_lens_q, cu_seq_lens_k, batch, length)
    if seq_idx is not None:
        return _checked("seq_idx", seq_idx, batch, length)
    if position_ids is None or not is_plain:
        return None
    jumps = _checked("position_ids", position_ids, batch, length).diff(dim=1) != 1
    return F.pad(jumps.long().cumsum(dim=1), (1, 0)) if jumps.any() else None


def refuse_packing(
    model: object,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **arguments,
) -> None:
    """Raise a ValueError if the arguments describe packed documents, for a model that takes one document per row.

    Args:
        model: named in the message.
        attention_mask: of the call, or None.
        position_ids: `[B, M]` or `[1, M]`, or None; not read if there is a mask.
        arguments: further keyword arguments of the model.
    """
    names = [name for name in PACKING_ARGUMENTS if arguments.get(name) is not None]
    if position_ids is not None and attention_mask is None and (position_ids.diff(dim=-1) != 1).any():
        names.append("position_ids")
    if names:
        raise ValueError(f"{names[0]} describes packed documents: pass {type(model).__name__} one document per row.")


def next_token_labels(labels: torch.Tensor, segment_ids: torch.Tensor | None) -> torch.Tensor:
    """Return labels `[B, M]` with −100 at the first token of each packed document, which has no context."""
    if segment_ids is None:
        return labels
    starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0)) | (segment_ids < 0)
    return labels.masked_fill(starts, -100)


def _checked(name: str, ids: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Return ids as `[B, M]`; raise a ValueError if they are neither `[B, M]` nor `[1, M]`."""
    if ids.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"{name} must be [batch, length] = {[batch, length]} or {[1, length]}, got {list(ids.shape)}."
        )
    return ids.expand(batch, -1)


def _segments_of_ends(
    cu_seq_lens_q: torch.Tensor | None, cu_seq_lens_k: torch.Tensor | None, batch: int, length: int
) -> torch.Tensor:
    """Return the segment ids `[1, M]` of documents that end at these places of the only row."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        cu_seq_lens_q = cu_seq_lens_k = cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q describes the documents of one row, but the batch has {batch}: flatten it.")
    if cu_seq_lens_q.shape != cu_seq_lens_k.shape or not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: a packed row has equal queries and keys.")
    ends = cu_seq_lens_q.flatten()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != length or (ends.diff() < 0).any():
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the length {length}, the ends of all documents, got {ends.tolist()}."
        )
    places = torch.arange(length, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends[1:].contiguous(), places, right=True)[None]
