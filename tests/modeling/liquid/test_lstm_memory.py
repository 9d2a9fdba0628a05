"""EnhancedLSTM against a loop over entities with explicit gates, across calls and padding."""

import math

import pytest
import torch

from dfn_hf import EnhancedLSTM
from dfn_hf.modeling.modules.cache import FlowCacheLayer
from dfn_hf.modeling.modules.row_layout import make_row_layout

CPU = torch.device("cpu")
SIZE, HIDDEN = 3, 5
STRICT = {"atol": 1e-10, "rtol": 0}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_memory(num_layers, dropout=0.0):
    torch.manual_seed(0)
    memory = EnhancedLSTM(SIZE, HIDDEN, num_layers, dropout)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    return memory.double().eval()


def lstm_by_loop(memory, row):
    """Run the memory on one row `[length, D]`, from the equations."""
    lstm, inputs = memory.lstm, list(row)
    for layer in range(lstm.num_layers):
        weights = (getattr(lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        from_input, from_hidden, first_bias, second_bias = weights
        h, c = row.new_zeros(HIDDEN), row.new_zeros(HIDDEN)
        outputs = []
        for entity in inputs:
            gates = from_input @ entity + first_bias + from_hidden @ h + second_bias
            enter, forget, candidate, leave = gates.chunk(4)
            c = forget.sigmoid() * c + enter.sigmoid() * candidate.tanh()
            h = leave.sigmoid() * c.tanh()
            outputs.append(h)
        inputs = outputs
    first, _, second = memory.output_layer
    outputs = []
    for entity, h in zip(row, inputs, strict=True):
        inner = first.weight @ h + first.bias
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        outputs.append(entity + second.weight @ inner + second.bias)
    return torch.stack(outputs)


layers = pytest.mark.parametrize("num_layers", [1, 2])


@layers
@pytest.mark.parametrize("length", [1, 2, 13])
def test_equals_the_loop(num_layers, length):
    memory, x = make_memory(num_layers), draw(2, length, SIZE).requires_grad_()
    y = memory(x, make_row_layout(2, length, CPU))
    expected = torch.stack([lstm_by_loop(memory, row) for row in x])
    assert torch.allclose(y, expected, **STRICT)
    wanted, scale = [x, *memory.parameters()], draw(2, length, SIZE, seed=1)
    gradients = [torch.autograd.grad((one * scale).sum(), wanted) for one in (y, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, **STRICT)
        assert one.any() or length == 1  # the preceding state is zero in the first call


@layers
def test_padding_does_not_change_the_state(num_layers):
    memory, x = make_memory(num_layers), draw(4, 13, SIZE)
    lengths = [13, 1, 0, 6]
    rows = make_row_layout(4, 13, CPU, mask=torch.arange(13) < torch.tensor(lengths)[:, None])
    x.requires_grad_()
    y = memory(x, rows)
    for row, length in enumerate(lengths):
        if length:
            assert torch.allclose(y[row, :length], lstm_by_loop(memory, x[row, :length]), **STRICT)
    (gradient,) = torch.autograd.grad(y[rows.token_mask()].sum(), x)
    assert not gradient[~rows.token_mask()].any()


SPLITS = {
    "steps": [[1, 1]] * 29,
    "chunks": [[3, 3], [1, 1], [9, 9], [4, 4], [12, 12]],
    "ragged": [[3, 0], [0, 11], [13, 1], [1, 8], [12, 9]],
    "starting late": [[0, 5], [0, 24], [29, 0]],
}


@layers
@pytest.mark.parametrize("split", SPLITS)
def test_any_split_gives_equal_outputs(num_layers, split):
    memory, x = make_memory(num_layers), draw(2, 29, SIZE)
    state, done, pieces = FlowCacheLayer(), [0, 0], [[], []]
    for counts in SPLITS[split]:
        width = max(counts)
        state.start_forward(2, width, CPU)
        mask = torch.arange(width) < torch.tensor(counts)[:, None]
        rows = make_row_layout(2, width, CPU, mask=mask, past=state.lengths, aligned_past=state.aligned)
        state.set_layout(rows)
        new = torch.full((2, width, SIZE), 9.0, dtype=x.dtype)
        for row, count in enumerate(counts):
            new[row, :count] = x[row, done[row] : done[row] + count]
        with torch.no_grad():
            y = memory(new, rows, state)
        state.finish_forward()
        for row, count in enumerate(counts):
            pieces[row].append(y[row, :count])
            done[row] += count
    assert done == [29, 29]
    with torch.no_grad():
        for row in range(2):
            assert torch.allclose(torch.cat(pieces[row]), lstm_by_loop(memory, x[row]), **STRICT)


@layers
def test_state_follows_reordered_rows(num_layers):
    memory, x, order = make_memory(num_layers), draw(3, 13, SIZE), torch.tensor([2, 0, 0])
    state = FlowCacheLayer()
    for piece in (x[:, :7], x[order, 7:]):
        state.start_forward(3, piece.shape[1], CPU)
        rows = make_row_layout(3, piece.shape[1], CPU, past=state.lengths, aligned_past=state.aligned)
        state.set_layout(rows)
        with torch.no_grad():
            y = memory(piece, rows, state)
        state.finish_forward()
        state.reorder_cache(order)
    with torch.no_grad():
        for row, source in enumerate(order):
            assert torch.allclose(y[row], lstm_by_loop(memory, x[source])[7:], **STRICT)


def test_state_is_detached_and_cannot_be_cropped():
    memory, x, state = make_memory(2), draw(2, 7, SIZE), FlowCacheLayer()
    state.start_forward(2, 7, CPU)
    rows = make_row_layout(2, 7, CPU)
    state.set_layout(rows)
    memory(x, rows, state)
    state.finish_forward()
    assert state.data("lstm").shape == (2, 2, 2, HIDDEN) and not state.data("lstm").requires_grad
    with pytest.raises(ValueError, match="cannot be cropped"):
        state.crop(-1)


def test_dropout_is_active_in_training_only():
    memory, x, rows = make_memory(1, dropout=0.5), draw(2, 7, SIZE), make_row_layout(2, 7, CPU)
    assert not (memory(x, rows) == 0).any()
    assert (memory.train()(x, rows) == 0).any()
