"""Configuration of the original DFN, for converted checkpoints."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..hub_code import HubCodeMixin
from ..modules.auto_names import enter_auto_names
from ..modules.config_bounds import MAX_FACTOR, MAX_LAYERS, MAX_WIDTH, MAX_WINDOW, check_bounds, number_text

AUTO_MAP = {
    "AutoConfig": "configuration_dfn_native.DFNNativeConfig",
    "AutoModel": "modeling_dfn_native.DFNNativeModel",
}

DFN_NATIVE_BOUNDS = {
    "input_dim": (1, MAX_WIDTH),
    "entity_dim": (1, MAX_WIDTH),
    "field_dim": (1, MAX_WIDTH),
    "num_entities": (1, MAX_WIDTH),
    "num_layers": (1, MAX_LAYERS),
    "k": (1, 2**12),
    "memory_size": (1, MAX_WINDOW),
    "field_resolution": (1, 2**24),
    "alpha": (-MAX_FACTOR, MAX_FACTOR),
}


@strict
class DFNNativeConfig(HubCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a converted `DFNPureModel`. The fields are the arguments of the original constructor.

    Args:
        input_dim (`int`, defaults to 768): Number of features of a field value.
        entity_dim (`int`, defaults to 256): Width of an entity's state.
        field_dim (`int`, defaults to 128): Width of a density.
        num_entities (`int`, defaults to 64): Number of entities extracted from a field.
        num_layers (`int`, defaults to 4): Number of layers.
        k (`int`, defaults to 8): Number of neighbours of an entity, itself excluded.
        alpha (`float`, defaults to 0.1): Step size of an entity along its flow.
        sigma (`float`, defaults to 1.0): Width of the affinity kernel.
        memory_size (`int`, defaults to 32): Number of memory rows.
        beta (`float`, defaults to 0.9): Decay of the memory per forward pass.
        dropout (`float`, defaults to 0.1): Dropout rate of the MLP.
        field_resolution (`int`, defaults to 100): Requested number of points of the output field; the side of the grid
            is its square root, rounded down.

    Raises:
        ValueError: a field is out of range; the message names it.

    Example:
        >>> from dfn_hf import DFNNativeConfig, DFNNativeModel
        >>> model = DFNNativeModel(DFNNativeConfig(input_dim=16, entity_dim=32, num_layers=1))
        >>> model.config.hidden_size
        32
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
        check_bounds(self, DFN_NATIVE_BOUNDS)
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.validate_architecture()  # transformers would wrap a ValueError that is raised later
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Name of `entity_dim` in transformers."""
        return self.entity_dim

    @property
    def num_hidden_layers(self) -> int:
        """Name of `num_layers` in transformers."""
        return self.num_layers

    def validate_architecture(self):
        """Raise `ValueError` if a field is out of range or fields contradict each other."""
        check_bounds(self, DFN_NATIVE_BOUNDS)
        if self.k >= self.num_entities:
            raise ValueError(
                f"`k` ({self.k}) must be below `num_entities` ({self.num_entities}), because an entity is not its own "
                "neighbour."
            )
        if not 0 < self.sigma <= MAX_FACTOR:
            raise ValueError(f"`sigma` must be positive and at most {MAX_FACTOR}, got {number_text(self.sigma)}.")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"`beta` must lie in [0, 1], got {self.beta}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")


enter_auto_names(DFNNativeConfig.model_type, AUTO_MAP)

__all__ = ["DFNNativeConfig"]
