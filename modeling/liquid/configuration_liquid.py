"""Configuration of the Liquid models."""

import copy
import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..hub_code import HubCodeMixin
from ..modules.auto_names import enter_auto_names
from ..modules.config_bounds import (
    MAX_FACTOR,
    MAX_LAYERS,
    MAX_LENGTH,
    MAX_TOKEN_ID,
    MAX_VOCABULARY,
    MAX_WIDTH,
    MAX_WINDOW,
    check_bounds,
    check_rope_parameters,
    number_text,
)

AUTO_MAP = {
    "AutoConfig": "configuration_liquid.LiquidConfig",
    "AutoModel": "modeling_liquid.LiquidModel",
    "AutoModelForSeq2SeqLM": "modeling_liquid.LiquidForSeq2SeqLM",
    "AutoModelForSequenceClassification": "modeling_liquid.LiquidForSequenceClassification",
}

FINITE_CHECKS = ("off", "raise", "zero")
MAX_FRAME_LENGTH = 2**14
LIQUID_BOUNDS = {
    "vocab_size": (1, MAX_VOCABULARY),
    "hidden_size": (1, MAX_WIDTH),
    "num_hidden_layers": (1, MAX_LAYERS),
    "num_decoder_layers": (1, MAX_LAYERS),
    "num_attention_heads": (1, MAX_WIDTH),
    "num_key_value_heads": (1, MAX_WIDTH),
    "intermediate_size": (1, MAX_WIDTH),
    "attention_window": (1, MAX_WINDOW),
    "max_position_embeddings": (1, MAX_LENGTH),
    "num_experts": (1, 2**12),
    "num_experts_per_tok": (1, 2**12),
    "moe_intermediate_size": (1, MAX_WIDTH),
    "router_entropy_coef": (0, MAX_FACTOR),
    "router_aux_loss_coef": (0, MAX_FACTOR),
    "reconstruction_loss_coef": (0, MAX_FACTOR),
    "conv_kernel": (1, 2**10),
    "conv_dilation": (1, MAX_WINDOW),
    "max_offset": (0, MAX_WINDOW),
    "lstm_hidden_size": (0, MAX_WIDTH),
    "num_lstm_layers": (1, MAX_LAYERS),
    "initializer_range": (0, MAX_FACTOR),
    "bos_token_id": (-MAX_TOKEN_ID, MAX_TOKEN_ID),
}


@strict
class LiquidConfig(HubCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a Liquid encoder-decoder. The default values describe a small model.

    Args:
        vocab_size (`int`, defaults to 4096): Number of tokens in the vocabulary that source and target share.
        hidden_size (`int`, defaults to 256): Width of the hidden states.
        num_hidden_layers (`int`, defaults to 4): Number of encoder blocks.
        num_decoder_layers (`int`, *optional*): Number of decoder blocks; defaults to `num_hidden_layers`.
        num_attention_heads (`int`, defaults to 4): Number of heads of every attention.
        num_key_value_heads (`int`, *optional*): Number of key-value heads; defaults to `num_attention_heads`.
        intermediate_size (`int`, defaults to 512): Inner width of the feed-forward networks.
        attention_window (`int`, defaults to 128): Number of most recent tokens that the decoder's self-attention sees,
            the token itself included. The encoder sees the same number on the other side as well.
        max_position_embeddings (`int`, defaults to 2048): Intended maximum length in tokens; some types of rotary
            embedding scale with it.
        learned_positions (`bool`, defaults to `False`): Whether to add a learnt embedding of each position to the
            rotary one. Inputs longer than `max_position_embeddings` then raise an error; rotary positions have no
            limit.
        rope_parameters (`dict`, *optional*): Parameters of the rotary embedding, in the format of transformers.
        frame_length (`int`, defaults to 64): Tokens per encoder frame, a power of two.
        decoder_frame_length (`int`, defaults to 8): Tokens per decoder frame, a power of two up to 16.
        base_compression_ratio (`float`, defaults to 1.0): Fraction of its frequencies that a frame of complexity 1
            keeps.
        min_compression_ratio (`float`, defaults to 0.1): Fraction that a frame of complexity 0 keeps; with 1 nothing
            is compressed.
        num_experts (`int`, defaults to 4): Number of experts per block.
        num_experts_per_tok (`int`, defaults to 1): Minimum number of experts per token.
        moe_intermediate_size (`int`, *optional*): Inner width of an expert; defaults to `hidden_size`.
        dynamic_experts (`bool`, defaults to `True`): Whether a token uses up to twice as many experts if the entropy
            of its router probabilities is high.
        normalize_expert_weights (`bool`, defaults to `True`): Whether the weights of the selected experts sum to 1.
        max_expert_load (`float`, *optional*): Load of an expert, as a fraction of a row's tokens, above which the
            router loss penalises it; defaults to 1.5 times the uniform load.
        router_entropy_coef (`float`, defaults to 0.01): Weight of the entropy term of the router loss.
        router_aux_loss_coef (`float`, defaults to 0.01): Weight of the load above `max_expert_load` in the router
            loss.
        reconstruction_loss_coef (`float`, defaults to 0.01): Weight of the reconstruction loss of the compression.
        conv_kernel (`int`, defaults to 3): Number of taps of every convolution, odd.
        conv_dilation (`int`, defaults to 1): Dilation of the deformable convolutions.
        max_offset (`float`, defaults to 2.0): Largest offset of a tap, in tokens; 0 gives ordinary convolutions.
        lstm_hidden_size (`int`, *optional*): Width of the decoder's LSTM; defaults to `hidden_size`. 0 removes the
            LSTM.
        num_lstm_layers (`int`, defaults to 1): Number of layers of the LSTM.
        finite_check (`str`, defaults to `"off"`): Treatment of infinite or NaN outputs of the sub-blocks: `"off"`
            ignores them, `"raise"` raises an error that names the sub-block, `"zero"` replaces them by zeros.
        hidden_dropout (`float`, defaults to 0.0): Dropout rate on the output of each sub-block.
        attention_dropout (`float`, defaults to 0.0): Dropout rate on the attention weights.
        norm_eps (`float`, defaults to 1e-6): Epsilon of the normalisation layers.
        initializer_range (`float`, *optional*): Standard deviation of the initial embeddings; defaults to
            1/sqrt(hidden_size). Projections use Xavier initialisation, convolutions Kaiming initialisation.
        tie_word_embeddings (`bool`, defaults to `True`): Whether the output layer shares the weights of the embedding.
        output_router_logits (`bool`, defaults to `False`): Whether to return router logits, auxiliary losses and
            metrics.
        use_cache (`bool`, defaults to `True`): Whether the model returns the decoder's cache.
        decoder_start_token_id (`int`, defaults to 0): Id of the token that starts every target.
        pad_token_id (`int`, defaults to 0): Id of the padding token.
        bos_token_id, eos_token_id (`int`, *optional*): Ids of further special tokens.

    Raises:
        ValueError: a field is out of range, or fields contradict each other; the message names them.
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type.

    Example:
        >>> from dfn_hf import LiquidConfig, LiquidForSeq2SeqLM
        >>> config = LiquidConfig(hidden_size=64, num_hidden_layers=2, num_experts=2)
        >>> model = LiquidForSeq2SeqLM(config)
        >>> model.config.num_decoder_layers
        2
    """

    model_type = "liquid"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "token_loss",
        "aux_loss",
        "reconstruction_loss",
        "router_loss",
        "metrics",
    ]

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_decoder_layers: int | None = None
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    intermediate_size: int = 512
    attention_window: int = 128
    max_position_embeddings: int = 2048
    learned_positions: bool = False
    rope_parameters: dict | None = None
    frame_length: int = 64
    decoder_frame_length: int = 8
    base_compression_ratio: float | int = 1.0
    min_compression_ratio: float | int = 0.1
    num_experts: int = 4
    num_experts_per_tok: int = 1
    moe_intermediate_size: int | None = None
    dynamic_experts: bool = True
    normalize_expert_weights: bool = True
    max_expert_load: float | int | None = None
    router_entropy_coef: float | int = 0.01
    router_aux_loss_coef: float | int = 0.01
    reconstruction_loss_coef: float | int = 0.01
    conv_kernel: int = 3
    conv_dilation: int = 1
    max_offset: float | int = 2.0
    lstm_hidden_size: int | None = None
    num_lstm_layers: int = 1
    finite_check: str = "off"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    norm_eps: float | int = 1e-6
    initializer_range: float | int | None = None
    tie_word_embeddings: bool = True
    output_router_logits: bool = False
    use_cache: bool = True
    is_encoder_decoder: bool = True
    decoder_start_token_id: int | None = 0
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    auto_map: dict[str, str] | None = None

    def __post_init__(self, **kwargs):
        check_bounds(self, LIQUID_BOUNDS)
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_hidden_layers
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.hidden_size
        if self.lstm_hidden_size is None:
            self.lstm_hidden_size = self.hidden_size
        if self.max_expert_load is None:
            self.max_expert_load = 1.5 * self.num_experts_per_tok / self.num_experts
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.validate_architecture()  # transformers would wrap a ValueError that is raised later
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Number of features per attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """Layer type of each decoder layer's cache: all layers use `cache.FlowCacheLayer`."""
        return ["flow_state"] * self.num_decoder_layers

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "LiquidConfig":
        """Return this configuration; for `decoder`, a copy whose `num_hidden_layers` is the decoder's, if that
        differs.

        transformers derives the number of cache layers from it.
        """
        if encoder or not decoder or self.num_decoder_layers == self.num_hidden_layers:
            return self
        config = copy.copy(self)
        config.num_hidden_layers = self.num_decoder_layers
        return config

    def validate_layer_type(self):
        """Skip the check of transformers, because `layer_types` is derived."""

    def validate_rope(self):
        """Validate `rope_parameters`; transformers raises KeyError for a missing one."""
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(str(error.args[0])) from error

    def validate_architecture(self):
        """Raise `ValueError` if a field is out of range or fields contradict each other."""
        check_bounds(self, LIQUID_BOUNDS)
        check_rope_parameters(self.rope_parameters)
        for field, least, most in (("frame_length", 4, MAX_FRAME_LENGTH), ("decoder_frame_length", 2, 16)):
            value = getattr(self, field)
            if not least <= value <= most or value & (value - 1):
                raise ValueError(f"`{field}` must be a power of two from {least} to {most}, got {number_text(value)}.")
        if not 0 < self.min_compression_ratio <= self.base_compression_ratio <= 1:
            raise ValueError(
                f"`min_compression_ratio` ({self.min_compression_ratio}) and `base_compression_ratio` "
                f"({self.base_compression_ratio}) must lie in (0, 1], with the former at most the latter."
            )
        self._check_experts()
        if not self.conv_kernel % 2:
            raise ValueError(
                f"`conv_kernel` must be odd, got {self.conv_kernel}: the encoder's convolutions are symmetric."
            )
        if self.finite_check not in FINITE_CHECKS:
            raise ValueError(f"`finite_check` must be one of {FINITE_CHECKS}, got {self.finite_check!r}.")
        if not 0 < self.norm_eps <= MAX_FACTOR:
            raise ValueError(
                f"`norm_eps` must be positive and at most {MAX_FACTOR}, got {number_text(self.norm_eps)}."
            )
        for field in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"`{field}` must lie in [0, 1), got {getattr(self, field)}.")
        for field in ("pad_token_id", "decoder_start_token_id"):
            token = getattr(self, field)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"`{field}` must be below `vocab_size` ({self.vocab_size}) and not negative, or None, got {token}."
                )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of twice `num_attention_heads` "
                f"({self.num_attention_heads}), because rotary embeddings rotate pairs of features."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` ({self.num_key_value_heads}) must divide `num_attention_heads` "
                f"({self.num_attention_heads})."
            )

    def _check_experts(self):
        """Raise `ValueError` if the fields of the experts contradict each other."""
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) must be at most `num_experts` "
                f"({self.num_experts})."
            )
        even = self.num_experts_per_tok / self.num_experts
        if not self.max_expert_load > even:
            raise ValueError(
                f"`max_expert_load` ({self.max_expert_load}) must be greater than the uniform load {even:g} "
                "(`num_experts_per_tok` / `num_experts`)."
            )
        if MAX_FACTOR < self.max_expert_load < math.inf:
            raise ValueError(
                f"`max_expert_load` must be at most {MAX_FACTOR} or infinite, got {number_text(self.max_expert_load)}."
            )


enter_auto_names(LiquidConfig.model_type, AUTO_MAP)

__all__ = ["LiquidConfig"]
