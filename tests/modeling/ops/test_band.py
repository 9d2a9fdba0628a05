"""Blocks of queries and keys, and the conversion between the two layouts of scores, against loops."""

import pytest
import torch

from dfn_hf.modeling.ops.band import block_length, by_key, by_offset, join_blocks, key_blocks, query_blocks, to_dense

BEFORE = [0, 1, 2, 5, 40]
LENGTHS = [1, 2, 7, 13]
windows = pytest.mark.parametrize(("before", "length"), [(before, length) for before in BEFORE for length in LENGTHS])


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def assert_same(found, expected):
    assert torch.equal(found, expected) and found.shape == expected.shape


def assert_same_gradients(transform, loop, x):
    """Compare the gradients of a random function of both results with respect to x."""
    x = x.requires_grad_()
    scale = draw(*loop(x).shape)
    found, expected = (torch.autograd.grad((one(x) * scale).sum(), x)[0] for one in (transform, loop))
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)  # summed in another order


@windows
def test_block_length_is_bounded_by_window_and_call(before, length):
    assert block_length(length, before) == max(1, min(length, before))


@windows
def test_join_blocks_undoes_query_blocks(before, length):
    x = draw(3, length, 2)
    block = block_length(length, before)
    blocks = query_blocks(x, block)
    assert blocks.shape == (3, -(-length // block), block, 2)
    for number in range(blocks.shape[1]):
        for t in range(block):
            i = number * block + t
            assert_same(blocks[:, number, t], x[:, i] if i < length else torch.zeros(3, 2).double())
    assert_same(join_blocks(blocks, length), x)


def key_blocks_by_loop(history, before, block):
    """Block n holds the entities n · T − before … (n + 1) · T − 1 of the call."""
    blocks = []
    for start in range(0, history.shape[1] - before, block):
        seen = history[:, start : start + before + block]
        missing = history.new_zeros(history.shape[0], before + block - seen.shape[1], history.shape[2])
        blocks.append(torch.cat([seen, missing], dim=1))
    return torch.stack(blocks, dim=1)


@windows
@pytest.mark.parametrize("block", [None, 1, 3])
def test_key_blocks_equal_the_loop(before, length, block):
    block = block_length(length, before) if block is None else block
    history = draw(3, before + length, 2)
    assert_same(key_blocks(history, before, block), key_blocks_by_loop(history, before, block))
    assert_same_gradients(
        lambda x: key_blocks(x, before, block), lambda x: key_blocks_by_loop(x, before, block), history
    )


def by_offset_by_loop(scores):
    block, keys = scores.shape[-2:]
    return torch.stack([scores[..., t, t : t + keys - block + 1] for t in range(block)], dim=-2)


def by_key_by_loop(weights):
    block, width = weights.shape[-2:]
    rows = []
    for t in range(block):
        left, right = (weights.new_zeros(*weights.shape[:-2], zeros) for zeros in (t, block - 1 - t))
        rows.append(torch.cat([left, weights[..., t, :], right], dim=-1))
    return torch.stack(rows, dim=-2)


layouts = pytest.mark.parametrize(
    ("leading", "block", "before"),
    [((), 1, 0), ((2,), 1, 4), ((2, 3), 4, 0), ((2, 3), 5, 5), ((1,), 3, 7), ((2,), 7, 3)],
)


@layouts
def test_by_offset_equals_the_loop(leading, block, before):
    scores = draw(*leading, block, before + block)
    assert_same(by_offset(scores), by_offset_by_loop(scores))
    assert_same_gradients(by_offset, by_offset_by_loop, scores)


@layouts
def test_by_key_equals_the_loop(leading, block, before):
    weights = draw(*leading, block, before + 1)
    assert_same(by_key(weights), by_key_by_loop(weights))
    assert_same_gradients(by_key, by_key_by_loop, weights)
    assert_same(by_offset(by_key(weights)), weights.detach())


@pytest.mark.parametrize("change", [lambda x: x.transpose(0, 1), lambda x: x[1:, ::2], lambda x: x.mT.contiguous().mT])
def test_layouts_accept_views(change):
    scores, weights = change(draw(4, 6, 3, 5)), change(draw(4, 6, 3, 3))
    assert_same(by_offset(scores), by_offset_by_loop(scores))
    assert_same(by_key(weights), by_key_by_loop(weights))


def test_layouts_are_twice_differentiable():
    assert torch.autograd.gradgradcheck(lambda x: by_offset(x).square(), draw(2, 3, 5).requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: by_key(x).square(), draw(2, 3, 3).requires_grad_())


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("past", [0, 3, 50])
def test_dense_weights_equal_the_loop(before, past):
    index = past + torch.arange(7).expand(2, -1) + torch.tensor([[0], [2]])
    num_entities = int(index.max()) + 1
    weights = draw(2, 3, 7, before + 1)
    expected = torch.zeros(2, 3, 7, num_entities).double()
    for row in range(2):
        for a in range(7):
            for entry in range(before + 1):
                j = int(index[row, a]) - (before - entry)
                if j < 0:
                    weights[row, :, a, entry] = 0
                else:
                    expected[row, :, a, j] = weights[row, :, a, entry]
    assert_same(to_dense(weights, index, num_entities), expected)
