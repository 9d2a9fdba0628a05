"""Collates packed blocks for causal language models."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel, default_data_collator


class PackedBlockCollator:
    """Collates packed blocks so that no token attends to another document.

    A block has `input_ids`, `labels` and `segment_ids`, each `[block_size]` int64. A model whose `forward` has an
    argument `segment_ids` receives them. Any other model receives `position_ids` that restart at 0 in each document;
    without a cache, transformers' attention models derive a block-diagonal mask from them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.takes_segments = "segment_ids" in inspect.signature(model.forward).parameters

    def __call__(self, blocks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = default_data_collator(blocks)
        if not self.takes_segments:
            batch["position_ids"] = positions_in_segments(batch.pop("segment_ids"))
        return batch


def positions_in_segments(segment_ids: torch.Tensor) -> torch.Tensor:
    """Position of each token within its run of equal segment ids, int64 `[batch, length]` like the argument."""
    columns = torch.arange(segment_ids.shape[1]).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return columns - torch.where(starts, columns, 0).cummax(dim=1).values
