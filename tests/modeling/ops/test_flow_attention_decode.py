"""A decode step equals the attention of one query."""

import pytest
import torch

from dfn_hf.modeling.ops.flow_attention import flow_attention_reference
from dfn_hf.modeling.ops.flow_attention_decode import attention_step

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
BATCH, HEADS, STORED, FEATURES, VALUES = 3, 2, 40, 5, 7


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("window", "num_neighbors"), [(1, 1), (4, 0), (6, 5)])
def test_step_equals_the_reference(window, num_neighbors, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, HEADS, 1, FEATURES), (BATCH, HEADS, STORED, FEATURES), (BATCH, HEADS, STORED, VALUES), (HEADS,))
    inputs = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    index, reach = torch.tensor([[0], [20], [39]]), torch.tensor([[0], [2], [39]])
    neighbors = torch.randint(-1, 14, (BATCH, HEADS, 1, num_neighbors), generator=generator)
    neighbors = neighbors.masked_fill(index[:, None, None] < STORED - 1, -1)
    results = []
    for read in (flow_attention_reference, attention_step):
        y, lse = read(*inputs, index, reach, neighbors, window)
        (y.square().sum() + lse.sum()).backward()
        results.append([y.detach(), lse.detach(), *(x.grad.clone() for x in inputs)])
        for x in inputs:
            x.grad = None
    for expected, result in zip(*results, strict=True):
        assert result.shape == expected.shape
        assert torch.allclose(result, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_values_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, 1, FEATURES, generator=generator)
    key, value = (torch.randn(1, HEADS, STORED, n, generator=generator) for n in (FEATURES, VALUES))
    index, neighbors = torch.tensor([[39]]), torch.tensor([[[[3, -1]], [[0, 7]]]])
    arguments = (torch.ones(HEADS), index, index, neighbors, 4)
    y, lse = attention_step(query, key, value.bfloat16(), *arguments)
    expected, expected_total = flow_attention_reference(query, key, value.bfloat16().float(), *arguments)
    assert y.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.allclose(y, expected.bfloat16(), atol=1e-2, rtol=1e-2)
    assert torch.allclose(lse, expected_total, atol=1e-5, rtol=1e-5)
