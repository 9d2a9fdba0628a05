"""Models that lie on disk, in part or whole, compute what they compute in memory."""

import pytest
import torch
from transformers import PreTrainedModel

from dfn_hf import (
    DFNConfig,
    DFNForCausalLM,
    FlowNetworkConfig,
    FlowNetworkForCausalLM,
    LiquidConfig,
    LiquidForSeq2SeqLM,
)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
MODELS = {
    "dfn": lambda: DFNForCausalLM(DFNConfig(**SIZES, memory_slots=2, memory_chunk=4, readout_window=2)),
    "flownetwork": lambda: FlowNetworkForCausalLM(FlowNetworkConfig(**SIZES, memory_size=2, memory_chunk=4)),
    "liquid": lambda: LiquidForSeq2SeqLM(LiquidConfig(**SIZES, frame_length=8, decoder_frame_length=4)),
}


def ids() -> torch.Tensor:
    return torch.randint(1, 50, (2, 21), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=ids(), labels=ids()).logits


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("share", [None, 0.7, 0.2], ids=["all in memory", "most in memory", "most on disk"])
def test_device_map_auto(family, share, tmp_path):
    torch.manual_seed(0)
    model = MODELS[family]()
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    options = {}
    if share is not None:
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        options["max_memory"] = {"cpu": int(share * size)}
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map="auto", offload_folder=tmp_path / "offload", **options
    )
    assert ("disk" in getattr(loaded, "hf_device_map", {}).values()) == (share is not None)
    assert torch.equal(logits_of(loaded), expected)
    written = model.generate(ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(ids(), max_new_tokens=4, do_sample=False), written)
