"""Checkpoints of the original `DFNPureModel`, which maps a field of floats to a field; it has no vocabulary and no
order.
"""

from ...modeling.dfn.configuration_dfn import DFNConfig
from ...modeling.dfn.modeling_dfn import DFNModel
from ...modeling.native.configuration_dfn_native import DFNNativeConfig
from ...modeling.native.modeling_dfn_native import DFNNativeModel
from ..format import CheckpointFormat, Destination, Settings, Sizes
from ..key_table import Dropped, Table

NO_FIELD = Dropped("DFNModel takes tokens or embeddings as entities and does not extract entities from a field")
NO_OUTPUT_FIELD = Dropped("DFNModel returns states of entities, not a field")
NO_BIAS = Dropped("this package's projection has no bias")
POST_NORM = Dropped("this package normalises before each block, not after it")
STATE = Dropped("state of the last forward pass, not a weight")
POOLING = Dropped("this package's memory pools by attention; the original does not train this weight")
UNUSED = Dropped("the original does not use it")

# D entity_dim, F field_dim, I input_dim, C coord_dim, M memory_size, R 2 · field_resolution
TABLE: Table = {
    "density_field.density_projection.0.weight": ("F I", NO_FIELD),
    "density_field.density_projection.0.bias": ("F", NO_FIELD),
    "density_field.density_projection.2.weight": ("F F", NO_FIELD),
    "density_field.density_projection.2.bias": ("F", NO_FIELD),
    "density_field.coordinate_generator.weight": ("2 F", NO_FIELD),
    "density_field.coordinate_generator.bias": ("2", NO_FIELD),
    "entity_extractor.entity_mapper.0.weight": ("F F+2", NO_FIELD),
    "entity_extractor.entity_mapper.0.bias": ("F", NO_FIELD),
    "entity_extractor.entity_mapper.2.weight": ("D+3 F", NO_FIELD),
    "entity_extractor.entity_mapper.2.bias": ("D+3", NO_FIELD),
    "dfn_layers.{layer}.flow_attention.flow_projection.weight": (
        "2 D",
        "layers.{layer}.attention.entities.flow_proj.weight",
    ),
    "dfn_layers.{layer}.flow_attention.flow_projection.bias": ("2", NO_BIAS),
    "dfn_layers.{layer}.flow_attention.value_projection.weight": ("D D", "layers.{layer}.attention.value_proj.weight"),
    "dfn_layers.{layer}.flow_attention.value_projection.bias": ("D", NO_BIAS),
    "dfn_layers.{layer}.field_mlp.mlp.0.weight": ("4D 2D", "layers.{layer}.mlp.up_proj.weight"),
    "dfn_layers.{layer}.field_mlp.mlp.0.bias": ("4D", NO_BIAS),
    "dfn_layers.{layer}.field_mlp.mlp.3.weight": ("D 4D", "layers.{layer}.mlp.down_proj.weight"),
    "dfn_layers.{layer}.field_mlp.mlp.3.bias": ("D", NO_BIAS),
    "dfn_layers.{layer}.field_mlp.layer_norm.weight": ("D", POST_NORM),
    "dfn_layers.{layer}.field_mlp.layer_norm.bias": ("D", POST_NORM),
    "dfn_layers.{layer}.memory.memory": ("M D", STATE),
    "dfn_layers.{layer}.memory.memory_projection.weight": ("D D", "layers.{layer}.attention.memory.value_proj.weight"),
    "dfn_layers.{layer}.memory.memory_projection.bias": ("D", NO_BIAS),
    "dfn_layers.{layer}.memory.aggregate_projection.weight": ("D D", POOLING),
    "dfn_layers.{layer}.memory.aggregate_projection.bias": ("D", POOLING),
    "output_generator.output_projection.0.weight": ("2D D", NO_OUTPUT_FIELD),
    "output_generator.output_projection.0.bias": ("2D", NO_OUTPUT_FIELD),
    "output_generator.output_projection.2.weight": ("I 2D", NO_OUTPUT_FIELD),
    "output_generator.output_projection.2.bias": ("I", NO_OUTPUT_FIELD),
    "output_generator.field_generator.weight": ("R I", UNUSED),
    "output_generator.field_generator.bias": ("R", UNUSED),
}

NOTES = (
    "The original has no vocabulary, no order and no causal mask. This model is causal and computes another function, "
    "so it must be trained.",
    "The embeddings are new: pass `inputs_embeds`, or load the model as `DFNForCausalLM` with the `vocab_size` of "
    "your tokenizer and train it.",
)
NATIVE_NOTES = (
    "This model computes the function of the original on a field (`values`), without dropout and with the saved "
    "memory: each call equals the first call of the original after loading. It is neither causal nor a language "
    "model.",
)


def config(sizes: Sizes, settings: Settings) -> DFNConfig:
    """Return a configuration with one head, whose position space is the plane of the original, and one memory slot."""
    return DFNConfig(
        hidden_size=sizes["D"],
        num_hidden_layers=sizes["layer"],
        num_attention_heads=1,
        intermediate_size=4 * sizes["D"],
        position_dim=2,
        num_neighbors=settings["k"],
        flow_step=settings["alpha"],
        memory_slots=1,
        memory_decay=settings["beta"],
        hidden_dropout=settings["dropout"],
    )


def native_config(sizes: Sizes, settings: Settings) -> DFNNativeConfig:
    """Return the constructor arguments of the original."""
    return DFNNativeConfig(
        input_dim=sizes["I"],
        entity_dim=sizes["D"],
        field_dim=sizes["F"],
        num_layers=sizes["layer"],
        memory_size=sizes["M"],
        field_resolution=sizes["R"] // 2,
        **settings,
    )


DFN = CheckpointFormat(
    name="dfn",
    settings={"num_entities": 64, "k": 8, "alpha": 0.1, "sigma": 1.0, "beta": 0.9, "dropout": 0.1},
    table=TABLE,
    model=Destination(DFNModel, config, NOTES),
    native=Destination(DFNNativeModel, native_config, NATIVE_NOTES),
)
