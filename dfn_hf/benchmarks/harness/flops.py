"""Floating-point operations of a forward pass: two for each product with a weight, a query or a probability."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from dfn_hf.modeling.dfn.attention import DynamicFlowAttention
from dfn_hf.modeling.ops.box_tree import BLOCK, LEAF_SIZE, RECENT


@torch.no_grad()
def operations_per_token(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """Return the floating-point operations of a forward pass per input token.

    Counts linear maps, convolutions, attention (a Llama's over all preceding tokens, a DFN's over the entities it
    attends to) and the distances from queries to candidates in DFN's neighbour search. A layer that runs on entities
    counts entities, not bytes. Norms, activations, sorting, the choice of leaves in the search tree and memory
    movement are not counted for any model.

    Args:
        model: a Llama or a DFN.
        input_ids: int64 `[batch, length]`.
    """
    was_training = model.training
    with counting(model.eval()) as counted:
        model(input_ids=input_ids, use_cache=False)
    model.train(was_training)
    return sum(counted) / input_ids.numel()


@contextmanager
def counting(model: nn.Module) -> Iterator[list[int]]:
    """Yield a list; each module of a type in `COUNTS` appends its operations to it when it runs."""
    counted: list[int] = []

    def record(module, args, kwargs, output):
        for kind, count in COUNTS.items():
            if isinstance(module, kind):
                counted.append(count(module, args, kwargs, output))

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in model.modules()]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def linear_operations(module, args, kwargs, output) -> int:
    return 2 * module.weight.numel() * (output.numel() // output.shape[-1])


def convolution_operations(module, args, kwargs, output) -> int:
    return 2 * module.weight[0].numel() * output.numel()


def attention_operations(module, args, kwargs, output) -> int:
    states = args[0] if args else kwargs["hidden_states"]
    batch, length, _ = states.shape
    pairs = batch * module.config.num_attention_heads * length * (length + 1) // 2
    return 2 * pairs * 2 * module.head_dim


def flow_attention_operations(module, args, kwargs, output) -> int:
    config, states = module.config, args[0]
    sides = 1 if config.is_causal else 2
    batch, length, width = states.shape
    read = config.local_window + config.num_neighbors
    operations = length * read * 2 * (config.position_dim + 1 + width // config.num_attention_heads)
    if config.num_neighbors:
        operations += 3 * config.position_dim * num_candidates(config, length)
    return batch * config.num_attention_heads * sides * operations


def num_candidates(config: PreTrainedConfig, length: int) -> int:
    """Return the number of candidates that the neighbour search of one head compares with its queries in a row."""
    seen = (torch.arange(length) - config.local_window + 1).clamp(min=0)
    if config.search_implementation == "exact":
        return int(seen.sum())
    in_tree = (seen - RECENT).clamp(min=0) // BLOCK * BLOCK
    return int((seen - in_tree + in_tree.clamp(max=LEAF_SIZE * config.num_leaves)).sum())


COUNTS = {
    nn.Linear: linear_operations,
    nn.Conv1d: convolution_operations,
    LlamaAttention: attention_operations,
    DynamicFlowAttention: flow_attention_operations,
}
