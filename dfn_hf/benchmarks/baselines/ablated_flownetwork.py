"""FlowNetwork without its flow, the ablation of the flow branch."""

import torch
from torch import nn

from dfn_hf import FlowNetworkConfig, FlowNetworkForCausalLM


class NoRouter(nn.Module):
    """Replaces the router; returns constant windows and sparsities, which `NoFlow` ignores."""

    def forward(self, x: torch.Tensor, rows, state=None) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_ones(x.shape[:2]), x.new_ones(x.shape[:2])


class NoFlow(nn.Module):
    """Replaces `FlowMixer`; returns zeros."""

    def forward(self, x: torch.Tensor, routing, rows, state, output_flow) -> tuple[torch.Tensor, None, dict]:
        return torch.zeros_like(x), None, {}


class FlowNetworkWithoutFlow(FlowNetworkForCausalLM):
    """FlowNetwork with attention, memory and feed-forward networks, and without flow."""

    def __init__(self, config: FlowNetworkConfig):
        super().__init__(config)
        for layer in self.model.layers:
            layer.router, layer.flow = NoRouter(), NoFlow()
