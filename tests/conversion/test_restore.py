"""`restore_weights`: a converted folder gives back the weights of the original bit for bit."""

import pytest
import torch

from dfn_hf.conversion.detect import FORMATS
from dfn_hf.conversion.key_table import Dropped, EveryNth, expand
from dfn_hf.conversion.report import ConversionReport
from dfn_hf.conversion.restore import restore_weights
from dfn_hf.hub.convert import convert
from tests.support.native_checkpoints import COUNTS, SIZES, random_weights, save_checkpoint

CASES = [
    pytest.param(
        source_format, native, id=f"{source_format.name}-{len(source_format.table)}-{'native' if native else 'causal'}"
    )
    for source_format in FORMATS
    for native in ([False, True] if source_format.native else [False])
]


@pytest.mark.parametrize("source_format, native", CASES)
def test_restored_weights_are_the_originals(source_format, native, tmp_path):
    weights = random_weights(source_format.table, SIZES[source_format.name.partition("-")[0]], COUNTS)
    source = save_checkpoint(tmp_path / "source.pt", {f"module.{key}": tensor for key, tensor in weights.items()})
    convert(source, tmp_path / "out", native=native)
    restored = restore_weights(tmp_path / "out")
    lines = expand(source_format.table, COUNTS)
    kept = {key for key, (_, target) in lines.items() if native or not isinstance(target, Dropped | EveryNth)}
    assert set(restored) == kept & set(weights)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in restored.items())


def test_only_conversions_of_originals_can_be_restored(tmp_path):
    ConversionReport("llama", "DFNForCausalLM").save(tmp_path)
    with pytest.raises(ValueError, match="cannot be restored"):
        restore_weights(tmp_path)
