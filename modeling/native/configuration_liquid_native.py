"""Configuration of the original Liquid model, for converted checkpoints."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..hub_code import HubCodeMixin
from ..modules.auto_names import enter_auto_names
from ..modules.config_bounds import MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH, MAX_WINDOW, check_bounds

AUTO_MAP = {
    "AutoConfig": "configuration_liquid_native.LiquidNativeConfig",
    "AutoModel": "modeling_liquid_native.LiquidNativeModel",
}

LAYOUTS = ("L3", "L6")

MAX_EXPERTS = 2**14  # of all layers: each expert is a module
LIQUID_NATIVE_BOUNDS = {
    "vocab_size": (1, MAX_VOCABULARY),
    "embed_dim": (1, MAX_WIDTH),
    "num_encoder_layers": (1, MAX_LAYERS),
    "num_decoder_layers": (1, MAX_LAYERS),
    "num_heads": (1, MAX_WIDTH),
    "num_kv_groups": (1, MAX_WIDTH),
    "ff_hidden_dim": (1, MAX_WIDTH),
    "num_experts": (1, MAX_EXPERTS),
    "max_position_embeddings": (1, 2**24),
    "window_size": (2, MAX_WINDOW),
    "lstm_hidden_size": (1, MAX_WIDTH),
    "lstm_num_layers": (1, MAX_LAYERS),
}


@strict
class LiquidNativeConfig(HubCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a converted `LiquidFoundationModelOptimized`.

    The fields are those arguments of the original constructor that its logits depend on. `max_length`, which has
    another meaning in transformers, is called `max_position_embeddings`.

    Args:
        layout (`str`, defaults to `"L6"`): Version of the original: `"L3"`, the last one with a fused query-key-value
            projection, or `"L6"`, with differential attention.
        vocab_size (`int`, defaults to 50265): Number of tokens in the vocabulary.
        embed_dim (`int`, defaults to 512): Width of the hidden states.
        num_encoder_layers (`int`, defaults to 12): Number of encoder layers; the logits do not depend on them.
        num_decoder_layers (`int`, defaults to 12): Number of decoder layers.
        num_heads (`int`, defaults to 8): Number of attention heads.
        num_kv_groups (`int`, defaults to 2): Number of key-value heads in `"L6"`.
        ff_hidden_dim (`int`, defaults to 1024): Inner width of the feed-forward networks.
        num_experts (`int`, defaults to 8): Number of experts per layer; the logits do not depend on them.
        max_position_embeddings (`int`, defaults to 8192): Number of position embeddings, the original's `max_length`.
        window_size (`int`, defaults to 512): Tokens per attention window.
        lstm_hidden_size (`int`, defaults to 256): Width of the LSTM.
        lstm_num_layers (`int`, defaults to 2): Number of layers of the LSTM.

    Raises:
        ValueError: a field is out of range, or fields contradict each other; the message names them.

    Example:
        >>> from dfn_hf import LiquidNativeConfig, LiquidNativeModel
        >>> config = LiquidNativeConfig(embed_dim=16, num_encoder_layers=1, num_decoder_layers=1, vocab_size=100)
        >>> LiquidNativeModel(config).config.hidden_size
        16
    """

    model_type = "liquid_native"

    layout: str = "L6"
    vocab_size: int = 50265
    embed_dim: int = 512
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    num_heads: int = 8
    num_kv_groups: int = 2
    ff_hidden_dim: int = 1024
    num_experts: int = 8
    max_position_embeddings: int = 8192
    window_size: int = 512
    lstm_hidden_size: int = 256
    lstm_num_layers: int = 2
    auto_map: dict[str, str] | None = None

    def __post_init__(self, **kwargs):
        check_bounds(self, LIQUID_NATIVE_BOUNDS)
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.validate_architecture()  # transformers would wrap a ValueError that is raised later
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Name of `embed_dim` in transformers."""
        return self.embed_dim

    @property
    def num_hidden_layers(self) -> int:
        """Name of `num_decoder_layers` in transformers."""
        return self.num_decoder_layers

    @property
    def head_dim(self) -> int:
        """Number of features per attention head."""
        return self.embed_dim // self.num_heads

    def validate_architecture(self):
        """Raise `ValueError` if a field is out of range or fields contradict each other."""
        if self.layout not in LAYOUTS:
            raise ValueError(f"`layout` must be one of {LAYOUTS}, got {self.layout!r}.")
        check_bounds(self, LIQUID_NATIVE_BOUNDS)
        num_layers = self.num_encoder_layers + self.num_decoder_layers
        if self.num_experts * num_layers > MAX_EXPERTS:
            raise ValueError(
                f"`num_experts` ({self.num_experts}) times the number of layers ({num_layers}) must be at most "
                f"{MAX_EXPERTS}."
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"`embed_dim` ({self.embed_dim}) must be a multiple of `num_heads` ({self.num_heads}).")
        if self.layout == "L6" and (self.head_dim % 2 or self.num_heads % self.num_kv_groups):
            raise ValueError(
                f"`num_kv_groups` ({self.num_kv_groups}) must divide `num_heads` ({self.num_heads}), and the number "
                f"of features per head ({self.head_dim}, `embed_dim` / `num_heads`) must be even."
            )


enter_auto_names(LiquidNativeConfig.model_type, AUTO_MAP)

__all__ = ["LiquidNativeConfig"]
