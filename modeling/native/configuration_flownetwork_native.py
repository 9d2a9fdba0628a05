"""Configuration of the original FlowNetworks, for converted checkpoints."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..hub_code import HubCodeMixin

AUTO_MAP = {
    "AutoConfig": "configuration_flownetwork_native.FlowNetworkNativeConfig",
    "AutoModel": "modeling_flownetwork_native.FlowNetworkNativeModel",
}

VERSIONS = ("F1", "F4", "F5")


@strict
class FlowNetworkNativeConfig(HubCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a converted `FlowNetwork` or `EnhancedFlowTransformer`: the arguments of the original's
    constructor, under its names, and which original it is.

    Args:
        version (`str`, defaults to `"F1"`): `"F1"` is `FlowNetwork` as first published, `"F5"` that of version 3.1,
            `"F4"` the `EnhancedFlowTransformer` of version 3.1.
        vocab_size (`int`, defaults to 256): Tokens of the vocabulary.
        d_model (`int`, defaults to 512): Width of a token's state.
        num_layers (`int`, defaults to 6): Layers.
        max_seq_len (`int`, defaults to 2048): Places that have an embedding; F4 has no such embeddings.
        dropout (`float`, defaults to 0.1): Dropout, in training.
        num_patterns (`int`, defaults to 8): Flow patterns of a layer.
        dense_limit (`int`, defaults to 64): F1: a flow matrix of at most so many entries stays dense. 64 since
            `flownetwork_improved.py`, 0 in the first version, `flownetwork.py`.
        memory_size (`int`, defaults to 0): F4: rows of its memory, which nothing reads; 0 for `use_memory=False`.
        boundary_token_ids (`list[int]`, *optional*): F4: tokens known to separate words; without, each layer guesses.

    Raises:
        ValueError: a field out of range; the message names it.
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
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.validate_architecture()  # here too, where its ValueError reaches the user as it is
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """`d_model`, under transformers' name."""
        return self.d_model

    @property
    def num_hidden_layers(self) -> int:
        """`num_layers`, under transformers' name."""
        return self.num_layers

    def validate_architecture(self):
        """Reject values out of range."""
        if self.version not in VERSIONS:
            raise ValueError(f"`version` must be one of {VERSIONS}, got {self.version!r}.")
        for field in ("vocab_size", "d_model", "num_layers", "max_seq_len", "num_patterns"):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, got {getattr(self, field)}.")
        for field in ("dense_limit", "memory_size"):
            if getattr(self, field) < 0:
                raise ValueError(f"`{field}` must not be negative, got {getattr(self, field)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")
        if self.version != "F4" and (self.memory_size or self.boundary_token_ids):
            raise ValueError(
                f"`memory_size` ({self.memory_size}) and `boundary_token_ids` ({self.boundary_token_ids}) are of "
                f'`version` "F4" alone, got {self.version!r}: leave them out.'
            )
        for token in self.boundary_token_ids or ():
            if token >= self.vocab_size:
                raise ValueError(
                    f"`boundary_token_ids` holds {token}, outside the vocabulary of {self.vocab_size} (`vocab_size`)."
                )


__all__ = ["FlowNetworkNativeConfig"]
