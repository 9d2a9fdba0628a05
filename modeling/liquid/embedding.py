"""Embedding of tokens by convolutions, frequency attention and adaptive compression (Liquid, §3.2).

Shape letters: B batch, M entities of this call, D features.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..modules.cache import FlowCacheLayer
from ..modules.row_layout import RowLayout
from ..ops.chunking import apply_chunked, apply_chunked_overlapping
from .frequency_attention import FrequencyHyenaAttention
from .spectral_frames import AdaptiveLowPass, LaggedFrames, RowFrames


@dataclass
class Compression:
    """What the low-pass of an embedding did.

    Attributes:
        reconstruction_loss: `[B]`, mean distance that compression makes to a row's real tokens; 0 if nothing is compressed.
        ratio: scalar, mean share of the frequencies that frames keep.
    """

    reconstruction_loss: torch.Tensor
    ratio: torch.Tensor


class EnhancedLiquidEmbedding(nn.Module):
    """Of the encoder: LayerNorm(Linear(c + s)), c = token + position → 2 × (convolution, GELU) → LayerNorm,
    s = c → frequency attention → adaptive low-pass.

    The paper goes on with s alone, which has phases of its own and few frequencies: little to tell a token from its
    neighbours by.

    Args:
        config: `LiquidConfig`.
        causal: the decoder's, `CausalLiquidEmbedding`, has another order and frame length.
    """

    causal = False

    def __init__(self, config):
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.frame_length = config.decoder_frame_length if self.causal else config.frame_length
        self.position_embedding = None
        if config.learned_positions:
            self.position_embedding = nn.Embedding(config.max_position_embeddings, size)
        self.conv1 = nn.Conv1d(size, size, config.conv_kernel)
        self.conv2 = nn.Conv1d(size, size, config.conv_kernel)
        self.layer_norm = nn.LayerNorm(size, eps)
        self.frequency_attention = FrequencyHyenaAttention(
            size, self.frame_length, config.num_attention_heads, config.attention_dropout, eps
        )
        self.low_pass = AdaptiveLowPass(self.frame_length, config.base_compression_ratio, config.min_compression_ratio)
        self.proj = nn.Linear(size, size)
        self.proj_norm = nn.LayerNorm(size, eps)

    def forward(self, x: torch.Tensor, rows: RowLayout) -> tuple[torch.Tensor, Compression]:
        """`[B, M, D]` embedded tokens, zero where not real, → (the same shape, what compression did)."""
        real = rows.token_mask()[..., None]
        x = self._add_positions(x, rows)
        for conv in (self.conv1, self.conv2):
            side = conv.kernel_size[0] // 2
            x = self._convolve(conv, F.pad(only(real, x), (0, 0, side, side)))
        c = only(real, apply_chunked(self.layer_norm, x))
        framing = RowFrames(self.frame_length, rows)
        with torch.autocast(c.device.type, enabled=False):
            wide = c.to(torch.promote_types(c.dtype, torch.float32))
            heard = apply_chunked(self.frequency_attention, framing.split(wide, coarse=True), size=self.frame_length)
            heard = framing.join(heard, coarse=True).to(c.dtype)
        heard = only(real, apply_chunked(self.frequency_attention.project, heard))
        with torch.autocast(c.device.type, enabled=False):
            wide = heard.to(torch.promote_types(heard.dtype, torch.float32))
            frames, ratio = apply_chunked(self.low_pass, framing.split(wide, coarse=False), size=self.frame_length)
            compressed = framing.join(frames, coarse=False).to(heard.dtype)
        out = apply_chunked(self._project, c + compressed)
        distance = only(real[..., 0], apply_chunked(self._distance, out, c + heard))
        reconstruction_loss = distance.sum(dim=1) / real.sum(dim=(1, 2)).clamp(min=1)
        return out, Compression(reconstruction_loss, ratio.detach().mean())

    def _add_positions(self, x: torch.Tensor, rows: RowLayout) -> torch.Tensor:
        if self.position_embedding is None:
            return x
        longest = self.position_embedding.num_embeddings
        index = rows.positions.masked_fill(~rows.token_mask(), 0)
        if not torch.compiler.is_compiling() and int(index.max()) >= longest:
            raise ValueError(
                f"The input holds {int(index.max()) + 1} tokens and `max_position_embeddings` is {longest}: shorten "
                "it, or train a model with a larger value, or without `learned_positions`, which has no limit."
            )
        return x + self.position_embedding(index)

    def _convolve(self, conv: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
        """GELU of the convolution: `[B, kernel size − 1 + M, D]` → `[B, M, D]`."""
        return apply_chunked_overlapping(
            lambda piece: F.gelu(conv(piece.transpose(1, 2)).transpose(1, 2)), x, conv.kernel_size[0] - 1
        )

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj_norm(self.proj(x.flatten(0, -2))).view_as(x)

    def _distance(self, out: torch.Tensor, uncompressed: torch.Tensor) -> torch.Tensor:
        """Mean over the features of the distance that compression makes to what the projection gives."""
        with torch.no_grad():
            whole = self._project(uncompressed)
        return (out - whole).abs().mean(dim=-1, dtype=torch.promote_types(out.dtype, torch.float32))


class CausalLiquidEmbedding(EnhancedLiquidEmbedding):
    """Of the decoder: LayerNorm(Linear(c + s)), c the convolutions' output, s what frequency attention and low-pass
    made of the frame completed before the entity's own, at the same place in it."""

    causal = True

    def forward(
        self, x: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None = None
    ) -> tuple[torch.Tensor, Compression]:
        """As for the encoder.

        Args:
            state: holds taps and the frames before this call, or None.
        """
        real = rows.token_mask()[..., None]
        x = self._add_positions(x, rows)
        for name, conv in (("conv1", self.conv1), ("conv2", self.conv2)):
            before = conv.kernel_size[0] - 1
            x = self._convolve(conv, self._history(name, only(real, x), before, state))
        c = only(real, apply_chunked(self.layer_norm, x))
        framing = LaggedFrames(self.frame_length, rows)
        history = self._history("frames", c, framing.history, state)
        with torch.autocast(c.device.type, enabled=False):
            wide = framing.split(history.to(torch.promote_types(c.dtype, torch.float32)))
            heard = apply_chunked(self.frequency_attention, wide, size=self.frame_length).to(c.dtype)
        heard = apply_chunked(self.frequency_attention.project, heard, size=self.frame_length)
        frames, ratio = apply_chunked(self.low_pass, heard, size=self.frame_length)
        frames = frames.to(c.dtype)
        out = apply_chunked(self._project, c + framing.lag(frames))
        if state is None:
            reconstruction_loss = self._reconstruction(frames, heard, framing.completed(frames.shape[1]))
        else:
            reconstruction_loss = ratio.new_zeros(ratio.shape[0])  # a loss is of whole rows
        return out, Compression(reconstruction_loss, ratio.detach().mean())

    def _reconstruction(self, frames, heard, completed) -> torch.Tensor:
        distances = apply_chunked(
            lambda x, y: self._distance(self._project(x), y), frames, heard, size=self.frame_length
        )
        distance = distances.mean(dim=2)
        return only(completed, distance).sum(dim=1) / completed.sum(dim=1).clamp(min=1)

    def _history(self, name: str, x: torch.Tensor, before: int, state: FlowCacheLayer | None) -> torch.Tensor:
        return F.pad(x, (0, 0, before, 0)) if state is None else state.roll(name, x, before)


def only(where: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x where it is real, else 0."""
    return torch.where(where, x, x.new_zeros(()))
