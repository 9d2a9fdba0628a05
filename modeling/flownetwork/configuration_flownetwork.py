"""FlowNetwork configuration."""

import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from ..hub_code import HubCodeMixin

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_flownetwork.FlowNetworkConfig",
    "AutoModel": "modeling_flownetwork.FlowNetworkModel",
    "AutoModelForCausalLM": "modeling_flownetwork.FlowNetworkForCausalLM",
    "AutoModelForSequenceClassification": "modeling_flownetwork.FlowNetworkForSequenceClassification",
}

BLOCK_TYPES = ("enhanced_flow", "flow_transformer")


def adjust_num_heads(d_model: int, requested: int) -> int:
    """The largest number of heads up to `requested` that divides `d_model`; logs one line if it is another.

    Raises:
        ValueError: a number below 1.
    """
    if d_model < 1 or requested < 1:
        raise ValueError(f"d_model ({d_model}) and the number of heads ({requested}) must be at least 1.")
    heads = largest_divisor(d_model, requested)
    if heads != requested:
        logger.warning(f"{requested} heads do not divide a d_model of {d_model}: taking {heads}.")
    return heads


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


@strict
class FlowNetworkConfig(HubCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a FlowNetwork. The defaults give a small model.

    Args:
        vocab_size (`int`, defaults to 4096): Tokens of the vocabulary.
        hidden_size (`int`, defaults to 256): Width of a token's state.
        num_hidden_layers (`int`, defaults to 4): Layers.
        num_attention_heads (`int`, defaults to 4): Heads of the self-attention.
        num_key_value_heads (`int`, *optional*): Heads of its keys and values; as many as there are heads if not given.
        intermediate_size (`int`, defaults to 512): Inner width of the feed-forward network.
        block_type (`str`, defaults to `"enhanced_flow"`): What stands beside the flow in every layer: attention over
            the same window (`"enhanced_flow"`, linear cost) or over everything (`"flow_transformer"`).
        num_patterns (`int`, defaults to 8): Flow patterns of a layer.
        base_sparsity (`float`, defaults to 0.1): Share of the reachable tokens that flow into one; the router chooses
            between a half and one and a half of it.
        flow_window (`int`, defaults to 128): Most recent tokens that can flow into one, the token itself included.
        min_flow_window (`int`, defaults to 8): The least window that the router can choose.
        memory_size (`int`, defaults to 16): Slots of the memory bank, and of each layer's memory of the sequence. 0
            turns both off.
        num_memory_heads (`int`, defaults to 4): Heads of the attention to the memory.
        memory_decay (`float`, defaults to 0.9): Weight that a slot of the sequence's memory, or of the router's
            context, keeps per chunk, before training.
        memory_chunk (`int`, defaults to 64): Tokens that are pooled into the sequence's memory at a time.
        memory_bank_decay (`float`, defaults to 0.99): Weight that a slot of the bank keeps per optimizer step.
        max_position_embeddings (`int`, defaults to 2048): Longest input that the model is meant for. Positions are
            rotary: longer ones run.
        rope_parameters (`dict`, *optional*): Rotary embedding, as for other models of transformers.
        hidden_dropout (`float`, defaults to 0.0): Dropout on what each block adds to the state.
        attention_dropout (`float`, defaults to 0.0): Dropout on the weights of attention.
        norm_eps (`float`, defaults to 1e-6): Added to mean squares before their root is taken.
        initializer_range (`float`, *optional*): Standard deviation of embeddings and projections; 1/sqrt(hidden_size)
            if not given.
        tie_word_embeddings (`bool`, defaults to `True`): Share the embedding with the output layer.
        use_cache (`bool`, defaults to `True`): Return the state for continuation.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Special tokens.

    Raises:
        ValueError: a field out of range, or fields that contradict each other; the message names them.
        huggingface_hub.errors.StrictDataclassError: a field of the wrong type.
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
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5 if self.hidden_size > 0 else 1.0
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.validate_architecture()  # here too, where its ValueError reaches the user as it is
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Features of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """Every layer keeps its state in a `cache.FlowCacheLayer`."""
        return ["flow_state"] * self.num_hidden_layers

    def validate_layer_type(self):
        """Nothing to check: `layer_types` is derived."""

    def validate_rope(self):
        """As everywhere, but for odd heads: their last feature is not rotated, so they are fine."""
        if self.head_dim % 2 == 0:
            super().validate_rope()

    def validate_architecture(self):
        """Reject values out of range and fields that contradict each other."""
        for field in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "intermediate_size", "num_patterns", "flow_window", "min_flow_window", "num_memory_heads",
            "max_position_embeddings",
        ):  # fmt: skip
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, got {getattr(self, field)}.")
        for field in ("memory_size", "initializer_range"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"`{field}` must be finite and not negative, got {getattr(self, field)}.")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"`norm_eps` must be finite and positive, got {self.norm_eps}.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must lie in the vocabulary (`vocab_size` is {self.vocab_size}) or be None, "
                f"got {self.pad_token_id}."
            )
        if self.block_type not in BLOCK_TYPES:
            raise ValueError(f"`block_type` must be one of {BLOCK_TYPES}, got {self.block_type!r}.")
        if not 0 < self.base_sparsity <= 1:
            raise ValueError(f"`base_sparsity` must lie in (0, 1], got {self.base_sparsity}.")
        if self.min_flow_window > self.flow_window:
            raise ValueError(
                f"`min_flow_window` ({self.min_flow_window}) must not be above `flow_window` ({self.flow_window})."
            )
        if self.memory_chunk < 2:
            raise ValueError(
                f"`memory_chunk` must be at least 2 for there to be something to pool, got {self.memory_chunk}."
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
                    f"`{field}` ({heads}) must divide `hidden_size` ({self.hidden_size}): "
                    f"{largest_divisor(self.hidden_size, heads)} does."
                )
        if self.head_dim % 2 and (self.rope_parameters or {}).get("rope_type", "default") != "default":
            raise ValueError(
                f"`rope_parameters` of type {self.rope_parameters['rope_type']!r} need an even number of features per "
                f"head, got {self.head_dim} (`hidden_size` / `num_attention_heads`)."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` ({self.num_key_value_heads}) must divide `num_attention_heads` "
                f"({self.num_attention_heads}): {largest_divisor(self.num_attention_heads, self.num_key_value_heads)} "
                "does."
            )


__all__ = ["FlowNetworkConfig"]
