"""Keys of the original Liquid models, from the first version (L0) to the last (L6), and their targets.

Letters: V vocab_size, E embed_dim, L max_length, F ff_hidden_dim, X num_experts, Q lstm_hidden_size, K features of all
keys, D features of a head, R half of D, P length of the rotary table.
"""

from ..key_table import Chunks, Copies, Dropped, EveryNth, Squeezed, Table, prefixed

OTHER_EMBEDDING = Dropped(
    "encoder and decoder share one embedding here; the decoder's is used, because it alone affected the logits"
)
NO_BIAS = Dropped("this package's projection has no bias")
PLAIN_CONV = Dropped("this package's convolution is gated and has twice as many outputs")
LINEAR_EXPERT = Dropped("this package's experts are two linear maps with a GELU, not a single map")
IDLE_EXPERT = Dropped("the original discards the output of its experts: the weights have their initial values")
TWO_EXPERTS = Dropped("the encoder of the original always has two experts and is not trained")
RECONSTRUCTION = Dropped("only the reconstruction loss of the original uses it")
ROTARY = Dropped("a table of sines and cosines, not a weight")
DIFFERENCE = Dropped("this package's attention is not a difference of two attention maps")

EMBEDDING: Table = {
    "position_embedding.weight": ("L E", "position_embedding.weight"),
    "conv1.weight": ("E E 3", "conv1.weight"),
    "conv1.bias": ("E", "conv1.bias"),
    "conv2.weight": ("E E 3", "conv2.weight"),
    "conv2.bias": ("E", "conv2.bias"),
    "proj.weight": ("E E", "proj.weight"),
    "proj.bias": ("E", "proj.bias"),
}
NORMED_EMBEDDING: Table = {
    **EMBEDDING,
    "layer_norm.weight": ("E", Copies(("layer_norm.weight", "proj_norm.weight"))),
    "layer_norm.bias": ("E", Copies(("layer_norm.bias", "proj_norm.bias"))),
    "proj_head.weight": ("E E", RECONSTRUCTION),
    "proj_head.bias": ("E", RECONSTRUCTION),
}

NORMS: Table = {
    "norm1.weight": ("E", "attention_norm.weight"),
    "norm1.bias": ("E", "attention_norm.bias"),
    "norm2.weight": ("E", "conv_norm.weight"),
    "norm2.bias": ("E", "conv_norm.bias"),
    "norm3.weight": ("E", "moe_norm.weight"),
    "norm3.bias": ("E", "moe_norm.bias"),
}

ATTENTION_OUTPUT: Table = {
    "attention.out.weight": ("E E", "attention.o_proj.weight"),
    "attention.out.bias": ("E", "attention.o_proj.bias"),
}
QKV_ATTENTION: Table = {
    "attention.qkv.weight": (
        "3E E",
        Chunks(
            (
                "attention.attention.q_proj.weight",
                "attention.attention.k_proj.weight",
                "attention.attention.v_proj.weight",
            )
        ),
    ),
    "attention.qkv.bias": ("3E", NO_BIAS),
    **ATTENTION_OUTPUT,
}
GROUPED_ATTENTION: Table = {
    "attention.q_proj.weight": ("E E", "attention.attention.q_proj.weight"),
    "attention.q_proj.bias": ("E", NO_BIAS),
    "attention.k_proj.weight": ("K E", "attention.attention.k_proj.weight"),
    "attention.k_proj.bias": ("K", NO_BIAS),
    "attention.v_proj.weight": ("K E", "attention.attention.v_proj.weight"),
    "attention.v_proj.bias": ("K", NO_BIAS),
    **ATTENTION_OUTPUT,
}
ROTARY_ATTENTION: Table = {
    **GROUPED_ATTENTION,
    "attention.sin": ("P R", ROTARY),
    "attention.cos": ("P R", ROTARY),
}
DIFFERENTIAL_ATTENTION: Table = {
    "attention.q_proj1.weight": ("E E", "attention.attention.q_proj.weight"),
    "attention.q_proj2.weight": ("E E", DIFFERENCE),
    "attention.k_proj1.weight": ("K E", "attention.attention.k_proj.weight"),
    "attention.k_proj2.weight": ("K E", DIFFERENCE),
    "attention.v_proj.weight": ("K E", "attention.attention.v_proj.weight"),
    "attention.lambda_q1": ("D", DIFFERENCE),
    "attention.lambda_k1": ("D", DIFFERENCE),
    "attention.lambda_q2": ("D", DIFFERENCE),
    "attention.lambda_k2": ("D", DIFFERENCE),
    **ATTENTION_OUTPUT,
}

DILATED_CONV: Table = {
    "dilated_conv.conv.weight": ("E E 3", PLAIN_CONV),
    "dilated_conv.conv.bias": ("E", PLAIN_CONV),
}
DEFORMABLE_CONV: Table = {
    # The original predicts two offsets for each of the 3 taps and uses the first.
    "dilated_conv.deform_conv.offset_conv.weight": ("6 E 3", EveryNth(2, "gated_conv.deform_conv.offset_conv.weight")),
    "dilated_conv.deform_conv.offset_conv.bias": ("6", EveryNth(2, "gated_conv.deform_conv.offset_conv.bias")),
    "dilated_conv.deform_conv.conv.weight": ("2E 3E 1", Squeezed("gated_conv.deform_conv.tap_proj.weight")),
    "dilated_conv.deform_conv.conv.bias": ("2E", "gated_conv.deform_conv.tap_proj.bias"),
}

GATE: Table = {
    "moe.gate.weight": ("X E", "moe.gate.weight"),
    "moe.gate.bias": ("X", "moe.gate.bias"),
}
LINEAR_EXPERTS: Table = {
    **GATE,
    "moe.experts.{expert}.weight": ("E E", LINEAR_EXPERT),
    "moe.experts.{expert}.bias": ("E", LINEAR_EXPERT),
}
IDLE_EXPERTS: Table = {
    **GATE,
    "moe.experts.{expert}.weight": ("E E", IDLE_EXPERT),
    "moe.experts.{expert}.bias": ("E", IDLE_EXPERT),
}
ENCODER_EXPERTS_L1: Table = {
    "moe.gate.weight": ("2 E", TWO_EXPERTS),
    "moe.gate.bias": ("2", TWO_EXPERTS),
    "moe.experts.{encoder_expert}.weight": ("E E", TWO_EXPERTS),
    "moe.experts.{encoder_expert}.bias": ("E", TWO_EXPERTS),
}

FEED_FORWARD_L0: Table = {
    "ff_layer.0.weight": ("F E", "mlp.up_proj.weight"),
    "ff_layer.0.bias": ("F", "mlp.up_proj.bias"),
    "ff_layer.2.weight": ("E F", "mlp.down_proj.weight"),
    "ff_layer.2.bias": ("E", "mlp.down_proj.bias"),
}
FEED_FORWARD_L2: Table = {
    "ff_layer.0.weight": ("F E", "mlp.up_proj.weight"),
    "ff_layer.0.bias": ("F", "mlp.up_proj.bias"),
    "ff_layer.3.weight": ("E F", "mlp.down_proj.weight"),
    "ff_layer.3.bias": ("E", "mlp.down_proj.bias"),
}
FEED_FORWARD_L4: Table = {
    "ff_layer.0.weight": ("F E", "mlp.up_proj.weight"),
    "ff_layer.0.bias": ("F", "mlp.up_proj.bias"),
    "ff_layer.1.weight": ("F", "mlp.norm.weight"),
    "ff_layer.1.bias": ("F", "mlp.norm.bias"),
    "ff_layer.4.weight": ("E F", "mlp.down_proj.weight"),
    "ff_layer.4.bias": ("E", "mlp.down_proj.bias"),
}

OUTPUT: Table = {
    "layer_norm.weight": ("E", "model.decoder.norm.weight"),
    "layer_norm.bias": ("E", "model.decoder.norm.bias"),
    "output_layer.weight": ("V E", "lm_head.weight"),
    "output_layer.bias": ("V", NO_BIAS),
}
MEMORY: Table = {
    "external_memory.lstm.weight_ih_l{lstm_layer}": (
        "4Q Q",
        "model.decoder.external_memory.lstm.weight_ih_l{lstm_layer}",
    ),
    # The first LSTM layer reads the hidden states.
    "external_memory.lstm.weight_ih_l0": ("4Q E", "model.decoder.external_memory.lstm.weight_ih_l0"),
    "external_memory.lstm.weight_hh_l{lstm_layer}": (
        "4Q Q",
        "model.decoder.external_memory.lstm.weight_hh_l{lstm_layer}",
    ),
    "external_memory.lstm.bias_ih_l{lstm_layer}": ("4Q", "model.decoder.external_memory.lstm.bias_ih_l{lstm_layer}"),
    "external_memory.lstm.bias_hh_l{lstm_layer}": ("4Q", "model.decoder.external_memory.lstm.bias_hh_l{lstm_layer}"),
    "external_memory.output_layer.0.weight": ("Q Q", "model.decoder.external_memory.output_layer.0.weight"),
    "external_memory.output_layer.0.bias": ("Q", "model.decoder.external_memory.output_layer.0.bias"),
    "external_memory.output_layer.2.weight": ("E Q", "model.decoder.external_memory.output_layer.2.weight"),
    "external_memory.output_layer.2.bias": ("E", "model.decoder.external_memory.output_layer.2.bias"),
}


def encoder(embedding: Table, block: Table) -> Table:
    """Return the keys of an encoder with the given embedding and blocks."""
    return {
        "encoder.embedding.token_embedding.weight": ("V E", OTHER_EMBEDDING),
        **prefixed(embedding, "encoder.embedding.", "model.encoder.embedding."),
        **prefixed(block, "encoder.layers.{encoder_layer}.", "model.encoder.layers.{encoder_layer}."),
        "encoder.layer_norm.weight": ("E", "model.encoder.norm.weight"),
        "encoder.layer_norm.bias": ("E", "model.encoder.norm.bias"),
    }


def decoder(embedding: Table, block: Table, embedding_prefix="decoder_embedding.", layers="decoder_layers") -> Table:
    """Return the keys of a decoder; `embedding_prefix` and `layers` are the names that the original uses."""
    return {
        f"{embedding_prefix}token_embedding.weight": ("V E", "model.encoder.embed_tokens.weight"),
        **prefixed(embedding, embedding_prefix, "model.decoder.embedding."),
        **prefixed(block, layers + ".{decoder_layer}.", "model.decoder.layers.{decoder_layer}."),
        **OUTPUT,
    }


BLOCK_L0: Table = {**NORMS, **QKV_ATTENTION, **DILATED_CONV, **LINEAR_EXPERTS, **FEED_FORWARD_L0}
ENCODER_BLOCK_L1: Table = {**NORMS, **QKV_ATTENTION, **DILATED_CONV, **ENCODER_EXPERTS_L1, **FEED_FORWARD_L0}
BLOCK_L2: Table = {**NORMS, **QKV_ATTENTION, **DILATED_CONV, **LINEAR_EXPERTS, **FEED_FORWARD_L2}
BLOCK_L3: Table = {**NORMS, **QKV_ATTENTION, **DEFORMABLE_CONV, **IDLE_EXPERTS, **FEED_FORWARD_L2}
BLOCK_L4: Table = {**NORMS, **GROUPED_ATTENTION, **DEFORMABLE_CONV, **IDLE_EXPERTS, **FEED_FORWARD_L4}
BLOCK_L5: Table = {**NORMS, **ROTARY_ATTENTION, **DEFORMABLE_CONV, **IDLE_EXPERTS, **FEED_FORWARD_L4}
BLOCK_L6: Table = {**NORMS, **DIFFERENTIAL_ATTENTION, **DEFORMABLE_CONV, **IDLE_EXPERTS, **FEED_FORWARD_L4}

L0: Table = decoder(EMBEDDING, BLOCK_L0, "embedding.", "layers")
L1: Table = {**encoder(EMBEDDING, ENCODER_BLOCK_L1), **decoder(EMBEDDING, BLOCK_L0)}
L2: Table = {**encoder(EMBEDDING, BLOCK_L2), **decoder(EMBEDDING, BLOCK_L2)}
L3: Table = {**encoder(EMBEDDING, BLOCK_L3), **decoder(EMBEDDING, BLOCK_L3), **MEMORY}
L4: Table = {**encoder(NORMED_EMBEDDING, BLOCK_L4), **decoder(NORMED_EMBEDDING, BLOCK_L4), **MEMORY}
L5: Table = {**encoder(NORMED_EMBEDDING, BLOCK_L5), **decoder(NORMED_EMBEDDING, BLOCK_L5), **MEMORY}
L6: Table = {**encoder(NORMED_EMBEDDING, BLOCK_L6), **decoder(NORMED_EMBEDDING, BLOCK_L6), **MEMORY}
