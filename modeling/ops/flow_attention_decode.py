"""One step of the flow attention: `flow_attention.flow_attention` for a single query per row, with fixed shapes.

Nothing waits for the data, as in `search_step.py`. Shape letters: B batch, H heads, N stored entities, E query/key
features, D value features, W local window, K neighbours.
"""

import math

import torch


def attention_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    fading: torch.Tensor,
    query_index: torch.Tensor,
    reach: torch.Tensor,
    neighbors: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as of `flow_attention`, of one query: `[B, H, 1, E]` and so on, without dropout."""
    batch, heads, _, features = query.shape
    age = torch.arange(window, device=query.device)
    near = torch.where(age <= reach, query_index - age, -1)[:, None].expand(-1, heads, -1)
    ids = torch.cat([near, neighbors[:, :, 0]], dim=-1)  # [B, H, W + K]
    chosen = ids.clamp(min=0)[..., None]
    with torch.autocast(query.device.type, enabled=False):
        keys = key.gather(2, chosen.expand(-1, -1, -1, features))
        values = value.gather(2, chosen.expand(-1, -1, -1, value.shape[-1])).to(query.dtype)
        fade = torch.log1p((query_index[:, None] - chosen[..., 0]).to(query.dtype))
        logits = (keys * query).sum(dim=-1) - fading[:, None] * fade
        logits = logits.masked_fill(ids < 0, -math.inf)
        total = logits.logsumexp(dim=-1, keepdim=True)
        y = (logits - total).exp().unsqueeze(2) @ values
    return y.to(value.dtype), total
