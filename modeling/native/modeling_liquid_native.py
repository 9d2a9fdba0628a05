"""The original Liquid's function, for converted checkpoints: not causal, no cache, no mask of padding.

Logits come from the decoder alone. For the tokens t of a row of S:

    c = convolutions of (token + position);  X = FFT of c, padded to a power of two
    x = W_p Re(inverse FFT, S long, of the first N bins of X),  N = ⌊S clamp((1 − complexity) / 2, 0.1, 1)⌋
    in each layer   x += attention(LayerNorm x);  x += gated deformable convolution(LayerNorm x);  x += feed-forward(x)
                    x += output(LSTM(x)), the LSTM's state going on from one layer's last token to the next one's first
    logits = W_o LayerNorm(x)

complexity is the share of bins above a tenth of their feature's largest. Attention is what the original computes: over
the heads of one token, each of which sees those before it. Its encoder reaches no logits and what its experts give is
lost: both are here as parameters, under the original's names like all others, and never run.

The original runs attention in half precision on a GPU, and puts zeros for what fails or is not finite; this is its
function in single precision without dropout, and an error or the value itself in the place of such zeros.

Shape letters: B batch, S tokens, E embed_dim, H heads, G heads of keys and values, D features of a head, T taps.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_liquid_native import LiquidNativeConfig

BASE_RATIO, MIN_RATIO = 0.5, 0.1  # of the bins that the decoder's embedding keeps, whatever the encoder's does
AUDIBLE = 0.1  # of a feature's largest bin
KERNEL, DILATION = 3, 2
LAMBDA_INIT, LAMBDA_RANGE = 0.8, (0.1, 0.9)
FEED_FORWARD_LIMIT = 100.0
ROTARY_LENGTH = 8192  # beyond it the original's attention fails
MAX_LOGITS = 2048  # in L6


class LiquidNativeEmbedding(nn.Module):
    """Token and position, two convolutions, and the lowest bins of their spectrum."""

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
            self.proj_head = nn.Linear(size, size)  # of a loss alone

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 `[B, S]` → `[B, S, E]`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = (self.token_embedding(tokens) + self.position_embedding(positions)).transpose(1, 2)
        for conv in (self.conv1, self.conv2):
            x = self.activation(conv(x))
        x = self.layer_norm(x.transpose(1, 2))
        return self.layer_norm(self.proj(lowest_bins(x)))


def lowest_bins(x: torch.Tensor) -> torch.Tensor:
    """`[B, S, E]` as the real part of as many of its bins as its complexity leaves, `[B, S, E]`.

    The bins are those of x padded to a power of two, the way back is of length S: no exact inverse.
    """
    length = x.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    spectrum = torch.fft.fft(wide, n=1 << (length - 1).bit_length(), dim=1)
    loudness = spectrum.abs()
    complexity = (loudness > AUDIBLE * loudness.amax(dim=1, keepdim=True)).float().mean(dim=(1, 2))
    ratio = (BASE_RATIO * (1 - complexity)).clamp(MIN_RATIO, 1)
    count = (ratio * length).long().clamp(min=1)
    kept = torch.arange(length, device=x.device) < count[:, None]
    return torch.fft.ifft(spectrum[:, :length] * kept[..., None], dim=1).real.to(x.dtype)


class FusedAttention(nn.Module):
    """Attention over the heads of each token (L3), within the one window that the original can take."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        self.num_heads, self.window_size = config.num_heads, config.window_size
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.out = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, E]` → the same, S up to the window."""
        length = x.shape[1]
        x = F.pad(x, (0, 0, 0, self.window_size - length))
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        y = F.scaled_dot_product_attention(*heads.unbind(dim=2), is_causal=True)  # [B, window, H, D]
        # The original reads its [H, window, D] as [window, H · D].
        y = y.transpose(1, 2).reshape(x.shape)
        return self.out(y[:, :length])


class DifferentialAttention(nn.Module):
    """A₁ − λ A₂ over the heads of each token (L6), λ = clamp(exp(λ_q1 · λ_k1) − exp(λ_q2 · λ_k2) + 0.8, 0.1, 0.9).

    The original turns queries and keys by their token's place. Both are of one token: that leaves their product as it
    is, and is left out here.
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
        """`[B, S, E]` → the same."""
        value = self._groups(self.v_proj(x))
        first, second = (
            F.scaled_dot_product_attention(
                query(x).unflatten(-1, (-1, self.head_dim)), self._groups(key(x)), value, is_causal=True
            )
            for query, key in ((self.q_proj1, self.k_proj1), (self.q_proj2, self.k_proj2))
        )
        share = torch.exp(self.lambda_q1 @ self.lambda_k1) - torch.exp(self.lambda_q2 @ self.lambda_k2) + LAMBDA_INIT
        y = (first - share.clamp(*LAMBDA_RANGE) * second).flatten(2)
        # Windows overlap by half and are laid one behind the other: a token behind the first gets an earlier one's.
        places = torch.arange(x.shape[1], device=x.device)
        return self.out(y[:, places // self.window_size * (self.window_size // 2) + places % self.window_size])

    def _groups(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, G · D]` → `[B, S, H, D]`, all groups again and again."""
        return x.unflatten(-1, (-1, self.head_dim)).repeat(1, 1, self.repeats, 1)


class DeformableConv1d(nn.Module):
    """Taps that all start at the token itself and move by offsets of their own."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        size = config.embed_dim
        self.reach = DILATION * (KERNEL - 1) // 2
        self.offset_conv = nn.Conv1d(size, 2 * KERNEL, KERNEL, padding=self.reach, dilation=DILATION)
        self.conv = nn.Conv1d(KERNEL * size, 2 * size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, E]` → `[B, 2 E, S]`."""
        batch, length, size = x.shape
        offsets = self.offset_conv(x.transpose(1, 2))[:, ::2]  # [B, T, S]: of a tap's two the first
        x = F.pad(x, (0, 0, self.reach, self.reach))
        last = x.shape[1] - 1
        places = (torch.arange(length, device=x.device) + self.reach + offsets).clamp(0, last)
        left = places.floor()
        share = (places - left)[..., None]
        left, right = left.long(), (left.long() + 1).clamp(max=last)
        rows = torch.arange(batch, device=x.device)[:, None, None]
        taps = (1 - share) * x[rows, left] + share * x[rows, right]  # [B, T, S, E]
        # The original reads [T, S, E] as [T · E, S], which mixes tokens and features.
        return self.conv(taps.reshape(batch, KERNEL * size, length))


class GatedConvolution(nn.Module):
    """GELU(y_main) ⊙ σ(y_gate), normalised over the features, [y_main, y_gate] = DeformableConv1d(x)."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        self.norm_eps = 1e-5 if config.layout == "L3" else 1e-8
        self.deform_conv = DeformableConv1d(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, E]` → the same."""
        main, gate = self.deform_conv(x).transpose(1, 2).chunk(2, dim=-1)
        return F.layer_norm(F.gelu(main) * gate.sigmoid(), main.shape[-1:], eps=self.norm_eps)


class IdleExperts(nn.Module):
    """Parameters of experts whose output the original loses."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        size = config.embed_dim
        self.experts = nn.ModuleList([nn.Linear(size, size) for _ in range(config.num_experts)])
        self.gate = nn.Linear(size, config.num_experts)


class LiquidNativeLayer(nn.Module):
    """Attention, gated convolution, and a feed-forward network without a norm before it."""

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
        return x + self._fed_forward(x)

    def _fed_forward(self, x: torch.Tensor) -> torch.Tensor:
        if "3" in self.ff_layer:
            return self.ff_layer["3"](F.gelu(self.ff_layer["0"](x)))
        inner = self.ff_layer["1"](self.ff_layer["0"](x).clamp(-FEED_FORWARD_LIMIT, FEED_FORWARD_LIMIT))
        return self.ff_layer["4"](F.gelu(inner)).clamp(-FEED_FORWARD_LIMIT, FEED_FORWARD_LIMIT)


class LSTMMemory(nn.Module):
    """x + W₂ GELU(W₁ h + b₁) + b₂, h an LSTM over x."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        size, inner = config.embed_dim, config.lstm_hidden_size
        self.lstm = nn.LSTM(size, inner, config.lstm_num_layers, batch_first=True)
        self.output_layer = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, size))

    def forward(
        self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """`[B, S, E]` and the LSTM's state, None for zeros, → (the former, the state after it)."""
        h, state = self.lstm(x, state)
        return x + self.output_layer(h), state


class IdleEncoder(nn.Module):
    """Parameters of the encoder, which no logits depend on."""

    def __init__(self, config: LiquidNativeConfig):
        super().__init__()
        self.embedding = LiquidNativeEmbedding(config)
        self.layers = nn.ModuleList([LiquidNativeLayer(config) for _ in range(config.num_encoder_layers)])
        self.layer_norm = nn.LayerNorm(config.embed_dim)


class LiquidNativePreTrainedModel(PreTrainedModel):
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

    `AutoModel` loads it, not `AutoModelForSeq2SeqLM`, whose models generate: a token's logits depend on later tokens.
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
        decoder_input_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """
        Args:
            input_ids: of the encoder, which no logits depend on: not read.
            decoder_input_ids: int64 `[B, S]`; what stands beyond `max_position_embeddings` is cut off in L6.

        Returns:
            `logits` `[B, S, vocab_size]`, in L6 of the first 2048 tokens.

        Raises:
            ValueError: no `decoder_input_ids`, or more of them than the original can take.
        """
        if decoder_input_ids is None or decoder_input_ids.ndim != 2:
            raise ValueError("Pass `decoder_input_ids` [batch, tokens]: `input_ids`, the encoder's, reach no logits.")
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
            most = min(config.window_size, config.max_position_embeddings)
            limits = f"`window_size` ({config.window_size}) and `max_position_embeddings`"
        else:
            most = ROTARY_LENGTH // config.window_size * config.window_size
            limits = f"the whole windows (`window_size` {config.window_size}) of {ROTARY_LENGTH}"
        if not 1 <= length <= most:
            raise ValueError(
                f"`decoder_input_ids` holds {length} tokens: the original takes 1 to {most}, limited by {limits}. "
                "Shorten them, or set `window_size` to what the checkpoint was trained with."
            )


__all__ = ["LiquidNativeModel", "LiquidNativePreTrainedModel"]
