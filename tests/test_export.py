"""`torch.export` of a forward pass at a fixed shape, for the families whose every step torch can trace."""

import pytest
import torch

from dfn_hf import FlowNetworkConfig, FlowNetworkForCausalLM, LiquidConfig, LiquidForSeq2SeqLM

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
MODELS = {
    "flownetwork": lambda: FlowNetworkForCausalLM(FlowNetworkConfig(**SIZES, memory_chunk=4)),
    "liquid": lambda: LiquidForSeq2SeqLM(LiquidConfig(**SIZES, frame_length=8, decoder_frame_length=4)),
}


@pytest.mark.parametrize("family", MODELS)
def test_an_exported_program_gives_the_same_logits(family):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    example, other = (torch.randint(1, 50, (2, 21)) for _ in range(2))

    def inputs(ids: torch.Tensor) -> dict:
        target = {"decoder_input_ids": ids.flip(1)} if family == "liquid" else {}
        return {"input_ids": ids, "use_cache": False} | target

    program = torch.export.export(model, (), inputs(example), strict=False).module()
    with torch.no_grad():
        assert torch.allclose(program(**inputs(other)).logits, model(**inputs(other)).logits, rtol=0, atol=1e-5)
