"""Token embedding by convolutions, frequency attention and adaptive compression (Liquid paper, §3.2).

Shape letters: B batch, M entities of this call, D features.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..modules.cache import FlowCacheLayer
from ..modules.linear import linear_of_batch
from ..modules.row_layout import RowLayout
from ..ops.chunking import apply_chunked, apply_chunked_overlapping
from .frequency_attention import FrequencyHyenaAttention
from .spectral_frames import AdaptiveLowPass, LaggedFrames, RowFrames


@dataclass
class Compression:
    """Statistics of an embedding's low-pass filter.

    Attributes:
        reconstruction_loss: `[B]`, mean distance between compressed and uncompressed embeddings over a row's real
            tokens; 0 if nothing is compressed.
        ratio: scalar, mean fraction of the frequencies that frames keep.
    """

    reconstruction_loss: torch.Tensor
    ratio: torch.Tensor


class EnhancedLiquidEmbedding(nn.Module):
    """Encoder embedding LayerNorm(Linear(c + s)) (Liquid paper, §3.2).

    c is token + position → 2 × (convolution, GELU) → LayerNorm; s is c → frequency attention → adaptive low-pass
    filter. The paper continues with s alone. s has few frequencies and altered phases, which barely distinguish a
    token from its neighbours, so c is added.

    Args:
        config: `LiquidConfig`.

    Example:
        >>> import torch
        >>> from dfn_hf import EnhancedLiquidEmbedding, LiquidConfig
        >>> from dfn_hf.modeling.modules.row_layout import make_row_layout
        >>> embedding = EnhancedLiquidEmbedding(LiquidConfig(hidden_size=32))
        >>> x = torch.randn(2, 10, 32)
        >>> out, compression = embedding(x, make_row_layout(2, 10, x.device))
        >>> out.shape
        torch.Size([2, 10, 32])
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
        """Embed whole rows.

        Args:
            x: token embeddings `[B, M, D]`, zero at padding.
            rows: `row_layout.RowLayout` of this call.

        Returns:
            (`[B, M, D]`; statistics of the compression).
        """
        real = rows.token_mask()[..., None]
        x = self._add_positions(x, rows)
        for conv in (self.conv1, self.conv2):
            side = conv.kernel_size[0] // 2
            x = self._convolve(conv, F.pad(select_real(real, x), (0, 0, side, side)))
        c = select_real(real, apply_chunked(self.layer_norm, x))
        framing = RowFrames(self.frame_length, rows)
        with torch.autocast(c.device.type, enabled=False):
            wide = c.to(torch.promote_types(c.dtype, torch.float32))
            attended = apply_chunked(
                self.frequency_attention, framing.split(wide, coarse=True), size=self.frame_length
            )
            attended = framing.join(attended, coarse=True).to(c.dtype)
        attended = select_real(real, apply_chunked(self.frequency_attention.project, attended))
        with torch.autocast(c.device.type, enabled=False):
            wide = attended.to(torch.promote_types(attended.dtype, torch.float32))
            frames, ratio = apply_chunked(self.low_pass, framing.split(wide, coarse=False), size=self.frame_length)
            compressed = framing.join(frames, coarse=False).to(attended.dtype)
        out = apply_chunked(self._project, c + compressed)
        distance = select_real(real[..., 0], apply_chunked(self._distance, out, c + attended))
        reconstruction_loss = distance.sum(dim=1) / real.sum(dim=(1, 2)).clamp(min=1)
        return out, Compression(reconstruction_loss, ratio.detach().mean())

    def _add_positions(self, x: torch.Tensor, rows: RowLayout) -> torch.Tensor:
        """Add the learnt position embeddings, if any. Raises `ValueError` if a row is too long for them."""
        if self.position_embedding is None:
            return x
        longest = self.position_embedding.num_embeddings
        index = rows.positions.masked_fill(~rows.token_mask(), 0)
        if not torch.compiler.is_compiling() and int(index.max()) >= longest:
            raise ValueError(
                f"The input has {int(index.max()) + 1} tokens, but `max_position_embeddings` is {longest}: shorten "
                "it, or train a model with a larger value or with `learned_positions=False`, which has no limit."
            )
        return x + self.position_embedding(index)

    def _convolve(self, conv: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
        """Apply convolution and GELU: `[B, kernel size − 1 + M, D]` → `[B, M, D]`."""
        return apply_chunked_overlapping(
            lambda chunk: F.gelu(conv(chunk.transpose(1, 2)).transpose(1, 2)), x, conv.kernel_size[0] - 1
        )

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj_norm(linear_of_batch(self.proj, x))

    def _distance(self, out: torch.Tensor, uncompressed: torch.Tensor) -> torch.Tensor:
        """Return the mean absolute difference over the features between `out` and the projection of `uncompressed`.

        No gradient flows through the latter.
        """
        with torch.no_grad():
            reference = self._project(uncompressed)
        return (out - reference).abs().mean(dim=-1, dtype=torch.promote_types(out.dtype, torch.float32))


class CausalLiquidEmbedding(EnhancedLiquidEmbedding):
    """Decoder embedding LayerNorm(Linear(c + s)) (Liquid paper, §3.2).

    c is the output of the causal convolutions. s is the preceding completed frame, after frequency attention and
    low-pass filter, at the same offset within the frame as the entity.
    """

    causal = True

    def forward(
        self, x: torch.Tensor, rows: RowLayout, state: FlowCacheLayer | None = None
    ) -> tuple[torch.Tensor, Compression]:
        """Embed rows causally.

        Args:
            x: token embeddings `[B, M, D]`, zero at padding.
            rows: `row_layout.RowLayout` of this call.
            state: cache layer that holds the inputs of the convolutions and the preceding frames, or None.

        Returns:
            (`[B, M, D]`; statistics of the compression; their loss is 0 with `state`, because it is a loss over whole
            rows).
        """
        real = rows.token_mask()[..., None]
        x = self._add_positions(x, rows)
        for name, conv in (("conv1", self.conv1), ("conv2", self.conv2)):
            before = conv.kernel_size[0] - 1
            x = self._convolve(conv, self._history(name, select_real(real, x), before, state))
        c = select_real(real, apply_chunked(self.layer_norm, x))
        framing = LaggedFrames(self.frame_length, rows)
        history = self._history("frames", c, framing.history, state)
        with torch.autocast(c.device.type, enabled=False):
            wide = framing.split(history.to(torch.promote_types(c.dtype, torch.float32)))
            attended = apply_chunked(self.frequency_attention, wide, size=self.frame_length).to(c.dtype)
        attended = apply_chunked(self.frequency_attention.project, attended, size=self.frame_length)
        frames, ratio = apply_chunked(self.low_pass, attended, size=self.frame_length)
        frames = frames.to(c.dtype)
        out = apply_chunked(self._project, c + framing.lag(frames))
        if state is None:
            reconstruction_loss = self._reconstruction(frames, attended, framing.completed(frames.shape[1]))
        else:
            reconstruction_loss = ratio.new_zeros(ratio.shape[0])  # the loss is defined on whole rows
        return out, Compression(reconstruction_loss, ratio.detach().mean())

    def _reconstruction(self, frames: torch.Tensor, attended: torch.Tensor, completed: torch.Tensor) -> torch.Tensor:
        """Average the distance that compression causes over the completed frames of each row, `[B]`."""
        distances = apply_chunked(
            lambda x, y: self._distance(self._project(x), y), frames, attended, size=self.frame_length
        )
        distance = distances.mean(dim=2)
        return select_real(completed, distance).sum(dim=1) / completed.sum(dim=1).clamp(min=1)

    def _history(self, name: str, x: torch.Tensor, before: int, state: FlowCacheLayer | None) -> torch.Tensor:
        """Prepend the `before` preceding entities: from the cache, or zeros."""
        return F.pad(x, (0, 0, before, 0)) if state is None else state.roll(name, x, before)


def select_real(real: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return x where `real` is True, else 0."""
    return torch.where(real, x, x.new_zeros(()))
