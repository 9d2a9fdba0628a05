"""Checkpoints of the original `FlowNetwork`: F1 as first published, F5 of its version 3.1.

Both are functions of one token and its place: nothing passes between tokens.
"""

from collections.abc import Callable

from ...modeling.flownetwork.configuration_flownetwork import FlowNetworkConfig, adjust_num_heads
from ...modeling.flownetwork.modeling_flownetwork import FlowNetworkForCausalLM
from ...modeling.flownetwork.paper_api import feed_forward_size
from ...modeling.native.configuration_flownetwork_native import FlowNetworkNativeConfig
from ...modeling.native.modeling_flownetwork_native import FlowNetworkNativeModel
from ..format import Destination, Layout, Settings, Sizes
from ..key_table import Dropped, Table

CHANNELS = Dropped("acts between the channels of one token, not between tokens")
EMBEDDING_FLOW = Dropped("the embedding enters the layers as it is")
GATE = Dropped("a factor on the embedding, which the first layer normalises away")
HEAD = Dropped("the output layer is the embedding, shared")
NO_BIAS = Dropped("this package's layer has no bias there")
POSITIONS = Dropped("positions are rotary")
POST_NORM = Dropped("this package normalises before a block, not after it")

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

# The same letters.
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

HEADS = 8  # where the original has none: what its other models have by default

NOTES = (
    "Nothing passes between tokens in the original; this model is causal, has attention and memory, and computes "
    "another function: it needs training.",
)
NATIVE_NOTES = (
    "This model computes the original's function, dropout off: logits from a token and its place. Nothing passes "
    "between tokens, so it knows no context.",
)


def config(sizes: Sizes, settings: Settings) -> FlowNetworkConfig:
    """Sizes of the original; of heads and the feed-forward network, which it has not, those of `FlowNetwork`.

    Raises:
        ValueError: a checkpoint with one pattern, between which there is nothing to select.
    """
    if sizes["P"] == 1:
        raise ValueError(
            "the checkpoint has one flow pattern (num_patterns is 1), so that a FlowNetworkForCausalLM has no "
            "pattern_selector: give --native"
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
    """A function that gives the original's constructor arguments."""

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
    Layout(
        name="flownetwork-F1",
        # dense_limit is 0 in flownetwork.py, the first version, and 64 since flownetwork_improved.py.
        settings={"dropout": 0.1, "dense_limit": 64},
        table=F1,
        model=Destination(FlowNetworkForCausalLM, config, NOTES),
        native=Destination(FlowNetworkNativeModel, native_config("F1"), NATIVE_NOTES),
    ),
    Layout(
        name="flownetwork-F5",
        settings={"dropout": 0.1},
        table=F5,
        model=Destination(FlowNetworkForCausalLM, config, NOTES),
        native=Destination(FlowNetworkNativeModel, native_config("F5"), NATIVE_NOTES),
    ),
)
