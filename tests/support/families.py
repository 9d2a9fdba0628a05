"""Random small models of every causal family with all mechanisms active, for the tests of invariants."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from dfn_hf import DFNConfig, DFNForCausalLM, FlowNetworkConfig, FlowNetworkForCausalLM
from dfn_hf.modeling.dfn.dynamic_chunking import EntitySampling

VOCABULARY = 40


@dataclass(frozen=True)
class Family:
    """How to draw a random model.

    Attributes:
        model_class: the `ForCausalLM` class.
        draw_config: returns a random small configuration.
        assert_in_motion: asserts that every mechanism of a model is active on ids `[batch, length]`.
        longest_reach: number of entities after which every mechanism, memories included, was used at least twice.
        shapes_depend_on_content: whether later tokens change shapes, and so the rounding, of earlier results.
        has_attentions: whether the model returns flow weights between tokens.
    """

    model_class: type[PreTrainedModel]
    draw_config: Callable
    assert_in_motion: Callable
    longest_reach: int
    shapes_depend_on_content: bool = False
    has_attentions: bool = True


def draw_dfn_config(rng: random.Random, **overrides) -> DFNConfig:
    heads = rng.choice([1, 2, 3])
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * rng.choice([8, 12]),
        "num_hidden_layers": rng.choice([2, 3]),
        "num_attention_heads": heads,
        "intermediate_size": rng.choice([20, 33]),
        "position_dim": rng.choice([1, 2, 4, 5]),
        "num_neighbors": rng.choice([1, 3, 5]),
        "local_window": rng.choice([1, 2, 5]),
        "moved_query": rng.random() < 0.7,
        "num_leaves": rng.choice([1, 2, 4, 8]),
        "flow_norm": rng.choice(["entity", "running", "rms"]),
        "flow_step": rng.choice([0.3, 1.0]),
        "conv_kernel": rng.choice([1, 3, 4]),
        "search_implementation": rng.choice(["tree", "exact"]),
        "carry_positions": rng.random() < 0.3,
        "memory_slots": rng.choice([0, 2, 3]),
        "memory_chunk": rng.choice([2, 4, 7]),
        "readout_window": rng.choice([1, 3]),
        "tie_word_embeddings": rng.random() < 0.5,
        "pad_token_id": rng.choice([None, 0]),
        "initializer_range": 0.5,
        "gated_mlp": rng.random() < 0.5,
        "output_gate": rng.random() < 0.6,
    }
    return DFNConfig(**{**options, **overrides})


def draw_adaptive_config(rng: random.Random, **overrides) -> DFNConfig:
    options = {
        "entity_sampling": "adaptive",
        "entity_rate": rng.choice([0.25, 0.4]),
        "max_entity_length": rng.choice([4, 6, 9]),
        "num_sample_layers": rng.choice([1, 2]),
        "sample_intermediate_size": rng.choice([None, 17]),
        "ratio_loss_coef": 0.3,
        "local_window": rng.choice([2, 5]),
        "readout_window": 1,
    }
    return draw_dfn_config(rng, **{**options, **overrides})


def draw_flownetwork_config(rng: random.Random, **overrides) -> FlowNetworkConfig:
    heads = rng.choice([1, 2, 4])
    hidden_size = heads * rng.choice([8, 9, 12])
    min_flow_window = rng.choice([1, 2])
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "num_hidden_layers": rng.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, heads]),
        "intermediate_size": rng.choice([20, 33]),
        "block_type": rng.choice(["enhanced_flow", "flow_transformer"]),
        "num_patterns": rng.choice([2, 3, 6]),
        "base_sparsity": rng.choice([0.1, 0.3, 0.7, 1.0]),
        "flow_window": rng.choice([3, 5, 12, 64]),
        "min_flow_window": min_flow_window,
        "memory_size": rng.choice([0, 2, 3]),
        "num_memory_heads": heads,
        "memory_chunk": rng.choice([2, 4, 7]),
        "tie_word_embeddings": rng.random() < 0.5,
        "pad_token_id": rng.choice([None, 0]),
        "initializer_range": 0.5,
    }
    return FlowNetworkConfig(**{**options, **overrides})


def assert_dfn_in_motion(model: DFNForCausalLM, ids: torch.Tensor) -> None:
    """Assert that every layer finds neighbours beyond its local window."""
    assert all((layer.neighbors >= 0).any() for layer in model(ids, output_entities=True).entities)


def assert_adaptive_in_motion(model: DFNForCausalLM, ids: torch.Tensor) -> None:
    """Assert that entities have several lengths, that boundaries occur, and that every layer finds neighbours."""
    outputs = model(ids, output_entities=True)
    lengths = [place.diff() for place in (row.nonzero()[:, 0] for row in outputs.boundary_mask)]
    assert len(torch.cat(lengths).unique()) > 1
    assert (outputs.boundary_probs[outputs.boundary_mask.bool()] >= 0.5).any()
    assert all((layer.neighbors >= 0).any() for layer in outputs.entities)


def record_output(seen: dict, module, args, output) -> None:
    seen["output"] = output


def assert_flownetwork_in_motion(model: FlowNetworkForCausalLM, ids: torch.Tensor) -> None:
    """Assert that every layer omits reachable tokens, routes tokens differently and reads a changing memory."""
    config = model.config
    outputs = model(ids, output_flows=True)
    for flows in outputs.flows:
        assert flows.window.std() > 0.01
        assert config.base_sparsity == 1 or flows.fraction.std() > 0.001
        assert flows.matrix.triu(1).abs().max() == 0
        reachable = torch.arange(1, ids.shape[1] + 1).clamp(max=config.flow_window)
        kept = (flows.matrix > 0).sum(dim=-1)
        assert (kept < reachable).any() or config.base_sparsity == 1
        assert (kept > 0).all()
    for layer in model.model.layers if config.memory_size else ():
        seen = {}
        hook = layer.sequence_memory.register_forward_hook(partial(record_output, seen))
        model(ids)
        hook.remove()
        slots = seen["output"][0]
        assert (slots[:, 1:] - slots[:, :1]).abs().max() > 1e-3


FAMILIES = {
    "dfn": Family(DFNForCausalLM, draw_dfn_config, assert_dfn_in_motion, longest_reach=24),
    "dfn-adaptive": Family(
        DFNForCausalLM,
        draw_adaptive_config,
        assert_adaptive_in_motion,
        longest_reach=96,
        shapes_depend_on_content=True,
        has_attentions=False,
    ),
    "flownetwork": Family(
        FlowNetworkForCausalLM, draw_flownetwork_config, assert_flownetwork_in_motion, longest_reach=64
    ),
}


def draw_model(family: str, seed: int, dtype: torch.dtype = torch.float64, **overrides) -> PreTrainedModel:
    """Return a model in eval mode with random configuration and weights; the weights are large enough to matter."""
    config = FAMILIES[family].draw_config(random.Random(seed), **overrides)
    torch.manual_seed(seed)
    model = FAMILIES[family].model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.shape[1] == 1:  # initialised as constants
                parameter.add_(0.3 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, EntitySampling):  # at initialisation its flow has about the same length everywhere
                module.flow_map.weight.normal_(std=1 / module.flow_map.in_features)
                module.threshold.fill_(1.0)
                module.log_steepness.fill_(1.0)
    return model.to(dtype).eval()


def draw_ids(batch: int, length: int, seed: int) -> torch.Tensor:
    """Draw token ids `[batch, length]` with repeated spans, so that far neighbours and ties occur."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    half = length // 3
    ids[:, length - half :] = ids[:, :half]
    return ids
