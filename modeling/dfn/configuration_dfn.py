"""DFN configuration."""

import copy
import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..hub_code import HubCodeMixin
from ..ops.cell_grid import ball_cells_per_axis, check_cell_sizes, grid_axes

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
SEARCHES = ("cells", "exact")
MAX_CELLS = 2**20  # of a table; every row of a cache holds the newest entity of each


@strict
class DFNConfig(HubCodeMixin, PreTrainedConfig):
    r"""
    Configuration of a Dynamic Flow Network. The defaults give a small model.

    Args:
        vocab_size (`int`, defaults to 4096): Tokens of the vocabulary.
        hidden_size (`int`, defaults to 256): Width of an entity's state.
        num_hidden_layers (`int`, defaults to 4): Layers.
        num_attention_heads (`int`, defaults to 4): Heads; each has its own positions and its own share of the values.
        intermediate_size (`int`, defaults to 768): Inner width of the Dynamic Field MLP.
        position_dim (`int`, defaults to 4): Dimensions of a head's position space. 8 costs more search and finds more.
        num_neighbors (`int`, defaults to 16): K, entities read beyond the local window. 0 turns the search off.
        local_window (`int`, defaults to 32): W, most recent entities always read, the entity itself included.
        num_tables (`int`, defaults to 16): Grids of the cell search.
        candidates_per_table (`int`, defaults to 8): Most recent entities of a cell that are ranked. Many tables with
            few candidates each find more than few tables with many.
        cell_sizes (`list[float]`, *optional*): Edge of each table's cells; geometric from 8 to 0.35 if not given.
        flow_step (`float`, defaults to 1.0): α, how far an entity moves along its flow; 0 is the ablation without.
        moved_query (`bool`, defaults to `True`): The moved entity reads others at their rest positions. If
            `False` all are found where they have moved to, the paper's single position p'.
        flow_norm (`str`, defaults to `"entity"`): What FlowNorm averages the squared flow over: `"entity"` itself or
            the `"running"` mean so far. `"rms"` is RMSNorm and `"none"` nothing, for ablations.
        conv_kernel (`int`, defaults to 4): Taps of the short causal convolution.
        output_gate (`bool`, defaults to `True`): Gate what an entity has read. `False` with `gated_mlp` and
            `flow_norm="rms"` leaves a Llama's parts around the flow attention.
        gated_mlp (`bool`, defaults to `False`): The Dynamic Field MLP is SwiGLU, not GELU.
        search_implementation (`str`, defaults to `"cells"`): `"cells"`, O(n log n), or `"exact"`, O(n²). Read at every
            call: it may be changed on a built model.
        search_seed (`int`, defaults to 0): Draws the grids when a model is initialised. They are saved with it.
        carry_positions (`bool`, defaults to `False`): Positions of a layer start from the layer before's moved ones.
        memory_slots (`int`, defaults to 0): Slots of the persistent field memory. 0 turns it off.
        memory_chunk (`int`, defaults to 64): Entities that are pooled into the memory at a time.
        memory_decay (`float`, defaults to 0.9): β before training, of each slot.
        readout_window (`int`, defaults to 1): Most recent entities whose weighted mean is read out.
        is_causal (`bool`, defaults to `True`): Entities read those before them. If `False` those on both sides, for
            embeddings and classification; fields are always read so.
        entity_sampling (`str`, defaults to `"token"`): What becomes an entity: each `"token"` (of a field, each
            sample), or spans of samples, short where information is dense (`"adaptive"`) or of one length
            (`"uniform"`).
        entity_rate (`float`, defaults to 0.25): Entities per byte of text that spans are to have.
        max_entity_length (`int`, defaults to 64): Most bytes of an entity.
        ratio_loss_coef (`float`, defaults to 0.03): Weight of the loss that holds `entity_rate`.
        num_sample_layers (`int`, defaults to 1): DFN layers over samples (bytes, pixels) on each side of the
            entities; they read their local window.
        sample_intermediate_size (`int`, *optional*): Inner width of their MLP; `hidden_size` if not given.
        coordinate_dim (`int`, defaults to 2): Dimensions of a field: 1 for sound, 2 for images, 3 for video.
        value_dim (`int`, defaults to 1): Values of a field's sample: 1 for grey, 3 for colour.
        num_entities (`int`, defaults to 256): Entities that a field is sampled into.
        projection_dim (`int`, defaults to 128): Width of contrastive embeddings.
        contrastive_fields (`bool`, defaults to `False`): A tower for fields too, in `DFNForContrastive`.
        hidden_dropout (`float`, defaults to 0.0): Dropout on what each block adds to the state.
        attention_dropout (`float`, defaults to 0.0): Dropout on flow weights.
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

    model_type = "dfn"
    keys_to_ignore_at_inference = [
        "past_key_values", "cache", "entities", "density", "boundary_probs", "boundary_mask", "token_loss", "ratio_loss", "prediction_loss",
    ]  # fmt: skip

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 768
    position_dim: int = 4
    num_neighbors: int = 16
    local_window: int = 32
    num_tables: int = 16
    candidates_per_table: int = 8
    cell_sizes: list[float] | list[int] | list[float | int] | None = None
    flow_step: float | int = 1.0
    moved_query: bool = True
    flow_norm: str = "entity"
    conv_kernel: int = 4
    output_gate: bool = True
    gated_mlp: bool = False
    search_implementation: str = "cells"
    search_seed: int = 0
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
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5 if self.hidden_size > 0 else 1.0
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.validate_architecture()  # here too, where its ValueError reaches the user as it is
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Every layer keeps its state in a `cache.FlowCacheLayer`; those over samples come first."""
        return ["flow_state"] * (2 * self.causal_sample_layers + self.num_hidden_layers)

    @property
    def causal_sample_layers(self) -> int:
        """Layers over samples on each side of the entities of a text."""
        return 0 if self.entity_sampling == "token" else self.num_sample_layers

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "DFNConfig":
        """Transformers sizes the cache by `num_hidden_layers` of what it gets here: with the layers over samples."""
        if not decoder or self.entity_sampling == "token":
            return self
        config = copy.copy(self)
        config.num_hidden_layers, config.entity_sampling = len(self.layer_types), "token"
        return config

    def of_sample_layers(self) -> "DFNConfig":
        """The configuration of the layers over samples."""
        config = copy.copy(self)
        config.num_neighbors = config.memory_slots = 0
        config.carry_positions = False
        config.intermediate_size = self.sample_intermediate_size or self.hidden_size
        return config

    def validate_layer_type(self):
        """Nothing to check: `layer_types` is derived."""

    def validate_architecture(self):
        """Reject values out of range and fields that contradict each other."""
        for field in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "position_dim", "local_window", "num_tables", "candidates_per_table", "conv_kernel", "readout_window",
            "max_entity_length", "num_sample_layers", "coordinate_dim", "value_dim", "num_entities", "projection_dim",
        ):  # fmt: skip
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, got {getattr(self, field)}.")
        for field in ("num_neighbors", "memory_slots", "flow_step", "initializer_range", "ratio_loss_coef"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"`{field}` must be finite and not negative, got {getattr(self, field)}.")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"`norm_eps` must be finite and positive, got {self.norm_eps}.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must lie in the vocabulary (`vocab_size` is {self.vocab_size}) or be None, "
                f"got {self.pad_token_id}."
            )
        if self.memory_chunk < 2:
            raise ValueError(
                f"`memory_chunk` must be at least 2 for there to be something to pool, got {self.memory_chunk}."
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
        sizes = check_cell_sizes(self.cell_sizes, self.num_tables, self.candidates_per_table)
        cells = max(ball_cells_per_axis(self.position_dim, sizes)) ** grid_axes(self.position_dim)
        if cells > MAX_CELLS:
            raise ValueError(
                f"`cell_sizes` down to {min(sizes):g} divide the ball of `position_dim` {self.position_dim} into "
                f"{cells} cells: a table may have at most {MAX_CELLS}, take larger cells."
            )

    def _validate_sampling(self):
        if self.entity_sampling not in ENTITY_SAMPLINGS:
            raise ValueError(f"`entity_sampling` must be one of {ENTITY_SAMPLINGS}, got {self.entity_sampling!r}.")
        if self.sample_intermediate_size is not None and self.sample_intermediate_size < 1:
            raise ValueError(
                f"`sample_intermediate_size` must be at least 1 or None, got {self.sample_intermediate_size}."
            )
        if not 1 / self.max_entity_length <= self.entity_rate < 1:
            raise ValueError(
                f"`entity_rate` must lie between 1/`max_entity_length` (1/{self.max_entity_length}) and 1, got "
                f"{self.entity_rate}."
            )
        if self.entity_sampling != "token" and self.local_window < 2:
            raise ValueError(
                f"`local_window` ({self.local_window}) is all that layers over samples read: with `entity_sampling` "
                f"{self.entity_sampling!r} it must be at least 2."
            )
        if self.entity_sampling != "token" and self.readout_window > 1:
            raise ValueError(
                f"`readout_window` ({self.readout_window}) reads tokens: with `entity_sampling` "
                f"{self.entity_sampling!r} it must be 1."
            )
        if not self.is_causal:
            for field, off in (("memory_slots", 0), ("readout_window", 1)):
                if getattr(self, field) != off:
                    raise ValueError(
                        f"`{field}` ({getattr(self, field)}) goes from left to right: without `is_causal` it must be "
                        f"{off}."
                    )


__all__ = ["DFNConfig"]
