"""The chunk memory against a loop over segments, chunks and entities."""

import math

import pytest
import torch

from dfn_hf.modeling.modules.cache import FlowCacheLayer
from dfn_hf.modeling.modules.chunk_memory import ChunkMemory, ema_scan, mix_slots
from dfn_hf.modeling.modules.row_layout import make_row_layout

CPU = torch.device("cpu")
FEATURES, SLOTS = 5, 3
STRICT = {"atol": 1e-11, "rtol": 0}


def make_memory(chunk_length):
    torch.manual_seed(chunk_length)
    memory = ChunkMemory(FEATURES, SLOTS, chunk_length, initial_decay=0.8)
    memory.reset_parameters(std=1.0)
    with torch.no_grad():
        memory.decay_logit.add_(torch.randn(SLOTS))
    return memory.double()


def draw(batch, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, length, FEATURES, generator=generator, dtype=torch.float64)


def read_alone(memory, x):
    """Return the slots that each entity of one segment `[length, D]` reads, `[length, S, D]`, from the equations."""
    decay = memory.decay_logit.sigmoid()
    slots, read = memory.initial_slots, []
    for start in range(0, len(x), memory.chunk_length):
        chunk = x[start : start + memory.chunk_length]
        read += [slots] * len(chunk)
        pooled = []
        for slot in range(SLOTS):
            scores = torch.stack([memory.pooling_query[slot] @ entity for entity in chunk]) / math.sqrt(FEATURES)
            pooled.append(sum(share * entity for share, entity in zip(scores.softmax(dim=0), chunk, strict=True)))
        slots = decay[:, None] * slots + (1 - decay[:, None]) * torch.stack(pooled)
    return torch.stack(read)


def read(memory, x, rows, state=None):
    """Return the slots that each entity reads, `[B, M, S, D]`."""
    slots, layout = memory(x, rows, state)
    per_place = slots.flatten(2)[:, :, None].expand(-1, -1, memory.chunk_length, -1)
    return layout.from_chunks(per_place).unflatten(-1, slots.shape[2:])


def gradients(memory, x, outputs):
    parameters = [x, memory.pooling_query, memory.initial_slots, memory.decay_logit]
    scale = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((outputs * scale).sum(), parameters)


@pytest.mark.parametrize("chunk_length", [2, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 29])
def test_equals_the_loop(chunk_length, length):
    memory, x = make_memory(chunk_length), draw(2, length).requires_grad_()
    found = read(memory, x, make_row_layout(2, length, CPU))
    expected = torch.stack([read_alone(memory, row) for row in x])
    assert torch.allclose(found, expected, **STRICT)
    if length > 2 * chunk_length:
        for one, other in zip(gradients(memory, x, found), gradients(memory, x, expected), strict=True):
            assert one.any() and torch.allclose(one, other, **STRICT)


def test_segments_are_independent():
    memory, x = make_memory(4), draw(2, 30).requires_grad_()
    lengths = [[1, 4, 9, 5, 11], [12, 18]]
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    found = read(memory, x, make_row_layout(2, 30, CPU, segment_ids=segments))
    pieces = [read_alone(memory, piece) for row in range(2) for piece in x[row].split(lengths[row])]
    expected = torch.cat(pieces).view(2, 30, SLOTS, FEATURES)
    assert torch.allclose(found, expected, **STRICT)
    for one, other in zip(gradients(memory, x, found), gradients(memory, x, expected), strict=True):
        assert torch.allclose(one, other, **STRICT)


def test_padding_writes_nothing():
    memory, x = make_memory(4), draw(2, 30)
    mask = torch.arange(30) < torch.tensor([[30], [13]])
    rows = make_row_layout(2, 30, CPU, mask=mask)
    found = read(memory, rows.unpad(x), rows)
    for row, count in enumerate((30, 13)):
        assert torch.allclose(found[row, :count], read_alone(memory, x[row, :count]), **STRICT)


SPLITS = {
    "steps": [[1, 1]] * 29,
    "chunks": [[3, 3], [1, 1], [9, 9], [4, 4], [12, 12]],
    "ragged": [[3, 0], [0, 11], [13, 1], [1, 8], [12, 9]],
}


class Feed:
    """Feeds rows to a memory call by call."""

    def __init__(self, memory, x):
        self.memory, self.x, self.state = memory, x, FlowCacheLayer()
        self.done = [0] * len(x)

    def __call__(self, counts, x=None):
        x = self.x if x is None else x
        width, state = max(counts), self.state
        state.start_forward(len(counts), width, CPU)
        mask = torch.arange(width) < torch.tensor(counts)[:, None]
        rows = make_row_layout(len(counts), width, CPU, mask=mask, past=state.lengths, aligned_past=state.aligned)
        state.set_layout(rows)
        new = x.new_zeros(len(counts), width, x.shape[-1])
        for row, count in enumerate(counts):
            new[row, :count] = x[row, self.done[row] : self.done[row] + count]
        with torch.no_grad():
            found = read(self.memory, new, rows, state)
        state.finish_forward()
        pieces = [found[row, :count] for row, count in enumerate(counts)]
        self.done = [done + count for done, count in zip(self.done, counts, strict=True)]
        return pieces


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("chunk_length", [2, 4, 7])
def test_any_split_reads_the_same(split, chunk_length):
    memory, x = make_memory(chunk_length), draw(2, 29)
    feed = Feed(memory, x)
    pieces = [feed(counts) for counts in SPLITS[split]]
    assert feed.done == [29, 29]
    for row in range(2):
        found = torch.cat([piece[row] for piece in pieces])
        assert torch.allclose(found, read_alone(memory, x[row]), **STRICT)


@pytest.mark.parametrize("removed", [1, 3, 4, 9, 20])
def test_crop_reopens_a_chunk(removed):
    memory, x = make_memory(4), draw(2, 40)
    feed = Feed(memory, x)
    feed.state.activate_past_recording()
    feed([7, 7])
    feed([13, 13], x=draw(2, 60)[:, 20:])  # other entities, which the crop removes in part
    taken = torch.cat([x[:, :7], draw(2, 60)[:, 27:40]], dim=1)[:, : 20 - removed]
    feed.state.crop(-removed)
    feed.done = [20 - removed] * 2
    joined = torch.cat([taken, x[:, 20 - removed :]], dim=1)
    found = feed([9, 9]), feed([1, 1]), feed([10, 10])
    for row in range(2):
        expected = read_alone(memory, joined[row])[20 - removed : 40 - removed]
        assert torch.allclose(torch.cat([piece[row] for piece in found]), expected, **STRICT)


def test_half_precision_is_pooled_in_float32():
    memory = make_memory(4).float()
    slots, _ = memory(draw(1, 12).bfloat16(), make_row_layout(1, 12, CPU))
    assert slots.dtype == torch.float32


def test_reset_parameters():
    memory = ChunkMemory(FEATURES, SLOTS, 4, initial_decay=0.9)
    torch.manual_seed(0)
    memory.reset_parameters(std=0.02)
    assert torch.allclose(memory.decay_logit.sigmoid(), torch.full((SLOTS,), 0.9))
    assert len(memory.pooling_query.unique(dim=0)) == len(memory.initial_slots.unique(dim=0)) == SLOTS


@pytest.mark.parametrize("chunks", [1, 2, 3, 8, 13])
def test_scan_equals_the_recurrence(chunks):
    generator = torch.Generator().manual_seed(chunks)
    decays = torch.rand(2, chunks, SLOTS, 1, generator=generator, dtype=torch.float64)
    decays[:, chunks // 2] = 0
    inputs = torch.randn(2, chunks, SLOTS, FEATURES, generator=generator, dtype=torch.float64)
    state, expected = torch.zeros(2, SLOTS, FEATURES, dtype=torch.float64), []
    for chunk in range(chunks):
        state = decays[:, chunk] * state + inputs[:, chunk]
        expected.append(state)
    assert torch.allclose(ema_scan(decays, inputs), torch.stack(expected, dim=1), **STRICT)


def test_mix_slots_equals_a_sum_per_entity():
    memory, heads = make_memory(4), 2
    segments = torch.tensor([[0] * 9 + [1] * 6, [0] * 15])
    rows = make_row_layout(2, 15, CPU, segment_ids=segments)
    slots, layout = memory(draw(2, 15), rows)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, heads, 15, SLOTS, generator=generator, dtype=torch.float64)
    values = torch.randn(2, heads, slots.shape[1], SLOTS, 6, generator=generator, dtype=torch.float64)
    found = mix_slots(weights, values, layout)
    chunk = layout.slot // memory.chunk_length
    for row in range(2):
        for i in range(15):
            expected = (weights[row, :, i, :, None] * values[row, :, chunk[row, i]]).sum(dim=1)
            assert torch.allclose(found[row, :, i], expected, **STRICT)
