"""Tests `torch.export` of a forward pass at a fixed shape, and ONNX export of FlowNetwork and Liquid."""

import onnxruntime
import pytest
import torch

from tests.support.marks import first_quickly
from tests.support.small_models import make_small_model

LENGTH = 70  # more than DFN's window


def make_model(family, **sizes):
    model = make_small_model(family, **sizes)
    if family == "dfn":
        model.config.search_implementation = "exact"
    return model


def draw_inputs(family, seed):
    ids = torch.randint(1, 50, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    target = {"decoder_input_ids": ids.flip(1)} if family == "liquid" else {}
    return {"input_ids": ids, "use_cache": False} | target


@pytest.mark.parametrize("family", ["dfn", "flownetwork", "liquid"])
def test_exported_program_has_the_same_logits(family):
    model, other = make_model(family), draw_inputs(family, 1)
    program = torch.export.export(model, (), draw_inputs(family, 0), strict=False).module()
    with torch.no_grad():
        assert torch.allclose(program(**other).logits, model(**other).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", first_quickly(["flownetwork", "liquid"]))
def test_onnx_has_the_same_logits(family, tmp_path):
    model, other = make_model(family, num_hidden_layers=1), draw_inputs(family, 1)
    program = torch.onnx.export(model, (), kwargs=draw_inputs(family, 0), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    logits = session.run(None, {given.name: other[given.name].numpy() for given in session.get_inputs()})[0]
    with torch.no_grad():
        expected = model(**other).logits
    assert torch.allclose(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


def test_error_for_the_tree_search_names_the_remedy():
    with pytest.raises(ValueError, match="model.config.search_implementation = 'exact'"):
        torch.export.export(make_small_model("dfn"), (), draw_inputs("dfn", 0), strict=False)


def test_sampled_entities_are_rejected():
    with pytest.raises(ValueError, match="number of entities depends on the input"):
        torch.export.export(make_small_model("dfn-adaptive"), (), draw_inputs("dfn", 0), strict=False)


@pytest.mark.parametrize("make", [make_model, make_small_model])
def test_onnx_export_of_dfn_is_rejected(make):
    with pytest.raises(torch.onnx.OnnxExporterError, match="cannot be exported to ONNX"):
        torch.onnx.export(make("dfn"), (), kwargs=draw_inputs("dfn", 0), dynamo=True, verbose=False)
