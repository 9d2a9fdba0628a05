"""Function of the original Liquid model, for converted checkpoints. It is not causal and has no cache and no padding
mask.

Only the decoder contributes to the logits. For the S tokens of a row:

    c = convolutions of (token + position);  X = FFT of c, padded to a power of two
    x = W_p Re(inverse FFT of length S of the first N bins of X),  N = ⌊S clamp((1 − complexity) / 2, 0.1, 1)⌋
    in each layer   x += attention(LayerNorm x);  x += gated deformable convolution(LayerNorm x);  x += feed-forward(x)
                    x += output(LSTM(x)); the LSTM starts each layer in its final state of the previous layer
    logits = W_o LayerNorm(x)

The complexity is the fraction of bins above a tenth of the largest bin of their feature. The attention computes what
the original computes: causal attention across the heads of one token. The original discards the outputs of its encoder
and its experts; this model has their parameters but does not run them. Parameters have the names of the original.

On a GPU the original computes the attention in half precision, and it replaces failures and non-finite values by
zeros. This model computes the function in single precision without dropout, and keeps such values or raises an error.

Shape letters: B batch, S tokens, E embed_dim, H heads, G heads of keys and values, D features of a head, T taps.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_liquid_native import LiquidNativeConfig

BASE_RATIO, MIN_RATIO = 0.5, 0.1  # bounds of the fraction of bins that the decoder's embedding keeps
BIN_THRESHOLD = 0.1  # relative to the largest bin of a feature
KERNEL, DILATION = 3, 2
LAMBDA_INIT, LAMBDA_RANGE = 0.8, (0.1, 0.9)
FEED_FORWARD_LIMIT = 100.0
ROTARY_LENGTH = 8192  # the original's attention fails beyond this length
MAX_LOGITS = 2048  # L6 returns logits of at most this number of tokens


class LiquidNativeEmbedding(nn.Module):
    """Token and position embedding, two convolutions, and the lowest bins of their spectrum."""

    activation: Callable[[torch.Tensor], torch.Tensor]
    layer_norm: nn.Module

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        size = config.embed_dim
        self.token_embedding = nn.Embedding(config.vocab_size, size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, size)
        self.conv1 = nn.Conv1d(size, size, KERNEL, padding=1)
        self.conv2 = nn.Conv1d(size, size, KERNEL, padding=1)
        self.proj = nn.Linear(size, size)
        if config.layout == "L3":
            self.activation, self.layer_norm = F.relu, nn.Identity()
        else:
            self.activation, self.layer_norm = F.gelu, nn.LayerNorm(size)
            self.proj_head = nn.Linear(size, size)  # used only by the reconstruction loss

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens: int64 `[B, S]` → `[B, S, E]`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = (self.token_embedding(tokens) + self.position_embedding(positions)).transpose(1, 2)
        for conv in (self.conv1, self.conv2):
            x = self.activation(conv(x))
        x = self.layer_norm(x.transpose(1, 2))
        return self.layer_norm(self.proj(lowest_bins(x)))


def lowest_bins(x: torch.Tensor) -> torch.Tensor:
    """Reconstruct x `[B, S, E]` from its lowest bins; the complexity of x determines their number.

    The FFT pads x to a power of two, whereas the inverse FFT has length S, so that this is not an exact inverse.
    """
    length = x.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    spectrum = torch.fft.fft(wide, n=1 << (length - 1).bit_length(), dim=1)
    magnitude = spectrum.abs()
    complexity = (magnitude > BIN_THRESHOLD * magnitude.amax(dim=1, keepdim=True)).float().mean(dim=(1, 2))
    ratio = (BASE_RATIO * (1 - complexity)).clamp(MIN_RATIO, 1)
    count = (ratio * length).long().clamp(min=1)
    kept = torch.arange(length, device=x.device) < count[:, None]
    return torch.fft.ifft(spectrum[:, :length] * kept[..., None], dim=1).real.to(x.dtype)


class FusedAttention(nn.Module):
    """Attention of L3 across the heads of each token; limited to one window, as in the original."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        self.num_heads, self.window_size = config.num_heads, config.window_size
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.out = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, E]` → `[B, S, E]`; S is at most `window_size`."""
        length = x.shape[1]
        x = F.pad(x, (0, 0, 0, self.window_size - length))
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.unbind(dim=2)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [B, window, H, D]
        # The original reinterprets its [H, window, D] tensor as [window, H · D].
        y = y.transpose(1, 2).reshape(x.shape)
        return self.out(y[:, :length])


class DifferentialAttention(nn.Module):
    """Differential attention of L6 across the heads of each token: A₁ − λ A₂.

    λ = clamp(exp(λ_q1 · λ_k1) − exp(λ_q2 · λ_k2) + 0.8, 0.1, 0.9). The original applies rotary embeddings to queries
    and keys of the same token. They do not change the products of these, and are omitted here.
    """

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        self.head_dim, self.window_size = config.head_dim, config.window_size
        self.repeats = config.num_heads // config.num_kv_groups
        size, kv_size = config.embed_dim, config.num_kv_groups * config.head_dim
        self.q_proj1 = nn.Linear(size, size, bias=False)
        self.q_proj2 = nn.Linear(size, size, bias=False)
        self.k_proj1 = nn.Linear(size, kv_size, bias=False)
        self.k_proj2 = nn.Linear(size, kv_size, bias=False)
        self.v_proj = nn.Linear(size, kv_size, bias=False)
        self.out = nn.Linear(size, size)
        self.lambda_q1 = nn.Parameter(torch.empty(self.head_dim))
        self.lambda_k1 = nn.Parameter(torch.empty(self.head_dim))
        self.lambda_q2 = nn.Parameter(torch.empty(self.head_dim))
        self.lambda_k2 = nn.Parameter(torch.empty(self.head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, E]` → `[B, S, E]`."""
        value = self._repeat_groups(self.v_proj(x))
        first, second = (
            F.scaled_dot_product_attention(
                query(x).unflatten(-1, (-1, self.head_dim)), self._repeat_groups(key(x)), value, is_causal=True
            )
            for query, key in ((self.q_proj1, self.k_proj1), (self.q_proj2, self.k_proj2))
        )
        lambda_ = torch.exp(self.lambda_q1 @ self.lambda_k1) - torch.exp(self.lambda_q2 @ self.lambda_k2) + LAMBDA_INIT
        y = (first - lambda_.clamp(*LAMBDA_RANGE) * second).flatten(2)
        # The original concatenates windows that overlap by one half: tokens after the first window receive the output
        # of an earlier token.
        columns = torch.arange(x.shape[1], device=x.device)
        return self.out(y[:, columns // self.window_size * (self.window_size // 2) + columns % self.window_size])

    def _repeat_groups(self, x: torch.Tensor) -> torch.Tensor:
        """Repeat the key-value heads in order until there are H: `[B, S, G · D]` → `[B, S, H, D]`."""
        return x.unflatten(-1, (-1, self.head_dim)).repeat(1, 1, self.repeats, 1)


class DeformableConv1d(nn.Module):
    """Convolution whose taps start at the token itself and move by predicted offsets."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        size = config.embed_dim
        self.padding = DILATION * (KERNEL - 1) // 2
        self.offset_conv = nn.Conv1d(size, 2 * KERNEL, KERNEL, padding=self.padding, dilation=DILATION)
        self.conv = nn.Conv1d(KERNEL * size, 2 * size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, E]` → `[B, 2 E, S]`."""
        batch, length, size = x.shape
        offsets = self.offset_conv(x.transpose(1, 2))[
            :, ::2
        ]  # [B, T, S]: the original predicts two offsets per tap and uses the first
        x = F.pad(x, (0, 0, self.padding, self.padding))
        last = x.shape[1] - 1
        columns = (torch.arange(length, device=x.device) + self.padding + offsets).clamp(0, last)
        left = columns.floor()
        fraction = (columns - left)[..., None]
        left, right = left.long(), (left.long() + 1).clamp(max=last)
        rows = torch.arange(batch, device=x.device)[:, None, None]
        taps = (1 - fraction) * x[rows, left] + fraction * x[rows, right]  # [B, T, S, E]
        # The original reinterprets [T, S, E] as [T · E, S], which mixes tokens and features.
        return self.conv(taps.reshape(batch, KERNEL * size, length))


class GatedConvolution(nn.Module):
    """LayerNorm(GELU(y_main) ⊙ σ(y_gate)) without affine parameters, [y_main, y_gate] = DeformableConv1d(x)."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        self.norm_eps = 1e-5 if config.layout == "L3" else 1e-8
        self.deform_conv = DeformableConv1d(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, E]` → the same."""
        main, gate = self.deform_conv(x).transpose(1, 2).chunk(2, dim=-1)
        return F.layer_norm(F.gelu(main) * gate.sigmoid(), main.shape[-1:], eps=self.norm_eps)


class IdleExperts(nn.Module):
    """Parameters of the experts, whose output the original discards."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        size = config.embed_dim
        self.experts = nn.ModuleList([nn.Linear(size, size) for _ in range(config.num_experts)])
        self.gate = nn.Linear(size, config.num_experts)


class LiquidNativeLayer(nn.Module):
    """Layer of attention, gated convolution, and a feed-forward network without a preceding norm."""

    attention: nn.Module

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        size, inner = config.embed_dim, config.ff_hidden_dim
        self.norm1 = nn.LayerNorm(size)
        self.norm2 = nn.LayerNorm(size)
        self.norm3 = nn.LayerNorm(size)
        self.moe = IdleExperts(config)
        self.dilated_conv = GatedConvolution(config)
        if config.layout == "L3":
            self.attention = FusedAttention(config)
            self.ff_layer = nn.ModuleDict({"0": nn.Linear(size, inner), "3": nn.Linear(inner, size)})
        else:
            self.attention = DifferentialAttention(config)
            self.ff_layer = nn.ModuleDict(
                {"0": nn.Linear(size, inner), "1": nn.LayerNorm(inner), "4": nn.Linear(inner, size)}
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, E]` → the same."""
        x = x + self.attention(self.norm1(x))
        x = x + self.dilated_conv(self.norm2(x))
        return x + self._feed_forward(x)

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        if "3" in self.ff_layer:
            return self.ff_layer["3"](F.gelu(self.ff_layer["0"](x)))
        inner = self.ff_layer["1"](self.ff_layer["0"](x).clamp(-FEED_FORWARD_LIMIT, FEED_FORWARD_LIMIT))
        return self.ff_layer["4"](F.gelu(inner)).clamp(-FEED_FORWARD_LIMIT, FEED_FORWARD_LIMIT)


class LSTMMemory(nn.Module):
    """x + W₂ GELU(W₁ h + b₁) + b₂, where h is the output of an LSTM over x."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        size, inner = config.embed_dim, config.lstm_hidden_size
        self.lstm = nn.LSTM(size, inner, config.lstm_num_layers, batch_first=True)
        self.output_layer = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, size))

    def forward(
        self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Run the LSTM.

        Args:
            x: `[B, S, E]`.
            state: state (h, c) of the LSTM before x; None for zeros.

        Returns:
            (`[B, S, E]`; state after x).
        """
        h, state = self.lstm(x, state)
        return x + self.output_layer(h), state


class IdleEncoder(nn.Module):
    """Parameters of the encoder, on which the logits do not depend."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        self.embedding = LiquidNativeEmbedding(config)
        self.layers = nn.ModuleList([LiquidNativeLayer(config) for _ in range(config.num_encoder_layers)])
        self.layer_norm = nn.LayerNorm(config.embed_dim)


class LiquidNativePreTrainedModel(PreTrainedModel):
    """Base class of `LiquidNativeModel`: initialisation and loading."""

    config: LiquidNativeConfig
    main_input_name = "decoder_input_ids"
    _no_split_modules = ["LiquidNativeLayer", "LiquidNativeEmbedding"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DifferentialAttention):
            for weight in (module.lambda_q1, module.lambda_k1):
                init.constant_(weight, 0.1)
            for weight in (module.lambda_q2, module.lambda_k2):
                init.constant_(weight, -0.1)
        else:
            super()._init_weights(module)


class LiquidNativeModel(LiquidNativePreTrainedModel):
    """The original `LiquidFoundationModelOptimized`.

    `AutoModel` loads it. `AutoModelForSeq2SeqLM` does not, because a token's logits depend on later tokens and the
    model therefore cannot generate.
    """

    def __init__(self, config: LiquidNativeConfig):
        super().__init__(config)
        self.encoder = IdleEncoder(config)
        self.decoder_embedding = LiquidNativeEmbedding(config)
        self.decoder_layers = nn.ModuleList([LiquidNativeLayer(config) for _ in range(config.num_decoder_layers)])
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.output_layer = nn.Linear(config.embed_dim, config.vocab_size)
        self.external_memory = LSTMMemory(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """Compute logits.

        Args:
            input_ids: input of the encoder; ignored, because the logits do not depend on it.
            decoder_input_ids: int64 `[B, S]`; L6 truncates them to `max_position_embeddings`.

        Returns:
            `logits` `[B, S, vocab_size]`; in L6 of at most the first 2048 tokens.

        Raises:
            ValueError: `decoder_input_ids` is missing or longer than the original accepts.
        """
        if decoder_input_ids is None or decoder_input_ids.ndim != 2:
            raise ValueError(
                "`decoder_input_ids` [batch, tokens] is required: the logits do not depend on `input_ids`."
            )
        if self.config.layout == "L6":
            decoder_input_ids = decoder_input_ids[:, : self.config.max_position_embeddings]
        self._check_length(decoder_input_ids.shape[1])
        x = self.decoder_embedding(decoder_input_ids)
        state = None
        for layer in self.decoder_layers:
            x, state = self.external_memory(layer(x), state)
        if self.config.layout == "L6":
            x = x[:, :MAX_LOGITS]
        return Seq2SeqLMOutput(logits=self.output_layer(self.layer_norm(x)))

    def _check_length(self, length: int) -> None:
        config = self.config
        if config.layout == "L3":
            max_length = min(config.window_size, config.max_position_embeddings)
            limits = f"`window_size` ({config.window_size}) and `max_position_embeddings`"
        else:
            max_length = ROTARY_LENGTH // config.window_size * config.window_size
            limits = f"the complete windows (`window_size` {config.window_size}) in {ROTARY_LENGTH} tokens"
        if not 1 <= length <= max_length:
            raise ValueError(
                f"`decoder_input_ids` has {length} tokens, but the original accepts 1 to {max_length}, limited by "
                f"{limits}: shorten them, or set `window_size` to the value of the training."
            )


__all__ = ["LiquidNativeModel", "LiquidNativePreTrainedModel"]
