"""Configuration of the FlowNetwork models."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

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

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_flownetwork.FlowNetworkConfig",
    "AutoModel": "modeling_flownetwork.FlowNetworkModel",
    "AutoModelForCausalLM": "modeling_flownetwork.FlowNetworkForCausalLM",
    "AutoModelForSequenceClassification": "modeling_flownetwork.FlowNetworkForSequenceClassification",
}

BLOCK_TYPES = ("enhanced_flow", "flow_transformer")
FLOWNETWORK_BOUNDS = {
    "vocab_size": (1, MAX_VOCABULARY),
    "hidden_size": (1, MAX_WIDTH),
    "num_hidden_layers": (1, MAX_LAYERS),
    "num_attention_heads": (1, MAX_WIDTH),
    "num_key_value_heads": (1, MAX_WIDTH),
    "intermediate_size": (1, MAX_WIDTH),
    "num_patterns": (1, 2**12),
    "flow_window": (1, MAX_WINDOW),
    "min_flow_window": (1, MAX_WINDOW),
    "memory_size": (0, MAX_WINDOW),
    "num_memory_heads": (1, MAX_WIDTH),
    "memory_chunk": (2, MAX_WINDOW),
    "max_position_embeddings": (1, MAX_LENGTH),
    "initializer_range": (0, MAX_FACTOR),
    "bos_token_id": (-MAX_TOKEN_ID, MAX_TOKEN_ID),
}


def adjust_num_heads(d_model: int, requested: int) -> int:
    """Return the largest number of heads that is at most `requested` and divides `d_model`.

    Logs a warning if the result differs from `requested`.

    Raises:
        ValueError: `d_model` or `requested` is below 1.
    """
    if d_model < 1 or requested < 1:
        raise ValueError(f"`d_model` ({d_model}) and the number of heads ({requested}) must both be at least 1.")
    heads = largest_divisor(d_model, requested)
    if heads != requested:
        logger.warning(f"{requested} heads do not divide `d_model` ({d_model}); using {heads} heads.")
    return heads


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit`."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


@strict
class FlowNetworkConfig(HubCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a FlowNetwork model. The default values describe a small model.

    Args:
        vocab_size (`int`, defaults to 4096): Number of tokens in the vocabulary.
        hidden_size (`int`, defaults to 256): Width of the hidden states.
        num_hidden_layers (`int`, defaults to 4): Number of layers.
        num_attention_heads (`int`, defaults to 4): Number of query heads of the self-attention.
        num_key_value_heads (`int`, *optional*): Number of key-value heads of the self-attention; defaults to
            `num_attention_heads`.
        intermediate_size (`int`, defaults to 512): Inner width of the feed-forward network.
        block_type (`str`, defaults to `"enhanced_flow"`): Attention that each layer combines with the flow.
            `"enhanced_flow"` attends to the flow's window at linear cost; `"flow_transformer"` attends to all
            preceding tokens, in parallel with the flow.
        num_patterns (`int`, defaults to 8): Number of flow patterns per layer.
        base_sparsity (`float`, defaults to 0.1): Base fraction of the reachable tokens that flow into a token. The
            router scales it by a factor between 0.5 and 1.5.
        flow_window (`int`, defaults to 128): Number of most recent tokens that can flow into a token, the token itself
            included.
        min_flow_window (`int`, defaults to 8): Smallest window that the router can choose, in tokens.
        memory_size (`int`, defaults to 16): Number of slots of the memory bank and of each layer's sequence memory; 0
            disables both.
        num_memory_heads (`int`, defaults to 4): Number of heads of the attention to the memory.
        memory_decay (`float`, defaults to 0.9): Initial value of the learnt decay per chunk, for the slots of the
            sequence memory and for the router's context.
        memory_chunk (`int`, defaults to 64): Number of tokens per chunk of the sequence memory.
        memory_bank_decay (`float`, defaults to 0.99): Decay of the bank's moving average per optimizer step; constant.
        max_position_embeddings (`int`, defaults to 2048): Intended maximum length in tokens. Positions are rotary, so
            longer inputs are accepted.
        rope_parameters (`dict`, *optional*): Parameters of the rotary embedding, in the format of transformers.
        hidden_dropout (`float`, defaults to 0.0): Dropout rate on the output of each sub-block.
        attention_dropout (`float`, defaults to 0.0): Dropout rate on the attention weights.
        norm_eps (`float`, defaults to 1e-6): Epsilon of the RMSNorm layers.
        initializer_range (`float`, *optional*): Standard deviation of the initial embeddings and projections; defaults
            to 1/sqrt(hidden_size).
        tie_word_embeddings (`bool`, defaults to `True`): Whether the output layer shares the weights of the embedding.
        use_cache (`bool`, defaults to `True`): Whether the model returns its cache.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Ids of the special tokens.

    Raises:
        ValueError: a field is out of range, or fields contradict each other; the message names them.
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type.

    Example:
        >>> from dfn_hf import FlowNetworkConfig, FlowNetworkForCausalLM
        >>> config = FlowNetworkConfig(hidden_size=64, num_hidden_layers=2)
        >>> model = FlowNetworkForCausalLM(config)
        >>> model.config.num_key_value_heads
        4
    """

    model_type = "flownetwork"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "flows", "metrics"]

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    intermediate_size: int = 512
    block_type: str = "enhanced_flow"
    num_patterns: int = 8
    base_sparsity: float | int = 0.1
    flow_window: int = 128
    min_flow_window: int = 8
    memory_size: int = 16
    num_memory_heads: int = 4
    memory_decay: float | int = 0.9
    memory_chunk: int = 64
    memory_bank_decay: float | int = 0.99
    max_position_embeddings: int = 2048
    rope_parameters: dict | None = None
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    norm_eps: float | int = 1e-6
    initializer_range: float | int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    auto_map: dict[str, str] | None = None

    def __post_init__(self, **kwargs):
        check_bounds(self, FLOWNETWORK_BOUNDS)
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.validate_architecture()  # transformers would wrap a ValueError that is raised later
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Number of features per attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """Layer type of each layer's cache: all layers use `cache.FlowCacheLayer`."""
        return ["flow_state"] * self.num_hidden_layers

    def validate_layer_type(self):
        """Skip the check of transformers, because `layer_types` is derived."""

    def validate_rope(self):
        """Validate `rope_parameters` unless `head_dim` is odd; the last feature is then not rotated."""
        if self.head_dim % 2:
            return
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(str(error.args[0])) from error

    def validate_architecture(self):
        """Raise `ValueError` if a field is out of range or fields contradict each other."""
        check_bounds(self, FLOWNETWORK_BOUNDS)
        check_rope_parameters(self.rope_parameters)
        if not 0 < self.norm_eps <= MAX_FACTOR:
            raise ValueError(
                f"`norm_eps` must be positive and at most {MAX_FACTOR}, got {number_text(self.norm_eps)}."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be below `vocab_size` ({self.vocab_size}) and not negative, or None, "
                f"got {self.pad_token_id}."
            )
        if self.block_type not in BLOCK_TYPES:
            raise ValueError(f"`block_type` must be one of {BLOCK_TYPES}, got {self.block_type!r}.")
        if not 0 < self.base_sparsity <= 1:
            raise ValueError(f"`base_sparsity` must lie in (0, 1], got {self.base_sparsity}.")
        if self.min_flow_window > self.flow_window:
            raise ValueError(
                f"`min_flow_window` ({self.min_flow_window}) must be at most `flow_window` ({self.flow_window})."
            )
        for field in ("memory_decay", "memory_bank_decay"):
            if not 0 < getattr(self, field) < 1:
                raise ValueError(f"`{field}` must lie in (0, 1), got {getattr(self, field)}.")
        for field in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"`{field}` must lie in [0, 1), got {getattr(self, field)}.")
        for field in ("num_attention_heads", "num_memory_heads"):
            heads = getattr(self, field)
            if self.hidden_size % heads:
                raise ValueError(
                    f"`{field}` ({heads}) must divide `hidden_size` ({self.hidden_size}); "
                    f"set it to {largest_divisor(self.hidden_size, heads)}."
                )
        if self.head_dim % 2 and (self.rope_parameters or {}).get("rope_type", "default") != "default":
            raise ValueError(
                f"`rope_parameters` of type {self.rope_parameters['rope_type']!r} require an even number of features "
                f"per head, got {self.head_dim} (`hidden_size` / `num_attention_heads`)."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` ({self.num_key_value_heads}) must divide `num_attention_heads` "
                f"({self.num_attention_heads}); set it to "
                f"{largest_divisor(self.num_attention_heads, self.num_key_value_heads)}."
            )


enter_auto_names(FlowNetworkConfig.model_type, AUTO_MAP)

__all__ = ["FlowNetworkConfig"]
