"""DFN configuration."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from ..hub_code import HubCodeMixin
from ..modules.auto_names import enter_auto_names
from ..modules.config_bounds import (
    MAX_FACTOR,
    MAX_LAYERS,
    MAX_TOKEN_ID,
    MAX_VOCABULARY,
    MAX_WIDTH,
    MAX_WINDOW,
    check_bounds,
    number_text,
)

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_dfn.DFNConfig",
    "AutoModel": "modeling_dfn.DFNModel",
    "AutoModelForCausalLM": "modeling_dfn.DFNForCausalLM",
    "AutoModelForSequenceClassification": "modeling_dfn.DFNForSequenceClassification",
    "AutoModelForPreTraining": "modeling_dfn.DFNForFieldReconstruction",
    "AutoModelForTextEncoding": "modeling_dfn.DFNForContrastive",
}

ENTITY_SAMPLINGS = ("token", "adaptive", "uniform")
FLOW_NORMS = ("entity", "running", "rms", "none")
SEARCHES = ("tree", "exact")
REMOVED_OPTIONS = ("num_tables", "candidates_per_table", "cell_sizes", "search_seed")  # of "cells", an earlier search
DFN_BOUNDS = {
    "vocab_size": (1, MAX_VOCABULARY),
    "hidden_size": (1, MAX_WIDTH),
    "num_hidden_layers": (1, MAX_LAYERS),
    "num_attention_heads": (1, MAX_WIDTH),
    "intermediate_size": (1, MAX_WIDTH),
    "position_dim": (1, 2**10),  # squared distances on the grid are at most 2**16 * position_dim and must fit int32
    "num_neighbors": (0, 2**12),
    "local_window": (1, MAX_WINDOW),
    "num_leaves": (1, 2**10),
    "conv_kernel": (1, 2**10),
    "memory_slots": (0, MAX_WINDOW),
    "memory_chunk": (2, MAX_WINDOW),
    "readout_window": (1, 2**10),
    "max_entity_length": (1, MAX_WINDOW),
    "num_sample_layers": (1, MAX_LAYERS),
    "sample_intermediate_size": (1, MAX_WIDTH),
    "coordinate_dim": (1, 2**5),
    "value_dim": (1, MAX_WIDTH),
    "num_entities": (1, 2**24),
    "projection_dim": (1, MAX_WIDTH),
    "flow_step": (0, MAX_FACTOR),
    "initializer_range": (0, MAX_FACTOR),
    "ratio_loss_coef": (0, MAX_FACTOR),
    "bos_token_id": (-MAX_TOKEN_ID, MAX_TOKEN_ID),
}


@strict
class DFNConfig(HubCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a Dynamic Flow Network. The defaults give a small model.

    Args:
        vocab_size (`int`, defaults to 4096): Size of the vocabulary.
        hidden_size (`int`, defaults to 256): Width of the states.
        num_hidden_layers (`int`, defaults to 4): Number of DFN layers.
        num_attention_heads (`int`, defaults to 4): Number of heads; each has its own positions.
        intermediate_size (`int`, defaults to 768): Inner width of the Dynamic Field MLP.
        position_dim (`int`, defaults to 4): Dimensions of each head's position space. 8 finds more neighbours that
            matter, at a slower search.
        num_neighbors (`int`, defaults to 16): K, nearest neighbours beyond the local window. 0 disables the search.
        local_window (`int`, defaults to 32): W, number of most recent entities that are always attended to, the entity
            itself included.
        num_leaves (`int`, defaults to 8): Leaves of the box tree that each query reads, at most 16 entities each. More
            leaves find more of the nearest neighbours, at a slower search. It is read at every call and may be changed
            on a built model.
        flow_step (`float`, defaults to 1.0): α, factor of the flow in the moved position; 0 disables the flow.
        moved_query (`bool`, defaults to `True`): Use moved positions for queries and rest positions for keys. With
            `False` both use the moved position, the paper's single position p'.
        flow_norm (`str`, defaults to `"entity"`): What FlowNorm averages the squared flow over: `"entity"`, the entity
            itself, or `"running"`, all entities up to it. `"rms"` uses RMSNorm and `"none"` no norm, for ablations.
        conv_kernel (`int`, defaults to 4): Number of taps of the short convolution.
        output_gate (`bool`, defaults to `True`): Gate the output of the flow attention.
        gated_mlp (`bool`, defaults to `False`): Use SwiGLU instead of GELU in the Dynamic Field MLP. With
            `output_gate=False` and `flow_norm="rms"`, the rest of the layer equals a Llama's.
        search_implementation (`str`, defaults to `"tree"`): `"tree"`, a causal box tree, O(n log n), or `"exact"`,
            O(n²). It is read at every call and may be changed on a built model.
        carry_positions (`bool`, defaults to `False`): Add the previous layer's moved positions to the positions.
        memory_slots (`int`, defaults to 0): Slots of the persistent field memory. 0 disables it.
        memory_chunk (`int`, defaults to 64): Number of entities that are pooled into the memory together.
        memory_decay (`float`, defaults to 0.9): Initial value of each slot's decay β.
        readout_window (`int`, defaults to 1): Number of most recent states whose weighted mean the head reads.
        is_causal (`bool`, defaults to `True`): Attend to preceding entities only. `False` attends to both sides, for
            embeddings and classification; models of fields always do.
        entity_sampling (`str`, defaults to `"token"`): What becomes an entity: each token (of a field, each sample)
            with `"token"`; spans of samples that are short where information is dense with `"adaptive"`; spans of
            equal length with `"uniform"`.
        entity_rate (`float`, defaults to 0.25): Target number of entities per byte of text.
        max_entity_length (`int`, defaults to 64): Maximum bytes per entity.
        ratio_loss_coef (`float`, defaults to 0.03): Weight of the loss that keeps `entity_rate`.
        num_sample_layers (`int`, defaults to 1): Number of DFN layers over samples (bytes, pixels) before, and in
            texts also after, the layers over entities. They attend to their local window only.
        sample_intermediate_size (`int`, *optional*): Inner width of the MLP of those layers; default: `hidden_size`.
        coordinate_dim (`int`, defaults to 2): Dimensions of a field: 1 for sound, 2 for images, 3 for video.
        value_dim (`int`, defaults to 1): Values per sample of a field: 1 for grey, 3 for colour.
        num_entities (`int`, defaults to 256): Number of entities of a field.
        projection_dim (`int`, defaults to 128): Width of contrastive embeddings.
        contrastive_fields (`bool`, defaults to `False`): Give `DFNForContrastive` an encoder for fields.
        hidden_dropout (`float`, defaults to 0.0): Dropout on the output of attention and MLP.
        attention_dropout (`float`, defaults to 0.0): Dropout on attention weights.
        norm_eps (`float`, defaults to 1e-6): Added to mean squares before the root.
        initializer_range (`float`, *optional*): Standard deviation of initial embeddings and projections; default:
            1/sqrt(hidden_size).
        tie_word_embeddings (`bool`, defaults to `True`): Share the embedding with the output layer.
        use_cache (`bool`, defaults to `True`): Return the cache for continuation.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Special tokens.

    Raises:
        ValueError: a field is out of range, or fields contradict each other; the message names them.
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type.

    Example:
        >>> from dfn_hf import DFNConfig, DFNForCausalLM
        >>> config = DFNConfig(vocab_size=256, hidden_size=32, num_neighbors=8, local_window=16)
        >>> model = DFNForCausalLM(config)
        >>> model.config.num_neighbors
        8
    """

    model_type = "dfn"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "entities",
        "density",
        "boundary_probs",
        "boundary_mask",
        "token_loss",
        "aux_loss",
        "ratio_loss",
        "prediction_loss",
    ]

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 768
    position_dim: int = 4
    num_neighbors: int = 16
    local_window: int = 32
    num_leaves: int = 8
    flow_step: float | int = 1.0
    moved_query: bool = True
    flow_norm: str = "entity"
    conv_kernel: int = 4
    output_gate: bool = True
    gated_mlp: bool = False
    search_implementation: str = "tree"
    carry_positions: bool = False
    memory_slots: int = 0
    memory_chunk: int = 64
    memory_decay: float | int = 0.9
    readout_window: int = 1
    is_causal: bool = True
    entity_sampling: str = "token"
    entity_rate: float | int = 0.25
    max_entity_length: int = 64
    ratio_loss_coef: float | int = 0.03
    num_sample_layers: int = 1
    sample_intermediate_size: int | None = None
    coordinate_dim: int = 2
    value_dim: int = 1
    num_entities: int = 256
    projection_dim: int = 128
    contrastive_fields: bool = False
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
        kwargs = self._without_removed_options(kwargs)
        check_bounds(self, DFN_BOUNDS)
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.validate_architecture()  # here too: a validator's ValueError reaches the user wrapped in another error
        super().__post_init__(**kwargs)

    def _without_removed_options(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the additional fields without those of an earlier version, whose search is replaced by the tree."""
        removed = [name for name in REMOVED_OPTIONS if name in fields]
        if removed or self.search_implementation == "cells":
            logger.warning_once(
                "The DFN configuration is of an earlier version, whose neighbour search used cells: "
                f"`search_implementation='cells'` is read as 'tree', and {', '.join(REMOVED_OPTIONS)} are ignored."
            )
        if self.search_implementation == "cells":
            self.search_implementation = "tree"
        return {name: value for name, value in fields.items() if name not in removed}

    @property
    def layer_types(self) -> list[str]:
        """One entry per layer, which selects `cache.FlowCacheLayer`; layers over bytes come first."""
        return ["flow_state"] * (2 * self.causal_sample_layers + self.num_hidden_layers)

    @property
    def causal_sample_layers(self) -> int:
        """Number of layers over bytes before, and again after, the layers over entities of a text."""
        return 0 if self.entity_sampling == "token" else self.num_sample_layers

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "DFNConfig":
        """Return the configuration by which transformers sizes a cache.

        A cache has one layer for each of `layer_types`, but transformers reads `num_hidden_layers`. With layers over
        bytes, the returned copy therefore counts them in `num_hidden_layers`.
        """
        if not decoder or self.entity_sampling == "token":
            return self
        config = copy.copy(self)
        config.num_hidden_layers, config.entity_sampling = len(self.layer_types), "token"
        return config

    def of_sample_layers(self) -> "DFNConfig":
        """Return the configuration of the layers over samples: no neighbours, no memory, a smaller MLP."""
        config = copy.copy(self)
        config.num_neighbors = config.memory_slots = 0
        config.carry_positions = False
        config.intermediate_size = self.sample_intermediate_size or self.hidden_size
        return config

    def validate_layer_type(self):
        """Override transformers' check of `layer_types`, which is derived here."""

    def validate_architecture(self):
        """Raise a ValueError for a field out of range and for fields that contradict each other."""
        check_bounds(self, DFN_BOUNDS)
        if not 0 < self.norm_eps <= MAX_FACTOR:
            raise ValueError(
                f"`norm_eps` must be positive and at most {MAX_FACTOR}, got {number_text(self.norm_eps)}."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be None or less than `vocab_size` ({self.vocab_size}) and not negative, got "
                f"{self.pad_token_id}."
            )
        for field in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"`{field}` must lie in [0, 1), got {getattr(self, field)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.flow_norm not in FLOW_NORMS:
            raise ValueError(f"`flow_norm` must be one of {FLOW_NORMS}, got {self.flow_norm!r}.")
        if self.search_implementation not in SEARCHES:
            raise ValueError(f"`search_implementation` must be one of {SEARCHES}, got {self.search_implementation!r}.")
        self._validate_sampling()
        if not 0 < self.memory_decay < 1:
            raise ValueError(f"`memory_decay` must lie in (0, 1), got {self.memory_decay}.")

    def _validate_sampling(self):
        """The part of `validate_architecture` about `entity_sampling` and `is_causal`."""
        if self.entity_sampling not in ENTITY_SAMPLINGS:
            raise ValueError(f"`entity_sampling` must be one of {ENTITY_SAMPLINGS}, got {self.entity_sampling!r}.")
        if not 1 / self.max_entity_length <= self.entity_rate < 1:
            raise ValueError(
                f"`entity_rate` must be at least 1/`max_entity_length` (1/{self.max_entity_length}) and less than 1, "
                f"got {self.entity_rate}."
            )
        if self.entity_sampling != "token" and self.local_window < 2:
            raise ValueError(
                f"`local_window` must be at least 2 with `entity_sampling={self.entity_sampling!r}`, because layers "
                f"over samples attend to nothing else; got {self.local_window}."
            )
        if self.entity_sampling != "token" and self.readout_window > 1:
            raise ValueError(
                f"`readout_window` must be 1 with `entity_sampling={self.entity_sampling!r}`, got "
                f"{self.readout_window}."
            )
        if not self.is_causal:
            for field, off in (("memory_slots", 0), ("readout_window", 1)):
                if getattr(self, field) != off:
                    raise ValueError(
                        f"`{field}` must be {off} with `is_causal=False`, because it works from left to right only, "
                        f"got {getattr(self, field)}."
                    )


enter_auto_names(DFNConfig.model_type, AUTO_MAP)

__all__ = ["DFNConfig"]
