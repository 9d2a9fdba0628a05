"""The way back from a converted folder to the original's keys, bit for bit."""

import pytest
import torch

from dfn_hf.hub.convert import convert
from dfn_hf.conversion.detect import LAYOUTS
from dfn_hf.conversion.key_table import Dropped, RowLayout, expand
from dfn_hf.conversion.report import ConversionReport
from dfn_hf.conversion.restore import restore_weights
from tests.support.native_checkpoints import COUNTS, SIZES, random_weights, save_checkpoint

WAYS = [
    pytest.param(layout, native, id=f"{layout.name}-{len(layout.table)}-{'native' if native else 'causal'}")
    for layout in LAYOUTS
    for native in ([False, True] if layout.native else [False])
]


@pytest.mark.parametrize("layout, native", WAYS)
def test_restored_weights_are_the_originals(layout, native, tmp_path):
    weights = random_weights(layout.table, SIZES[layout.name.partition("-")[0]], COUNTS)
    source = save_checkpoint(tmp_path / "source.pt", {f"module.{key}": tensor for key, tensor in weights.items()})
    convert(source, tmp_path / "out", native=native)
    restored = restore_weights(tmp_path / "out")
    lines = expand(layout.table, COUNTS)
    kept = {key for key, (_, target) in lines.items() if native or not isinstance(target, Dropped | Rows)}
    assert set(restored) == kept & set(weights)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in restored.items())


def test_only_native_layouts_have_a_way_back(tmp_path):
    ConversionReport("llama", "DFNForCausalLM").save(tmp_path)
    with pytest.raises(ValueError, match="only native layouts"):
        restore_weights(tmp_path)
