"""Configuration of the original FlowNetworks, for converted checkpoints."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..hub_code import HubCodeMixin
from ..modules.auto_names import enter_auto_names
from ..modules.config_bounds import (
    MAX_LAYERS,
    MAX_TOKEN_ID,
    MAX_VOCABULARY,
    MAX_WIDTH,
    MAX_WINDOW,
    check_bounds,
    number_text,
)

AUTO_MAP = {
    "AutoConfig": "configuration_flownetwork_native.FlowNetworkNativeConfig",
    "AutoModel": "modeling_flownetwork_native.FlowNetworkNativeModel",
}

VERSIONS = ("F1", "F4", "F5")

FLOWNETWORK_NATIVE_BOUNDS = {
    "vocab_size": (1, MAX_VOCABULARY),
    "d_model": (1, MAX_WIDTH),
    "num_layers": (1, MAX_LAYERS),
    "max_seq_len": (1, 2**24),
    "num_patterns": (1, 2**12),
    "dense_limit": (0, 2**31),
    "memory_size": (0, MAX_WINDOW),
}


@strict
class FlowNetworkNativeConfig(HubCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a converted `FlowNetwork` or `EnhancedFlowTransformer`.

    `version` names the original; the other fields are the arguments of the original constructor.

    Args:
        version (`str`, defaults to `"F1"`): `"F1"` is the first published `FlowNetwork`, `"F5"` the `FlowNetwork` of
            version 3.1, `"F4"` the `EnhancedFlowTransformer` of version 3.1.
        vocab_size (`int`, defaults to 256): Number of tokens in the vocabulary.
        d_model (`int`, defaults to 512): Width of the hidden states.
        num_layers (`int`, defaults to 6): Number of layers.
        max_seq_len (`int`, defaults to 2048): Number of position embeddings; F4 has none.
        dropout (`float`, defaults to 0.1): Dropout rate.
        num_patterns (`int`, defaults to 8): Number of flow patterns per layer.
        dense_limit (`int`, defaults to 64): F1: flow matrices with at most this number of entries stay dense. The
            value is 64 since `flownetwork_improved.py` and 0 in the first version, `flownetwork.py`.
        memory_size (`int`, defaults to 0): F4: number of memory rows, which the model does not read; 0 for
            `use_memory=False`.
        boundary_token_ids (`list[int]`, *optional*): F4: ids of tokens that separate words; without them each layer
            predicts the boundaries.

    Raises:
        ValueError: a field is out of range; the message names it.

    Example:
        >>> from dfn_hf import FlowNetworkNativeConfig, FlowNetworkNativeModel
        >>> model = FlowNetworkNativeModel(FlowNetworkNativeConfig(version="F5", d_model=16, num_layers=1))
        >>> model.config.hidden_size
        16
    """

    model_type = "flownetwork_native"

    version: str = "F1"
    vocab_size: int = 256
    d_model: int = 512
    num_layers: int = 6
    max_seq_len: int = 2048
    dropout: float | int = 0.1
    num_patterns: int = 8
    dense_limit: int = 64
    memory_size: int = 0
    boundary_token_ids: list[int] | None = None
    auto_map: dict[str, str] | None = None

    def __post_init__(self, **kwargs):
        check_bounds(self, FLOWNETWORK_NATIVE_BOUNDS)
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.validate_architecture()  # transformers would wrap a ValueError that is raised later
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Name of `d_model` in transformers."""
        return self.d_model

    @property
    def num_hidden_layers(self) -> int:
        """Name of `num_layers` in transformers."""
        return self.num_layers

    def validate_architecture(self):
        """Raise `ValueError` if a field is out of range."""
        if self.version not in VERSIONS:
            raise ValueError(f"`version` must be one of {VERSIONS}, got {self.version!r}.")
        check_bounds(self, FLOWNETWORK_NATIVE_BOUNDS)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")
        if self.version != "F4" and (self.memory_size or self.boundary_token_ids):
            raise ValueError(
                f"`memory_size` ({self.memory_size}) and `boundary_token_ids` ({self.boundary_token_ids}) require "
                f'`version` "F4", got {self.version!r}: omit them.'
            )
        for token in self.boundary_token_ids or ():
            if not -MAX_TOKEN_ID <= token < self.vocab_size:
                raise ValueError(
                    f"`boundary_token_ids` contains {number_text(token)}, which must be below `vocab_size` "
                    f"({self.vocab_size})."
                )


enter_auto_names(FlowNetworkNativeConfig.model_type, AUTO_MAP)

__all__ = ["FlowNetworkNativeConfig"]
