"""`torch.export` of a forward pass at a fixed shape, for the families whose every step torch can trace."""

import pytest
import torch

from tests.small_models import make_small_model


@pytest.mark.parametrize("family", ["flownetwork", "liquid"])
def test_an_exported_program_gives_the_same_logits(family):
    model = make_small_model(family)
    example, other = (torch.randint(1, 50, (2, 21)) for _ in range(2))

    def inputs(ids: torch.Tensor) -> dict:
        target = {"decoder_input_ids": ids.flip(1)} if family == "liquid" else {}
        return {"input_ids": ids, "use_cache": False} | target

    program = torch.export.export(model, (), inputs(example), strict=False).module()
    with torch.no_grad():
        assert torch.allclose(program(**inputs(other)).logits, model(**inputs(other)).logits, rtol=0, atol=1e-5)
