"""Flow attention of one decode step: `flow_attention.flow_attention` of a single query per row, in fixed shapes.

No operation waits for data on the device, so a step can be compiled whole and captured in a CUDA graph.

Shape letters: B batch, H heads, N stored entities, E query/key features, D value features, W local window,
K neighbours.
"""

import math

import torch


def attention_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `flow_attention` of one query per row, without dropout.

    Arguments and results are those of `flow_attention` with M = 1.
    """
    batch, heads, _, features = query.shape
    age = torch.arange(window, device=query.device)
    local = torch.where(age <= reach, query_index - age, -1)[:, None].expand(-1, heads, -1)
    ids = torch.cat([local, neighbors[:, :, 0]], dim=-1)  # [B, H, W + K]
    entries = ids.clamp(min=0)[..., None]
    with torch.autocast(query.device.type, enabled=False):
        keys = key.gather(2, entries.expand(-1, -1, -1, features))
        values = value.gather(2, entries.expand(-1, -1, -1, value.shape[-1])).to(query.dtype)
        log_age = torch.log1p((query_index[:, None] - entries[..., 0]).to(query.dtype))
        logits = (keys * query).sum(dim=-1) - decay[:, None] * log_age
        logits = logits.masked_fill(ids < 0, -math.inf)
        lse = logits.logsumexp(dim=-1, keepdim=True)
        y = (logits - lse).exp().unsqueeze(2) @ values
    return y.to(value.dtype), lse
