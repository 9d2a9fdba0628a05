"""Checkpoints of the original `EnhancedFlowTransformer`: F2 with attention, F3 of version 2, F4 of version 3.1.

In all three, tokens see later tokens, so that their training loss is not a language-modelling loss.
"""

from typing import Any

from ...modeling.flownetwork.configuration_flownetwork import FlowNetworkConfig, adjust_num_heads
from ...modeling.flownetwork.modeling_flownetwork import FlowNetworkForCausalLM
from ...modeling.native.configuration_flownetwork_native import FlowNetworkNativeConfig
from ...modeling.native.modeling_flownetwork_native import FlowNetworkNativeModel
from ..format import CheckpointFormat, Destination, Settings, Sizes
from ..key_table import Chunks, Dropped, Table
from .flownetwork import CHANNELS, EMBEDDING_FLOW, GATE, HEAD, NO_BIAS, POSITIONS, POST_NORM

CONSTANT_MEMORY = Dropped("adds a constant: the original reads only the mean of random values that it does not train")
DEPTH = Dropped("every layer runs here; in the original a mean over the batch determines the number of layers")
FLOW_GATE = Dropped("weights flow against attention, which are added here")
MEMORY_GATE = Dropped("scales the memory, which has no scale here")
SEQUENCE_MEAN = Dropped("reads the mean over the whole sequence, later tokens included")
SPARSITY = Dropped("determines the number of used entries of a pattern from a mean over the batch")
UNUSED = Dropped("the original does not read it")

# V vocab_size, D d_model, M max_seq_len, P num_patterns, G rows of the global memory, L rows of a layer's memory,
# K rows of a router's context memory, Y D + min(D, V)
F2: Table = {
    "memory_gate": ("1", MEMORY_GATE),
    "global_flow_gate": ("1", GATE),
    "global_memory": ("G D", "model.memory.memory_bank"),
    "token_embedding.weight": ("V D", "model.embed_tokens.weight"),
    "pos_embedding.weight": ("M D", POSITIONS),
    "norm_embedding.weight": ("D", EMBEDDING_FLOW),
    "norm_embedding.bias": ("D", EMBEDDING_FLOW),
    "embedding_flow.bias": ("D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.flow_patterns": ("P D 2D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.pattern_selector.0.weight": ("P 2D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.pattern_selector.0.bias": ("P", EMBEDDING_FLOW),
    "embedding_flow.flow_router.flow_intensity.0.weight": ("1 2D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.flow_intensity.0.bias": ("1", EMBEDDING_FLOW),
    "embedding_flow.layer_norm.weight": ("D", EMBEDDING_FLOW),
    "embedding_flow.layer_norm.bias": ("D", EMBEDDING_FLOW),
    "flow_layers.{layer}.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.flow_gate": ("1", FLOW_GATE),
    "flow_layers.{layer}.memory_bank": ("L D", UNUSED),
    "flow_layers.{layer}.flow_router.flow_patterns": ("P D D", CHANNELS),
    "flow_layers.{layer}.flow_router.context_memory": ("K D", UNUSED),
    "flow_layers.{layer}.flow_router.context_selector.0.weight": ("2P 2D", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.context_selector.0.bias": ("2P", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.context_selector.2.weight": ("P 2P", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.context_selector.2.bias": ("P", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.window_adaptor.0.weight": ("64 D", SPARSITY),
    "flow_layers.{layer}.flow_router.window_adaptor.0.bias": ("64", SPARSITY),
    "flow_layers.{layer}.flow_router.window_adaptor.2.weight": ("1 64", SPARSITY),
    "flow_layers.{layer}.flow_router.window_adaptor.2.bias": ("1", SPARSITY),
    "flow_layers.{layer}.flow_router.flow_intensity.0.weight": ("64 2D", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.flow_intensity.0.bias": ("64", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.flow_intensity.2.weight": ("1 64", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.flow_intensity.2.bias": ("1", SEQUENCE_MEAN),
    "flow_layers.{layer}.self_attention.in_proj_weight": (
        "3D D",
        Chunks(
            (
                "model.layers.{layer}.attention.q_proj.weight",
                "model.layers.{layer}.attention.k_proj.weight",
                "model.layers.{layer}.attention.v_proj.weight",
            )
        ),
    ),
    "flow_layers.{layer}.self_attention.in_proj_bias": ("3D", NO_BIAS),
    "flow_layers.{layer}.self_attention.out_proj.weight": ("D D", "model.layers.{layer}.out_proj.weight"),
    "flow_layers.{layer}.self_attention.out_proj.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.cross_attention.in_proj_weight": (
        "3D D",
        Chunks(
            (
                "model.layers.{layer}.memory_attention.q_proj.weight",
                "model.layers.{layer}.memory_attention.k_proj.weight",
                "model.layers.{layer}.memory_attention.v_proj.weight",
            )
        ),
    ),
    "flow_layers.{layer}.cross_attention.in_proj_bias": ("3D", NO_BIAS),
    "flow_layers.{layer}.cross_attention.out_proj.weight": (
        "D D",
        "model.layers.{layer}.memory_attention.o_proj.weight",
    ),
    "flow_layers.{layer}.cross_attention.out_proj.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.ffn.0.weight": ("4D D", "model.layers.{layer}.mlp.up_proj.weight"),
    "flow_layers.{layer}.ffn.0.bias": ("4D", NO_BIAS),
    "flow_layers.{layer}.ffn.3.weight": ("D 4D", "model.layers.{layer}.mlp.down_proj.weight"),
    "flow_layers.{layer}.ffn.3.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.norm1.weight": ("D", "model.layers.{layer}.input_norm.weight"),
    "flow_layers.{layer}.norm1.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.norm2.weight": ("D", "model.layers.{layer}.memory_norm.weight"),
    "flow_layers.{layer}.norm2.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.norm3.weight": ("D", "model.layers.{layer}.mlp_norm.weight"),
    "flow_layers.{layer}.norm3.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.final_norm.weight": ("D", POST_NORM),
    "flow_layers.{layer}.final_norm.bias": ("D", POST_NORM),
    "cross_attention.in_proj_weight": ("3D D", UNUSED),
    "cross_attention.in_proj_bias": ("3D", UNUSED),
    "cross_attention.out_proj.weight": ("D D", UNUSED),
    "cross_attention.out_proj.bias": ("D", UNUSED),
    "output_flow.bias": ("V", HEAD),
    "output_flow.flow_gate": ("1", HEAD),
    "output_flow.flow_router.flow_patterns": ("P V D", HEAD),
    "output_flow.flow_router.context_memory": ("K V", HEAD),
    "output_flow.flow_router.context_selector.0.weight": ("2P Y", HEAD),
    "output_flow.flow_router.context_selector.0.bias": ("2P", HEAD),
    "output_flow.flow_router.context_selector.2.weight": ("P 2P", HEAD),
    "output_flow.flow_router.context_selector.2.bias": ("P", HEAD),
    "output_flow.flow_router.window_adaptor.0.weight": ("64 D", HEAD),
    "output_flow.flow_router.window_adaptor.0.bias": ("64", HEAD),
    "output_flow.flow_router.window_adaptor.2.weight": ("1 64", HEAD),
    "output_flow.flow_router.window_adaptor.2.bias": ("1", HEAD),
    "output_flow.flow_router.flow_intensity.0.weight": ("64 Y", HEAD),
    "output_flow.flow_router.flow_intensity.0.bias": ("64", HEAD),
    "output_flow.flow_router.flow_intensity.2.weight": ("1 64", HEAD),
    "output_flow.flow_router.flow_intensity.2.bias": ("1", HEAD),
    "output_flow.input_projection.weight": ("V D", HEAD),
    "output_flow.input_projection.bias": ("V", HEAD),
    "output_flow.self_attention.in_proj_weight": ("3V V", HEAD),
    "output_flow.self_attention.in_proj_bias": ("3V", HEAD),
    "output_flow.self_attention.out_proj.weight": ("V V", HEAD),
    "output_flow.self_attention.out_proj.bias": ("V", HEAD),
    "output_flow.ffn.0.weight": ("4V V", HEAD),
    "output_flow.ffn.0.bias": ("4V", HEAD),
    "output_flow.ffn.3.weight": ("V 4V", HEAD),
    "output_flow.ffn.3.bias": ("V", HEAD),
    "output_flow.norm1.weight": ("D", HEAD),
    "output_flow.norm1.bias": ("D", HEAD),
    "output_flow.norm2.weight": ("V", HEAD),
    "output_flow.norm2.bias": ("V", HEAD),
    "output_flow.norm3.weight": ("V", HEAD),
    "output_flow.norm3.bias": ("V", HEAD),
    "output_flow.final_norm.weight": ("V", HEAD),
    "output_flow.final_norm.bias": ("V", HEAD),
    "final_norm.weight": ("D", "model.norm.weight"),
    "final_norm.bias": ("D", NO_BIAS),
    "adaptive_controller.0.weight": ("64 D", DEPTH),
    "adaptive_controller.0.bias": ("64", DEPTH),
    "adaptive_controller.2.weight": ("1 64", DEPTH),
    "adaptive_controller.2.bias": ("1", DEPTH),
}

# The letters are those of F2.
F3: Table = {
    "memory_gate": ("1", CONSTANT_MEMORY),
    "global_flow_gate": ("1", GATE),
    "global_memory": ("G D", CONSTANT_MEMORY),
    "token_embedding.weight": ("V D", "model.embed_tokens.weight"),
    "norm_embedding.weight": ("D", EMBEDDING_FLOW),
    "norm_embedding.bias": ("D", EMBEDDING_FLOW),
    "embedding_flow.bias": ("D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.flow_patterns": ("P D D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.pattern_selector.0.weight": ("P D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.pattern_selector.0.bias": ("P", EMBEDDING_FLOW),
    "embedding_flow.flow_router.flow_intensity.0.weight": ("1 D", EMBEDDING_FLOW),
    "embedding_flow.flow_router.flow_intensity.0.bias": ("1", EMBEDDING_FLOW),
    "embedding_flow.layer_norm.weight": ("D", EMBEDDING_FLOW),
    "embedding_flow.layer_norm.bias": ("D", EMBEDDING_FLOW),
    "flow_layers.{layer}.memory_bank": ("L D", UNUSED),
    "flow_layers.{layer}.flow_router.flow_patterns": ("P D D", CHANNELS),
    "flow_layers.{layer}.flow_router.context_memory": ("K D", UNUSED),
    "flow_layers.{layer}.flow_router.context_selector.0.weight": ("2P 2D", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.context_selector.0.bias": ("2P", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.context_selector.2.weight": ("P 2P", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.context_selector.2.bias": ("P", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.window_adaptor.0.weight": ("64 D", SPARSITY),
    "flow_layers.{layer}.flow_router.window_adaptor.0.bias": ("64", SPARSITY),
    "flow_layers.{layer}.flow_router.window_adaptor.2.weight": ("1 64", SPARSITY),
    "flow_layers.{layer}.flow_router.window_adaptor.2.bias": ("1", SPARSITY),
    "flow_layers.{layer}.flow_router.flow_intensity.0.weight": ("64 2D", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.flow_intensity.0.bias": ("64", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.flow_intensity.2.weight": ("1 64", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.flow_intensity.2.bias": ("1", SEQUENCE_MEAN),
    "flow_layers.{layer}.memory_mixer.0.weight": ("D 2D", CONSTANT_MEMORY),
    "flow_layers.{layer}.memory_mixer.0.bias": ("D", CONSTANT_MEMORY),
    "flow_layers.{layer}.memory_mixer.2.weight": ("D D", CONSTANT_MEMORY),
    "flow_layers.{layer}.memory_mixer.2.bias": ("D", CONSTANT_MEMORY),
    "flow_layers.{layer}.ffn_up.weight": (
        "8D D",
        Chunks(("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight")),
    ),
    "flow_layers.{layer}.ffn_up.bias": ("8D", NO_BIAS),
    "flow_layers.{layer}.ffn_down.weight": ("D 4D", "model.layers.{layer}.mlp.down_proj.weight"),
    "flow_layers.{layer}.ffn_down.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.norm1.weight": ("D", "model.layers.{layer}.input_norm.weight"),
    "flow_layers.{layer}.norm1.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.norm2.weight": ("D", "model.layers.{layer}.mlp_norm.weight"),
    "flow_layers.{layer}.norm2.bias": ("D", NO_BIAS),
    "output_flow.flow_router.flow_patterns": ("P V D", HEAD),
    "output_flow.flow_router.context_memory": ("K V", HEAD),
    "output_flow.flow_router.context_selector.0.weight": ("2P Y", HEAD),
    "output_flow.flow_router.context_selector.0.bias": ("2P", HEAD),
    "output_flow.flow_router.context_selector.2.weight": ("P 2P", HEAD),
    "output_flow.flow_router.context_selector.2.bias": ("P", HEAD),
    "output_flow.flow_router.window_adaptor.0.weight": ("64 D", HEAD),
    "output_flow.flow_router.window_adaptor.0.bias": ("64", HEAD),
    "output_flow.flow_router.window_adaptor.2.weight": ("1 64", HEAD),
    "output_flow.flow_router.window_adaptor.2.bias": ("1", HEAD),
    "output_flow.flow_router.flow_intensity.0.weight": ("64 Y", HEAD),
    "output_flow.flow_router.flow_intensity.0.bias": ("64", HEAD),
    "output_flow.flow_router.flow_intensity.2.weight": ("1 64", HEAD),
    "output_flow.flow_router.flow_intensity.2.bias": ("1", HEAD),
    "output_flow.ffn_up.weight": ("8V V", HEAD),
    "output_flow.ffn_up.bias": ("8V", HEAD),
    "output_flow.ffn_down.weight": ("V 4V", HEAD),
    "output_flow.ffn_down.bias": ("V", HEAD),
    "output_flow.norm1.weight": ("D", HEAD),
    "output_flow.norm1.bias": ("D", HEAD),
    "output_flow.norm2.weight": ("V", HEAD),
    "output_flow.norm2.bias": ("V", HEAD),
    "final_norm.weight": ("D", "model.norm.weight"),
    "final_norm.bias": ("D", NO_BIAS),
    "adaptive_controller.0.weight": ("64 D", DEPTH),
    "adaptive_controller.0.bias": ("64", DEPTH),
    "adaptive_controller.2.weight": ("1 64", DEPTH),
    "adaptive_controller.2.bias": ("1", DEPTH),
}

# The letters are those of F2, and C max(1, P // 3), X min(D, V).
F4: Table = {
    "memory_gate": ("1", UNUSED),
    "global_flow_gate": ("1", GATE),
    "global_memory": ("G D", UNUSED),
    "token_embedding.weight": ("V D", "model.embed_tokens.weight"),
    "norm_embedding.weight": ("D", EMBEDDING_FLOW),
    "norm_embedding.bias": ("D", EMBEDDING_FLOW),
    "embedding_flow.router.flow_patterns": ("P D D", EMBEDDING_FLOW),
    "embedding_flow.router.pattern_selector.0.weight": ("P D", EMBEDDING_FLOW),
    "embedding_flow.router.pattern_selector.0.bias": ("P", EMBEDDING_FLOW),
    "embedding_flow.router.flow_intensity.0.weight": ("1 D", EMBEDDING_FLOW),
    "embedding_flow.router.flow_intensity.0.bias": ("1", EMBEDDING_FLOW),
    "embedding_flow.norm.weight": ("D", EMBEDDING_FLOW),
    "embedding_flow.norm.bias": ("D", EMBEDDING_FLOW),
    "flow_layers.{layer}.flow_router.channel_patterns.0": ("C D D", CHANNELS),
    "flow_layers.{layer}.flow_router.channel_patterns.1": ("C D D", CHANNELS),
    "flow_layers.{layer}.flow_router.channel_patterns.2": ("C D D", CHANNELS),
    "flow_layers.{layer}.flow_router.channel_mixer.0.weight": ("64 D", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.channel_mixer.0.bias": ("64", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.channel_mixer.2.weight": ("3 64", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.channel_mixer.2.bias": ("3", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.context_projection.weight": ("D D", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.context_projection.bias": ("D", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.context_selector.0.weight": ("C 2D", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.context_selector.0.bias": ("C", SEQUENCE_MEAN),
    "flow_layers.{layer}.flow_router.flow_intensity.0.weight": (
        "1 D",
        "model.layers.{layer}.flow.intensity_proj.weight",
    ),
    "flow_layers.{layer}.flow_router.flow_intensity.0.bias": ("1", "model.layers.{layer}.flow.intensity_proj.bias"),
    "flow_layers.{layer}.spatial_router.patterns": ("2 D D", CHANNELS),
    "flow_layers.{layer}.spatial_router.classifier.0.weight": ("64 D", CHANNELS),
    "flow_layers.{layer}.spatial_router.classifier.0.bias": ("64", CHANNELS),
    "flow_layers.{layer}.spatial_router.classifier.2.weight": ("1 64", CHANNELS),
    "flow_layers.{layer}.spatial_router.classifier.2.bias": ("1", CHANNELS),
    "flow_layers.{layer}.ffn.0.weight": ("4D D", "model.layers.{layer}.mlp.up_proj.weight"),
    "flow_layers.{layer}.ffn.0.bias": ("4D", NO_BIAS),
    "flow_layers.{layer}.ffn.2.weight": ("D 4D", "model.layers.{layer}.mlp.down_proj.weight"),
    "flow_layers.{layer}.ffn.2.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.norm1.weight": ("D", "model.layers.{layer}.input_norm.weight"),
    "flow_layers.{layer}.norm1.bias": ("D", NO_BIAS),
    "flow_layers.{layer}.norm2.weight": ("D", "model.layers.{layer}.mlp_norm.weight"),
    "flow_layers.{layer}.norm2.bias": ("D", NO_BIAS),
    "output_flow.flow_router.channel_patterns.0": ("C V D", HEAD),
    "output_flow.flow_router.channel_patterns.1": ("C V D", HEAD),
    "output_flow.flow_router.channel_patterns.2": ("C V D", HEAD),
    "output_flow.flow_router.channel_mixer.0.weight": ("64 D", HEAD),
    "output_flow.flow_router.channel_mixer.0.bias": ("64", HEAD),
    "output_flow.flow_router.channel_mixer.2.weight": ("3 64", HEAD),
    "output_flow.flow_router.channel_mixer.2.bias": ("3", HEAD),
    "output_flow.flow_router.context_projection.weight": ("X D", HEAD),
    "output_flow.flow_router.context_projection.bias": ("X", HEAD),
    "output_flow.flow_router.context_selector.0.weight": ("C D+X", HEAD),
    "output_flow.flow_router.context_selector.0.bias": ("C", HEAD),
    "output_flow.flow_router.flow_intensity.0.weight": ("1 D", HEAD),
    "output_flow.flow_router.flow_intensity.0.bias": ("1", HEAD),
    "output_flow.spatial_router.patterns": ("2 V V", HEAD),
    "output_flow.spatial_router.classifier.0.weight": ("64 V", HEAD),
    "output_flow.spatial_router.classifier.0.bias": ("64", HEAD),
    "output_flow.spatial_router.classifier.2.weight": ("1 64", HEAD),
    "output_flow.spatial_router.classifier.2.bias": ("1", HEAD),
    "output_flow.ffn.0.weight": ("4V V", HEAD),
    "output_flow.ffn.0.bias": ("4V", HEAD),
    "output_flow.ffn.2.weight": ("V 4V", HEAD),
    "output_flow.ffn.2.bias": ("V", HEAD),
    "output_flow.norm1.weight": ("D", HEAD),
    "output_flow.norm1.bias": ("D", HEAD),
    "output_flow.norm2.weight": ("V", HEAD),
    "output_flow.norm2.bias": ("V", HEAD),
    "final_norm.weight": ("D", "model.norm.weight"),
    "final_norm.bias": ("D", NO_BIAS),
    "adaptive_controller.0.weight": ("64 D", DEPTH),
    "adaptive_controller.0.bias": ("64", DEPTH),
    "adaptive_controller.2.weight": ("1 64", DEPTH),
    "adaptive_controller.2.bias": ("1", DEPTH),
}

NOTES = (
    "In the original, tokens see later tokens. This model is causal and computes another function, so it must be "
    "trained.",
)
ATTENTION_NOTES = (
    *NOTES,
    "The attention to the memory has one head, as wide as all heads of the original together, because heads share "
    "keys and values here.",
)
NATIVE_NOTES = (
    "This model computes the function of the original without dropout: logits from `input_ids`. Each token sees the "
    "whole row, later tokens and padding included, and a mean over the batch determines the number of layers that "
    "run, so that rows depend on each other.",
    "If the original was given boundary tokens (flow_terminal.py uses space, full stop, ! and ?, newline), pass their "
    "ids: --config-override 'boundary_token_ids=[…]'.",
)
RANDOM_PROJECTION = "its output layer draws a new random projection in each forward pass"


def without(table: Table, *parts: str) -> Table:
    """Return the table without the keys that contain one of `parts`."""
    return {key: line for key, line in table.items() if not any(part in key for part in parts)}


# With use_memory=False. The feed-forward network of F2 then follows `norm2`.
F2_MEMORYLESS: Table = {
    **without(F2, "memory_gate", "global_memory", "memory_bank", "{layer}.cross_attention"),
    "flow_layers.{layer}.norm2.weight": ("D", "model.layers.{layer}.mlp_norm.weight"),
    "flow_layers.{layer}.norm3.weight": ("D", UNUSED),
    "flow_layers.{layer}.norm3.bias": ("D", UNUSED),
}
F3_MEMORYLESS = without(F3, "memory_gate", "global_memory", "memory_bank", "memory_mixer")
F4_MEMORYLESS = without(F4, "memory_gate", "global_memory")
PROJECTION = "output_flow.input_projection"  # exists in F2 if d_model differs from vocab_size


def common_fields(sizes: Sizes, settings: Settings) -> dict[str, Any]:
    """Return the fields of the configuration that F2, F3 and F4 determine in the same way."""
    return {
        "vocab_size": sizes["V"],
        "hidden_size": sizes["D"],
        "num_hidden_layers": sizes["layer"],
        "num_attention_heads": adjust_num_heads(sizes["D"], settings["num_heads"]),
        "intermediate_size": 4 * sizes["D"],
        "num_patterns": sizes["P"],
        "hidden_dropout": settings["dropout"],
    }


def attention_config(sizes: Sizes, settings: Settings) -> FlowNetworkConfig:
    """Return a configuration with full attention and a memory with the original's number of slots.

    The memory attention has one head, because heads share keys and values and the projections of the original would
    not fit. A chunk of the sequence memory has as many tokens as there are slots, so that the slots take no more
    memory than the states.
    """
    slots = sizes.get("G", 0)
    return FlowNetworkConfig(
        **common_fields(sizes, settings),
        block_type="flow_transformer",
        memory_size=slots,
        memory_chunk=max(2, slots),
        num_memory_heads=1,
        attention_dropout=settings["dropout"],
        max_position_embeddings=sizes["M"],
    )


def config(sizes: Sizes, settings: Settings) -> FlowNetworkConfig:
    """Return a configuration with default attention and memory, which have no counterpart in F3 and F4."""
    fields = common_fields(sizes, settings)
    return FlowNetworkConfig(
        **fields,
        memory_size=FlowNetworkConfig.memory_size if "G" in sizes else 0,
        num_memory_heads=fields["num_attention_heads"],
        max_position_embeddings=settings["max_seq_len"],
    )


def native_config(sizes: Sizes, settings: Settings) -> FlowNetworkNativeConfig:
    """Return the constructor arguments of the original."""
    return FlowNetworkNativeConfig(
        version="F4",
        vocab_size=sizes["V"],
        d_model=sizes["D"],
        num_layers=sizes["layer"],
        dropout=settings["dropout"],
        num_patterns=sizes["P"],
        memory_size=sizes.get("G", 0),
        boundary_token_ids=settings["boundary_token_ids"] or None,  # type: ignore[arg-type]  # list[int] | None
    )


STORED_NAMES = {"num_heads": "heads"}

FLOW_TRANSFORMERS = (
    *(
        CheckpointFormat(
            name="flownetwork-F2",
            settings={"num_heads": 8, "dropout": 0.1},
            table=table,
            model=Destination(FlowNetworkForCausalLM, attention_config, ATTENTION_NOTES),
            not_native=RANDOM_PROJECTION,
            stored_names=STORED_NAMES,
        )
        for table in (F2, F2_MEMORYLESS, without(F2, PROJECTION), without(F2_MEMORYLESS, PROJECTION))
    ),
    *(
        CheckpointFormat(
            name="flownetwork-F3",
            settings={"num_heads": 8, "dropout": 0.1, "max_seq_len": 4096},
            table=table,
            model=Destination(FlowNetworkForCausalLM, config, NOTES),
            not_native=RANDOM_PROJECTION,
            stored_names=STORED_NAMES,
        )
        for table in (F3, F3_MEMORYLESS)
    ),
    *(
        CheckpointFormat(
            name="flownetwork-F4",
            settings={"num_heads": 8, "dropout": 0.1, "max_seq_len": 4096, "boundary_token_ids": []},
            table=table,
            model=Destination(FlowNetworkForCausalLM, config, NOTES),
            native=Destination(FlowNetworkNativeModel, native_config, NATIVE_NOTES),
            stored_names=STORED_NAMES,
        )
        for table in (F4, F4_MEMORYLESS)
    ),
)
