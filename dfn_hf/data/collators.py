"""Batches of packed blocks for any causal language model."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel, default_data_collator


class PackedBlockCollator:
    """Collate packed blocks so that no token reads another document, whatever the model.

    A block has `input_ids`, `labels` and `segment_ids`, each `[block_size]` int64. A model whose forward pass takes
    `segment_ids` gets them. Any other gets `position_ids` that start again at 0 in each document, from which
    transformers' attention models build a mask per document while nothing is cached, as in training.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.takes_segments = "segment_ids" in inspect.signature(model.forward).parameters

    def __call__(self, blocks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = default_data_collator(blocks)
        if not self.takes_segments:
            batch["position_ids"] = positions_in_segments(batch.pop("segment_ids"))
        return batch


def positions_in_segments(segment_ids: torch.Tensor) -> torch.Tensor:
    """Count from 0 within each run of equal ids: `[batch, length]` int64 to the same shape and type."""
    columns = torch.arange(segment_ids.shape[1]).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return columns - torch.where(starts, columns, 0).cummax(dim=1).values
