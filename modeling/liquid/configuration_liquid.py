"""Liquid configuration."""

import copy
import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..hub_code import HubCodeMixin

AUTO_MAP = {
    "AutoConfig": "configuration_liquid.LiquidConfig",
    "AutoModel": "modeling_liquid.LiquidModel",
    "AutoModelForSeq2SeqLM": "modeling_liquid.LiquidForSeq2SeqLM",
    "AutoModelForSequenceClassification": "modeling_liquid.LiquidForSequenceClassification",
}

FINITE_CHECKS = ("off", "raise", "zero")


@strict
class LiquidConfig(HubCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a Liquid encoder-decoder. The defaults give a small model.

    Args:
        vocab_size (`int`, defaults to 4096): Tokens of the vocabulary, one for source and target.
        hidden_size (`int`, defaults to 256): Width of a token's state.
        num_hidden_layers (`int`, defaults to 4): Blocks of the encoder.
        num_decoder_layers (`int`, *optional*): Blocks of the decoder; as many if not given.
        num_attention_heads (`int`, defaults to 4): Heads of every attention.
        num_key_value_heads (`int`, *optional*): Heads of keys and values; as many as there are heads if not given.
        intermediate_size (`int`, defaults to 512): Inner width of the feed-forward networks.
        attention_window (`int`, defaults to 128): Most recent tokens that the decoder's self-attention sees, the token
            itself included; in the encoder as many on the other side too.
        max_position_embeddings (`int`, defaults to 2048): Length of input that the model is meant for; some kinds of
            rotary embedding are scaled by it.
        learned_positions (`bool`, defaults to `False`): Learn an embedding of each position beside the rotary one,
            which knows no limit; inputs longer than `max_position_embeddings` are then refused.
        rope_parameters (`dict`, *optional*): Rotary embedding, as for other models of transformers.
        frame_length (`int`, defaults to 64): Tokens of an encoder's frame, a power of two.
        decoder_frame_length (`int`, defaults to 8): Tokens of a decoder's frame, a power of two up to 16.
        base_compression_ratio (`float`, defaults to 1.0): Share of its frequencies that the most complex frame keeps.
        min_compression_ratio (`float`, defaults to 0.1): Share that the simplest keeps; 1 compresses nothing.
        num_experts (`int`, defaults to 4): Experts of every block.
        num_experts_per_tok (`int`, defaults to 1): Experts that a token uses, at least.
        moe_intermediate_size (`int`, *optional*): Inner width of an expert; `hidden_size` if not given.
        dynamic_experts (`bool`, defaults to `True`): Let a token use up to twice as many where the router is in doubt.
        normalize_expert_weights (`bool`, defaults to `True`): Make the weights of the used experts sum to 1.
        max_expert_load (`float`, *optional*): Share of a row's tokens beyond which an expert's use costs; one and a
            half of the even share if not given.
        router_entropy_coef (`float`, defaults to 0.01): Weight in the loss of how uneven the mean gate is.
        router_aux_loss_coef (`float`, defaults to 0.01): Weight in the loss of what lies beyond `max_expert_load`.
        reconstruction_loss_coef (`float`, defaults to 0.01): Weight in the loss of what compression changes.
        conv_kernel (`int`, defaults to 3): Taps of every convolution, odd.
        conv_dilation (`int`, defaults to 1): Distance between the taps of the deformable ones.
        max_offset (`float`, defaults to 2.0): How far a tap can move; 0 for ordinary convolutions.
        lstm_hidden_size (`int`, *optional*): Width of the decoder's LSTM memory; `hidden_size` if not given, 0 for
            none.
        num_lstm_layers (`int`, defaults to 1): Layers of the LSTM.
        finite_check (`str`, defaults to `"off"`): What is done about infinite or undefined values behind attention,
            convolution and experts: nothing, `"raise"` an error that names the place, or make them `"zero"`.
        hidden_dropout (`float`, defaults to 0.0): Dropout on what each sub-block adds to the state.
        attention_dropout (`float`, defaults to 0.0): Dropout on the weights of attention.
        norm_eps (`float`, defaults to 1e-6): Added to variances before their root is taken.
        initializer_range (`float`, *optional*): Standard deviation of embeddings; 1/sqrt(hidden_size) if not given.
            Projections start by Xavier's rule, convolutions by Kaiming's.
        tie_word_embeddings (`bool`, defaults to `True`): Share the embedding with the output layer.
        output_router_logits (`bool`, defaults to `False`): Return what routers and compression gave.
        use_cache (`bool`, defaults to `True`): Return the decoder's state for continuation.
        decoder_start_token_id (`int`, defaults to 0): First token of every target.
        pad_token_id (`int`, defaults to 0): Token that fills rows up.
        bos_token_id, eos_token_id (`int`, *optional*): Special tokens.

    Raises:
        ValueError: a field out of range, or fields that contradict each other; the message names them.
        huggingface_hub.errors.StrictDataclassError: a field of the wrong type.
    """

    model_type = "liquid"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "token_loss",
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
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5 if self.hidden_size > 0 else 1.0
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_hidden_layers
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.hidden_size
        if self.lstm_hidden_size is None:
            self.lstm_hidden_size = self.hidden_size
        if self.max_expert_load is None and self.num_experts > 0:
            self.max_expert_load = 1.5 * self.num_experts_per_tok / self.num_experts
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.validate_architecture()  # here too, where its ValueError reaches the user as it is
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Features of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """Every layer of the decoder keeps its state in a `cache.FlowCacheLayer`."""
        return ["flow_state"] * self.num_decoder_layers

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "LiquidConfig":
        """This configuration; for a decoder of another depth a copy with its number of layers, as caches want it."""
        if encoder or not decoder or self.num_decoder_layers == self.num_hidden_layers:
            return self
        config = copy.copy(self)
        config.num_hidden_layers = self.num_decoder_layers
        return config

    def validate_layer_type(self):
        """Nothing to check: `layer_types` is derived."""

    def validate_architecture(self):
        """Reject values out of range and fields that contradict each other."""
        for field in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_decoder_layers", "num_attention_heads",
            "num_key_value_heads", "intermediate_size", "attention_window", "num_experts", "num_experts_per_tok",
            "moe_intermediate_size", "conv_kernel", "conv_dilation", "num_lstm_layers", "max_position_embeddings",
        ):  # fmt: skip
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, got {getattr(self, field)}.")
        for field in (
            "router_entropy_coef", "router_aux_loss_coef", "reconstruction_loss_coef", "max_offset", "lstm_hidden_size",
            "initializer_range",
        ):  # fmt: skip
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"`{field}` must be finite and not negative, got {getattr(self, field)}.")
        for field, least, most in (("frame_length", 4, math.inf), ("decoder_frame_length", 2, 16)):
            value = getattr(self, field)
            if not least <= value <= most or value & (value - 1):
                bounds = f"from {least} to {most}" if most < math.inf else f"from {least} on"
                raise ValueError(f"`{field}` must be a power of two {bounds}, got {value}.")
        if not 0 < self.min_compression_ratio <= self.base_compression_ratio <= 1:
            raise ValueError(
                f"`min_compression_ratio` ({self.min_compression_ratio}) and `base_compression_ratio` "
                f"({self.base_compression_ratio}) must lie in (0, 1], the former not above the latter."
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) must not be above `num_experts` "
                f"({self.num_experts})."
            )
        even = self.num_experts_per_tok / self.num_experts
        if not self.max_expert_load > even:
            raise ValueError(
                f"`max_expert_load` ({self.max_expert_load}) must be above {even:g}, the load of an expert where all "
                "are used alike (`num_experts_per_tok` / `num_experts`)."
            )
        if not self.conv_kernel % 2:
            raise ValueError(
                f"`conv_kernel` must be odd, got {self.conv_kernel}: the encoder looks to both sides alike."
            )
        if self.finite_check not in FINITE_CHECKS:
            raise ValueError(f"`finite_check` must be one of {FINITE_CHECKS}, got {self.finite_check!r}.")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"`norm_eps` must be finite and positive, got {self.norm_eps}.")
        for field in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"`{field}` must lie in [0, 1), got {getattr(self, field)}.")
        for field in ("pad_token_id", "decoder_start_token_id"):
            token = getattr(self, field)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"`{field}` must lie in the vocabulary (`vocab_size` is {self.vocab_size}) or be None, "
                    f"got {token}."
                )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of twice `num_attention_heads` "
                f"({self.num_attention_heads}): rotary positions turn pairs of features."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` ({self.num_key_value_heads}) must divide `num_attention_heads` "
                f"({self.num_attention_heads})."
            )


__all__ = ["LiquidConfig"]
