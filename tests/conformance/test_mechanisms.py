"""Checks that the models of the conformance tests use every mechanism of their family."""

from functools import partial

import pytest
import torch
from torch import nn

from dfn_hf import DFNModel, FlowNetworkModel, LiquidModel
from tests.conformance.configs import adaptive_dfn_config, dfn_config, flownetwork_config, liquid_config
from tests.conformance.testers import BATCH, LENGTH, draw_ids

scales = pytest.mark.parametrize("scale", [None, 0.2, 0.5])


def make(model_class, config, scale):
    torch.manual_seed(0)
    return model_class(config() if scale is None else config(initializer_range=scale)).eval()


def outputs_of(model: nn.Module, run, ending: str) -> list[torch.Tensor]:
    """Return the first output of every module whose name ends with `ending`, while `run` runs the model."""
    outputs: list[torch.Tensor] = []

    def record(module, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(record) for name, module in model.named_modules() if name.endswith(ending)]
    assert hooks, ending
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return outputs


def differs_by_token(x: torch.Tensor) -> bool:
    return bool(((x - x[:, :1]).abs().amax() > 1e-4 * x.abs().amax()).all())


@scales
def test_dfn_uses_neighbors_flow_and_memory(scale):
    model = make(DFNModel, dfn_config, scale)
    ids = draw_ids()
    with torch.no_grad():
        outputs = model(ids, output_entities=True, output_attentions=True)
    for entities, weights in zip(outputs.entities, outputs.attentions, strict=True):
        assert (entities.neighbors >= 0).any()
        assert (entities.moved_positions - entities.rest_positions).abs().max() > 0
        assert (weights.sum(dim=-1) < 1 - 1e-4).any(), "the memory has no softmax weight"


@scales
def test_adaptive_dfn_uses_entities_and_neighbors(scale):
    model = make(DFNModel, adaptive_dfn_config, scale)
    with torch.no_grad():
        outputs = model(draw_ids(), output_entities=True)
    assert 0.2 < outputs.boundary_mask.float().mean() < 0.9
    lengths = [row.nonzero()[:, 0].diff() for row in outputs.boundary_mask]
    assert len(torch.cat(lengths).unique()) > 1
    assert all((entities.neighbors >= 0).any() for entities in outputs.entities)


@scales
def test_flownetwork_uses_sparsity_windows_and_memory(scale):
    model = make(FlowNetworkModel, flownetwork_config, scale)
    run = partial(model, draw_ids(), output_flows=True)
    with torch.no_grad():
        outputs = run()
    reachable = torch.arange(1, LENGTH + 1).clamp(max=model.config.flow_window)
    for flows in outputs.flows:
        kept = (flows.matrix > 0).sum(dim=-1)
        assert (kept < reachable).any() and (kept > 0).all()
        assert flows.window.std() > 0
    for slots in outputs_of(model, run, "sequence_memory"):
        assert differs_by_token(slots)
    assert all(read.abs().max() > 0 for read in outputs_of(model, run, "memory_attention"))


@scales
def test_liquid_uses_compression_experts_offsets_and_lstm(scale):
    model = make(LiquidModel, liquid_config, scale)
    run = partial(model, draw_ids(), decoder_input_ids=draw_ids(), output_router_logits=True)
    with torch.no_grad():
        outputs = run()
    for side in ("", "decoder_"):
        assert outputs.metrics[f"{side}compression_ratio"] < 0.99
        assert outputs.metrics[f"{side}experts_per_token"] > 1
    for logits in (*outputs.encoder_router_logits, *outputs.decoder_router_logits):
        assert logits.topk(2).indices.unique().numel() == model.config.num_experts, "an expert is never used"
    assert all(offsets.abs().max() > 0 for offsets in outputs_of(model, run, "offset_conv"))
    assert all(differs_by_token(heard) for heard in outputs_of(model, run, "frequency_attention.norm"))
    (remembered,) = outputs_of(model, run, "external_memory.lstm")
    assert remembered.shape[0] == BATCH and differs_by_token(remembered)
    assert LENGTH > model.config.frame_length and LENGTH > model.config.attention_window
