"""Liquid without frequency attention: its frames stay as they are, everything around them is the same."""

import torch
from torch import nn

from dfn_hf import LiquidForSeq2SeqLM
from dfn_hf.modeling.liquid.frequency_attention import FrequencyHyenaAttention


class PlainFrames(nn.Module):
    """Takes the place of a `FrequencyHyenaAttention` and keeps its projection and norm.

    Args:
        attention: whose place is taken; coarse: whether it is an encoder's, whose long rows have a coarse frame.
    """

    def __init__(self, attention: FrequencyHyenaAttention, coarse: bool):
        super().__init__()
        self.coarse = coarse
        self.out_proj, self.norm = attention.out_proj, attention.norm

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """`[B, N, L, D]` → the same, the coarse frame zero."""
        if not self.coarse or frames.shape[1] == 1:
            return frames
        return torch.cat([frames[:, :-1], torch.zeros_like(frames[:, -1:])], dim=1)

    def project(self, y: torch.Tensor) -> torch.Tensor:
        """`[..., D]` in time → the same."""
        return self.norm(self.out_proj(y))


def remove_frequency_attention(model: LiquidForSeq2SeqLM) -> None:
    """Take the frequency attention out of encoder and decoder."""
    for embedding, coarse in ((model.model.encoder.embedding, True), (model.model.decoder.embedding, False)):
        embedding.frequency_attention = PlainFrames(embedding.frequency_attention, coarse)
