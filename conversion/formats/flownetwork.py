"""Checkpoints of the original `FlowNetwork`: F1 is the first published version, F5 is version 3.1.

Both compute a function of one token and its position; they mix no tokens.
"""

from collections.abc import Callable

from ...modeling.flownetwork.configuration_flownetwork import FlowNetworkConfig, adjust_num_heads
from ...modeling.flownetwork.modeling_flownetwork import FlowNetworkForCausalLM
from ...modeling.flownetwork.paper_api import feed_forward_size
from ...modeling.native.configuration_flownetwork_native import FlowNetworkNativeConfig
from ...modeling.native.modeling_flownetwork_native import FlowNetworkNativeModel
from ..format import CheckpointFormat, Destination, Settings, Sizes
from ..key_table import Dropped, Table

CHANNELS = Dropped("mixes the channels of one token, not tokens")
EMBEDDING_FLOW = Dropped("the layers use the embedding directly")
GATE = Dropped("scales the embedding; the norm of the first layer removes the scale")
HEAD = Dropped("the output layer shares the weights of the embedding")
NO_BIAS = Dropped("this package's layer has no bias")
POSITIONS = Dropped("positions are rotary")
POST_NORM = Dropped("this package normalises before each block, not after it")

# V vocab_size, D d_model, M max_seq_len, P num_patterns
F1: Table = {
    "global_flow_gate": ("1", GATE),
    "token_embedding.weight": ("V D", "model.embed_tokens.weight"),
    "pos_embedding.weight": ("M D", POSITIONS),
    "embedding_flow.bias": ("D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.flow_patterns": ("P D 2D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.pattern_selector.0.weight": ("P 2D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.pattern_selector.0.bias": ("P", EMBEDDING_FLOW),
    "embedding_flow.flow_router.flow_intensity.0.weight": ("1 2D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.flow_intensity.0.bias": ("1", EMBEDDING_FLOW),
    "embedding_flow.layer_norm.weight": ("D", EMBEDDING_FLOW),
    "embedding_flow.layer_norm.bias": ("D", EMBEDDING_FLOW),
    "flow_layers.{layer}.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.flow_router.flow_patterns": ("P D D", CHANNELS),
    "flow_layers.{layer}.flow_router.pattern_selector.0.weight": (
        "P D",
        "model.layers.{layer}.flow.pattern_selector.weight",
    ),
    "flow_layers.{layer}.flow_router.pattern_selector.0.bias": ("P", NO_BIAS),
    "flow_layers.{layer}.flow_router.flow_intensity.0.weight": (
        "1 D",
        "model.layers.{layer}.flow.intensity_proj.weight",
    ),
    "flow_layers.{layer}.flow_router.flow_intensity.0.bias": ("1", "model.layers.{layer}.flow.intensity_proj.bias"),
    "flow_layers.{layer}.layer_norm.weight": ("D", POST_NORM),
    "flow_layers.{layer}.layer_norm.bias": ("D", POST_NORM),
    "output_flow.bias": ("V", HEAD),
    "output_flow.flow_router.flow_patterns": ("P V D", HEAD),
    "output_flow.flow_router.pattern_selector.0.weight": ("P D", HEAD),
    "output_flow.flow_router.pattern_selector.0.bias": ("P", HEAD),
    "output_flow.flow_router.flow_intensity.0.weight": ("1 D", HEAD),
    "output_flow.flow_router.flow_intensity.0.bias": ("1", HEAD),
    "output_flow.layer_norm.weight": ("V", HEAD),
    "output_flow.layer_norm.bias": ("V", HEAD),
}

# The letters are those of F1.
F5: Table = {
    "global_flow_gate": ("1", GATE),
    "token_embedding.weight": ("V D", "model.embed_tokens.weight"),
    "pos_embedding.weight": ("M D", POSITIONS),
    "embedding_flow.router.flow_patterns": ("P D 2D", EMBEDDING_FLOW),
    "embedding_flow.router.pattern_selector.0.weight": ("P 2D", EMBEDDING_FLOW),
    "embedding_flow.router.pattern_selector.0.bias": ("P", EMBEDDING_FLOW),
    "embedding_flow.router.flow_intensity.0.weight": ("1 2D", EMBEDDING_FLOW),
    "embedding_flow.router.flow_intensity.0.bias": ("1", EMBEDDING_FLOW),
    "embedding_flow.norm.weight": ("D", EMBEDDING_FLOW),
    "embedding_flow.norm.bias": ("D", EMBEDDING_FLOW),
    "flow_layers.{layer}.router.flow_patterns": ("P D D", CHANNELS),
    "flow_layers.{layer}.router.pattern_selector.0.weight": (
        "P D",
        "model.layers.{layer}.flow.pattern_selector.weight",
    ),
    "flow_layers.{layer}.router.pattern_selector.0.bias": ("P", NO_BIAS),
    "flow_layers.{layer}.router.flow_intensity.0.weight": ("1 D", "model.layers.{layer}.flow.intensity_proj.weight"),
    "flow_layers.{layer}.router.flow_intensity.0.bias": ("1", "model.layers.{layer}.flow.intensity_proj.bias"),
    "flow_layers.{layer}.norm.weight": ("D", POST_NORM),
    "flow_layers.{layer}.norm.bias": ("D", POST_NORM),
    "output_flow.router.flow_patterns": ("P V D", HEAD),
    "output_flow.router.pattern_selector.0.weight": ("P D", HEAD),
    "output_flow.router.pattern_selector.0.bias": ("P", HEAD),
    "output_flow.router.flow_intensity.0.weight": ("1 D", HEAD),
    "output_flow.router.flow_intensity.0.bias": ("1", HEAD),
    "output_flow.norm.weight": ("V", HEAD),
    "output_flow.norm.bias": ("V", HEAD),
}

HEADS = 8  # the original has no heads; the default of its other models

NOTES = (
    "The original mixes no tokens. This model is causal, has attention and memory, and computes another function, so "
    "it must be trained.",
)
NATIVE_NOTES = (
    "This model computes the function of the original without dropout: logits from a token and its position. It mixes "
    "no tokens and therefore uses no context.",
)


def config(sizes: Sizes, settings: Settings) -> FlowNetworkConfig:
    """Return a configuration with the sizes of the original; heads and feed-forward network are those of
    `FlowNetwork`.

    Raises:
        ValueError: the checkpoint has one pattern, so that there is no pattern selector.
    """
    if sizes["P"] == 1:
        raise ValueError(
            "the checkpoint has one flow pattern (num_patterns is 1), but FlowNetworkForCausalLM has a "
            "pattern_selector only for several: pass --native"
        )
    heads = adjust_num_heads(sizes["D"], HEADS)
    return FlowNetworkConfig(
        vocab_size=sizes["V"],
        hidden_size=sizes["D"],
        num_hidden_layers=sizes["layer"],
        num_attention_heads=heads,
        num_memory_heads=heads,
        intermediate_size=feed_forward_size(sizes["D"]),
        num_patterns=sizes["P"],
        hidden_dropout=settings["dropout"],
        max_position_embeddings=sizes["M"],
    )


def native_config(version: str) -> Callable[[Sizes, Settings], FlowNetworkNativeConfig]:
    """Return a function that gives the constructor arguments of the original."""

    def config_of(sizes: Sizes, settings: Settings) -> FlowNetworkNativeConfig:
        return FlowNetworkNativeConfig(
            version=version,
            vocab_size=sizes["V"],
            d_model=sizes["D"],
            num_layers=sizes["layer"],
            max_seq_len=sizes["M"],
            num_patterns=sizes["P"],
            **settings,
        )

    return config_of


FLOW_NETWORKS = (
    CheckpointFormat(
        name="flownetwork-F1",
        # dense_limit is 0 in flownetwork.py, the first version, and 64 since flownetwork_improved.py.
        settings={"dropout": 0.1, "dense_limit": 64},
        table=F1,
        model=Destination(FlowNetworkForCausalLM, config, NOTES),
        native=Destination(FlowNetworkNativeModel, native_config("F1"), NATIVE_NOTES),
    ),
    CheckpointFormat(
        name="flownetwork-F5",
        settings={"dropout": 0.1},
        table=F5,
        model=Destination(FlowNetworkForCausalLM, config, NOTES),
        native=Destination(FlowNetworkNativeModel, native_config("F5"), NATIVE_NOTES),
    ),
)
