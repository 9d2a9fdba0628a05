"""FlowNetwork with its flow taken out: what the branch is worth at an equal number of parameters."""

import torch
from torch import nn

from dfn_hf import FlowNetworkConfig, FlowNetworkForCausalLM


class NoRouter(nn.Module):
    """Windows and shares that nothing uses."""

    def forward(self, x: torch.Tensor, rows, state=None) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_ones(x.shape[:2]), x.new_ones(x.shape[:2])


class NoFlow(nn.Module):
    """In the place of `FlowMixer`: nothing flows."""

    def forward(self, x: torch.Tensor, routing, rows, state, output_flow) -> tuple[torch.Tensor, None, dict]:
        return torch.zeros_like(x), None, {}


class FlowNetworkWithoutFlow(FlowNetworkForCausalLM):
    """Attention, memory and feed-forward network alone."""

    def __init__(self, config: FlowNetworkConfig):
        super().__init__(config)
        for layer in self.model.layers:
            layer.router, layer.flow = NoRouter(), NoFlow()
