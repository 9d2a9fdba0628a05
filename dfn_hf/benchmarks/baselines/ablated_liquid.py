"""Liquid without frequency attention, the ablation of the spectral path."""

import torch
from torch import nn

from dfn_hf import LiquidForSeq2SeqLM
from dfn_hf.modeling.liquid.frequency_attention import FrequencyHyenaAttention


class IdentityFrequencyAttention(nn.Module):
    """Replaces `FrequencyHyenaAttention` by the identity, and keeps its output projection and norm.

    Args:
        attention: the module to replace.
        coarse: whether it belongs to the encoder, whose rows with several frames have a coarse frame in addition.
    """

    def __init__(self, attention: FrequencyHyenaAttention, coarse: bool):
        super().__init__()
        self.coarse = coarse
        self.out_proj, self.norm = attention.out_proj, attention.norm

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the frames `[B, N, L, D]`, the coarse frame set to 0."""
        if not self.coarse or frames.shape[1] == 1:
            return frames
        return torch.cat([frames[:, :-1], torch.zeros_like(frames[:, -1:])], dim=1)

    def project(self, y: torch.Tensor) -> torch.Tensor:
        """Project and normalise `y` `[..., D]` in the time domain."""
        return self.norm(self.out_proj(y))


def remove_frequency_attention(model: LiquidForSeq2SeqLM) -> None:
    """Replace the frequency attention of encoder and decoder in place."""
    for embedding, coarse in ((model.model.encoder.embedding, True), (model.model.decoder.embedding, False)):
        embedding.frequency_attention = IdentityFrequencyAttention(embedding.frequency_attention, coarse)
