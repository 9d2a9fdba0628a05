"""The number of parameters comes from the headers of the weights files."""

from pathlib import Path

import pytest
from transformers import AutoModel

from dfn_hf import (
    DFNConfig,
    DFNForCausalLM,
    DFNForContrastive,
    DFNForFieldReconstruction,
    DFNNativeConfig,
    FlowNetworkConfig,
    FlowNetworkForCausalLM,
    FlowNetworkNativeConfig,
    LiquidConfig,
    LiquidForSeq2SeqLM,
)
from dfn_hf.hub.model_info import describe_model, num_parameters

MODELS = {
    "dfn": lambda: DFNForCausalLM(DFNConfig()),
    "dfn, untied": lambda: DFNForCausalLM(DFNConfig(tie_word_embeddings=False)),
    "dfn of bytes": lambda: DFNForCausalLM(DFNConfig(entity_sampling="adaptive")),
    "field": lambda: DFNForFieldReconstruction(DFNConfig()),
    "contrastive": lambda: DFNForContrastive(DFNConfig(contrastive_fields=True)),
    "flownetwork": lambda: FlowNetworkForCausalLM(FlowNetworkConfig()),
    "liquid": lambda: LiquidForSeq2SeqLM(LiquidConfig()),
    "native dfn": lambda: AutoModel.from_config(DFNNativeConfig()),
    "native flownetwork": lambda: AutoModel.from_config(FlowNetworkNativeConfig()),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert num_parameters(tmp_path) == model.num_parameters()


def test_a_folder_is_described_without_building_its_model(tmp_path, monkeypatch):
    FlowNetworkForCausalLM(FlowNetworkConfig()).save_pretrained(tmp_path)
    monkeypatch.setattr(FlowNetworkForCausalLM, "__init__", None)
    found = describe_model(str(tmp_path))
    assert found.model_type == "flownetwork" and found.parameters == num_parameters(tmp_path)
    assert found.state_bytes_per_token > 0


def test_a_folder_without_weights_has_no_number(tmp_path):
    assert num_parameters(Path(tmp_path)) is None
