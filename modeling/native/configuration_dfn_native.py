"""Configuration of the original DFN, for converted checkpoints."""

import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..hub_code import HubCodeMixin

AUTO_MAP = {
    "AutoConfig": "configuration_dfn_native.DFNNativeConfig",
    "AutoModel": "modeling_dfn_native.DFNNativeModel",
}


@strict
class DFNNativeConfig(HubCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a converted `DFNPureModel`: the arguments of the original's constructor, under its names.

    Args:
        input_dim (`int`, defaults to 768): Features of a value of the field.
        entity_dim (`int`, defaults to 256): Width of an entity's state.
        field_dim (`int`, defaults to 128): Width of a density.
        num_entities (`int`, defaults to 64): Entities that are kept of a field.
        num_layers (`int`, defaults to 4): Layers.
        k (`int`, defaults to 8): Neighbours of an entity, itself excluded.
        alpha (`float`, defaults to 0.1): How far an entity moves along its flow.
        sigma (`float`, defaults to 1.0): Width of the affinity.
        memory_size (`int`, defaults to 32): RowLayout of the memory.
        beta (`float`, defaults to 0.9): Share of itself that the memory keeps.
        dropout (`float`, defaults to 0.1): Dropout in the MLP, in training.
        field_resolution (`int`, defaults to 100): Points of the output field; its root, rounded down, is the side of
            the grid.

    Raises:
        ValueError: a field out of range; the message names it.
    """

    model_type = "dfn_native"

    input_dim: int = 768
    entity_dim: int = 256
    field_dim: int = 128
    num_entities: int = 64
    num_layers: int = 4
    k: int = 8
    alpha: float | int = 0.1
    sigma: float | int = 1.0
    memory_size: int = 32
    beta: float | int = 0.9
    dropout: float | int = 0.1
    field_resolution: int = 100
    auto_map: dict[str, str] | None = None

    def __post_init__(self, **kwargs):
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.validate_architecture()  # here too, where its ValueError reaches the user as it is
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """`entity_dim`, under transformers' name."""
        return self.entity_dim

    @property
    def num_hidden_layers(self) -> int:
        """`num_layers`, under transformers' name."""
        return self.num_layers

    def validate_architecture(self):
        """Reject values out of range and fields that contradict each other."""
        for field in (
            "input_dim", "entity_dim", "field_dim", "num_entities", "num_layers", "k", "memory_size",
            "field_resolution",
        ):  # fmt: skip
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, got {getattr(self, field)}.")
        if self.k >= self.num_entities:
            raise ValueError(
                f"`k` ({self.k}) must be below `num_entities` ({self.num_entities}): an entity is no neighbour of "
                "itself."
            )
        if not 0 < self.sigma < math.inf or not math.isfinite(self.alpha):
            raise ValueError(
                f"`sigma` must be finite and positive and `alpha` finite, got {self.sigma}, {self.alpha}."
            )
        if not 0 <= self.beta <= 1:
            raise ValueError(f"`beta` must lie in [0, 1], got {self.beta}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")


__all__ = ["DFNNativeConfig"]
