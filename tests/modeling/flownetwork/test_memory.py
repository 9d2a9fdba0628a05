"""Memory bank, sequence memory and their attention against loops over entities and slots."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfn_hf import FlowMemoryNetwork
from dfn_hf.modeling.flownetwork.memory import MemoryAttention, MemoryBank, SequenceMemory
from dfn_hf.modeling.modules.chunk_memory import ChunkMemory
from dfn_hf.modeling.modules.row_layout import make_row_layout
from tests.modeling.modules.test_chunk_memory import SPLITS, Feed, read

CPU = torch.device("cpu")
FEATURES, SLOTS, DECAY = 6, 3, 0.9
STRICT = {"atol": 1e-12, "rtol": 0}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_bank(dtype=torch.float64):
    torch.manual_seed(0)
    return MemoryBank(FEATURES, SLOTS, DECAY).to(dtype)


def rows_of(x, mask=None):
    return make_row_layout(*x.shape[:2], CPU, mask=mask)


def written_by_loop(bank, entities):
    """Return the slots after an update with `entities` `[number, D]`, from the equation."""
    slots = []
    assignments = [(4 * bank @ entity / math.sqrt(FEATURES)).softmax(dim=0) for entity in entities]
    for j in range(len(bank)):
        total = sum(assignment[j] * entity for assignment, entity in zip(assignments, entities, strict=True))
        mean = total / sum(assignment[j] for assignment in assignments)
        slots.append(DECAY * bank[j] + (1 - DECAY) * mean)
    return torch.stack(slots)


# Memory bank


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 20)])
def test_update_equals_the_loop(shape):
    bank, x = make_bank(), draw(*shape, FEATURES)
    before = bank.memory_bank.clone()
    norm = bank.stage(x, rows_of(x))
    assert torch.equal(bank.memory_bank, before)  # only commit changes the bank
    bank.commit()
    expected = written_by_loop(before, x.flatten(0, 1))
    assert torch.allclose(bank.memory_bank, expected, **STRICT)
    assert torch.allclose(norm, (expected - before).norm(), **STRICT)


def test_accumulated_micro_batches_equal_one_batch():
    x = draw(8, 9, FEATURES)
    whole, pieces = make_bank(), make_bank()
    norm = whole.stage(x, rows_of(x))
    for row in x:
        assert pieces.stage(row[None], rows_of(row[None])) != norm  # the norm is that of this micro-batch alone
    whole.commit()
    pieces.commit()
    assert torch.allclose(whole.memory_bank, pieces.memory_bank, **STRICT)


def test_second_commit_changes_nothing():
    bank, x = make_bank(), draw(2, 9, FEATURES)
    bank.commit()
    assert torch.equal(bank.memory_bank, make_bank().memory_bank)
    bank.stage(x, rows_of(x))
    bank.commit()
    once = bank.memory_bank.clone()
    bank.commit()
    assert bank.staged is None and torch.equal(bank.memory_bank, once)
    assert not torch.equal(once, make_bank().memory_bank)


def test_padding_is_ignored():
    bank, alone = make_bank(), make_bank()
    x, mask = draw(2, 9, FEATURES), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = mask[1, 5] = mask[1, 8] = False
    rows = rows_of(x, mask)
    entities = x[mask][None]
    norms = bank.stage(rows.unpad(x), rows), alone.stage(entities, rows_of(entities))
    bank.commit()
    alone.commit()
    assert torch.allclose(*norms, **STRICT) and torch.allclose(bank.memory_bank, alone.memory_bank, **STRICT)


def test_batch_of_padding_changes_nothing():
    bank, x = make_bank(), draw(2, 9, FEATURES)
    rows = rows_of(x, torch.zeros(2, 9, dtype=torch.bool))
    assert bank.stage(rows.unpad(x), rows) == 0
    bank.commit()
    assert torch.equal(bank.memory_bank, make_bank().memory_bank)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_entities_that_are_not_finite_change_nothing(value):
    bank, x = make_bank(), draw(2, 9, FEATURES)
    x[1, 3, 2] = value
    assert bank.stage(x, rows_of(x)) == 0
    bank.commit()
    assert torch.equal(bank.memory_bank, make_bank().memory_bank)
    x = draw(2, 9, FEATURES)
    bank.stage(x, rows_of(x))
    bank.commit()
    expected = written_by_loop(make_bank().memory_bank, x.flatten(0, 1))
    assert torch.allclose(bank.memory_bank, expected, **STRICT)  # the staged statistics were discarded


def test_values_beyond_the_dtype_are_not_written():
    bank, x = make_bank(torch.float32), draw(2, 9, FEATURES) * 1e200
    bank.stage(x, rows_of(x))
    bank.commit()
    assert torch.equal(bank.memory_bank, make_bank(torch.float32).memory_bank)


def test_slots_without_entities_keep_their_value():
    bank = make_bank()
    with torch.no_grad():
        bank.memory_bank.copy_(torch.tensor([[1.0], [-1.0], [1.0]]) * 1e4)
    before = bank.memory_bank.clone()
    x = torch.ones(1, 4, FEATURES, dtype=torch.float64)
    bank.stage(x, rows_of(x))
    bank.commit()
    assert torch.equal(bank.memory_bank[1], before[1])
    assert torch.allclose(bank.memory_bank[[0, 2]], DECAY * before[[0, 2]] + (1 - DECAY), **STRICT)


def test_order_of_entities_does_not_matter_in_float32():
    x = draw(4, 500, FEATURES).float()
    banks = make_bank(torch.float32), make_bank(torch.float32)
    for bank, entities in zip(banks, (x, x.flip(0, 1)), strict=True):
        bank.stage(entities, rows_of(entities))
        assert all(staged.dtype == torch.float64 for staged in bank.staged)
        bank.commit()
    assert torch.equal(banks[0].memory_bank, banks[1].memory_bank)


def test_updates_have_no_gradient():
    bank, x = make_bank(), draw(2, 9, FEATURES).requires_grad_()
    norm = bank.stage(x, rows_of(x))
    assert not any(one.requires_grad for one in (norm, *bank.staged))
    bank.commit()
    assert not bank.memory_bank.requires_grad and bank.memory_bank.grad_fn is None
    assert not list(bank.parameters())


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("name", ["d_model", "memory_size"])
def test_invalid_bank_sizes_raise(name, size):
    with pytest.raises(ValueError, match=rf"`{name}` must be at least 1, got {size}"):
        MemoryBank(**{"d_model": 4, "memory_size": 4, name: size})


@pytest.mark.parametrize("memory", [MemoryBank, partial(FlowMemoryNetwork, num_memory_heads=2)])
@pytest.mark.parametrize("decay", [0, 1, -0.1, 1.5, math.nan])
def test_invalid_decays_raise(memory, decay):
    with pytest.raises(ValueError, match=rf"`memory_bank_decay` must lie in \(0, 1\), got {decay}"):
        memory(4, 4, memory_bank_decay=decay)


@pytest.mark.parametrize("common", [0.0, 1.0])
def test_slots_stay_distinct_over_many_updates(common):
    """Uses clusters of normalised states, with and without a common direction."""
    width, count = 64, 16
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(count, width, generator=generator) + common * torch.randn(width, generator=generator)
    torch.manual_seed(0)
    bank = MemoryBank(width, count, memory_bank_decay=0.97)
    for _ in range(300):
        members = centres[torch.randint(count, (2, 32), generator=generator)]
        x = F.rms_norm(members + 0.3 * torch.randn(2, 32, width, generator=generator), (width,))
        bank.stage(x, rows_of(x))
        bank.commit()
    centres = F.rms_norm(centres, (width,))
    nearest = torch.cdist(bank.memory_bank, centres).argmin(dim=1)
    assert len(nearest.unique()) == count
    assert torch.pdist(bank.memory_bank).mean() > 0.9 * torch.pdist(centres).mean()


# Sequence memory


def make_sequence_memory(chunk_length=4):
    torch.manual_seed(chunk_length)
    memory = SequenceMemory(FEATURES, SLOTS, chunk_length, initial_decay=0.8)
    memory.reset_parameters(std=1.0)
    with torch.no_grad():
        memory.decay_logit.add_(torch.randn(SLOTS))
    return memory.double()


def held_by_loop(memory, x):
    """Return the slots that each entity of one segment `[length, D]` reads, `[length, S, D]`, from the equations."""
    slots, seen = memory.initial_slots, []
    for start in range(0, len(x), memory.chunk_length):
        chunk = x[start : start + memory.chunk_length]
        seen += [slots] * len(chunk)
        assignments = [(memory.pooling_query @ entity / math.sqrt(FEATURES)).softmax(dim=0) for entity in chunk]
        moved = []
        for j in range(SLOTS):
            mass = sum(assignment[j] for assignment in assignments)
            mean = sum(assignment[j] * entity for assignment, entity in zip(assignments, chunk, strict=True)) / mass
            kept = memory.decay_logit[j].sigmoid() ** (mass * SLOTS / memory.chunk_length)
            moved.append(kept * slots[j] + (1 - kept) * mean)
        slots = torch.stack(moved)
    return torch.stack(seen)


def assert_same_with_gradients(memory, x, found, expected, all_move=True):
    assert torch.allclose(found, expected, **STRICT)
    inputs = [x, *memory.parameters()]
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert (one.any() or not all_move) and torch.allclose(one, other, atol=1e-11, rtol=0)


@pytest.mark.parametrize("chunk_length", [2, 4, 7])
@pytest.mark.parametrize("length", [15, 16, 29])
def test_sequence_memory_equals_the_loop(chunk_length, length):
    memory, x = make_sequence_memory(chunk_length), draw(2, length, FEATURES).requires_grad_()
    expected = torch.stack([held_by_loop(memory, row) for row in x])
    assert_same_with_gradients(memory, x, read(memory, x, rows_of(x)), expected)


@pytest.mark.parametrize("chunk_length", [2, 4, 7])
def test_open_first_chunk_reads_the_initial_slots(chunk_length):
    memory, x = make_sequence_memory(chunk_length), draw(2, chunk_length, FEATURES)
    first = memory.initial_slots.expand(2, chunk_length, -1, -1)
    assert torch.equal(read(memory, x, rows_of(x)), first)


@pytest.mark.parametrize("chunk_length", [2, 4, 7])
def test_each_segment_starts_with_the_initial_slots(chunk_length):
    memory, x = make_sequence_memory(chunk_length), draw(2, 30, FEATURES).requires_grad_()
    lengths = [[1, 4, 9, 5, 11], [12, 18]]
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    found = read(memory, x, make_row_layout(2, 30, CPU, segment_ids=segments))
    pieces = [held_by_loop(memory, piece) for row in range(2) for piece in x[row].split(lengths[row])]
    assert_same_with_gradients(memory, x, found, torch.cat(pieces).view_as(found))


@pytest.mark.parametrize("chunk_length", [2, 4, 7])
def test_padding_is_not_assigned(chunk_length):
    memory, x = make_sequence_memory(chunk_length), draw(3, 30, FEATURES).requires_grad_()
    counts = (30, 17, 0)
    mask = torch.arange(30) < torch.tensor(counts)[:, None]
    rows = rows_of(x, mask)
    found = read(memory, rows.unpad(x), rows)[mask]
    expected = torch.cat([held_by_loop(memory, x[row, :count]) for row, count in enumerate(counts) if count])
    assert_same_with_gradients(memory, x, found, expected)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("chunk_length", [2, 4, 7])
def test_any_split_gives_equal_slots(split, chunk_length):
    memory, x = make_sequence_memory(chunk_length), draw(2, 29, FEATURES)
    feed = Feed(memory, x)
    pieces = [feed(counts) for counts in SPLITS[split]]
    for row in range(2):
        found = torch.cat([piece[row] for piece in pieces])
        assert torch.allclose(found, held_by_loop(memory, x[row]), **STRICT)


@pytest.mark.parametrize("removed", [1, 4, 9])
def test_crop_restores_the_slots(removed):
    memory, x, other = make_sequence_memory(), draw(2, 40, FEATURES), draw(2, 40, FEATURES, seed=3)
    feed = Feed(memory, x)
    feed.state.activate_past_recording()
    feed([20 - removed] * 2)
    feed([removed] * 2, x=other)
    feed.state.crop(-removed)
    feed.done = [20 - removed] * 2
    found = feed([9, 9]), feed([1, 1]), feed([10, 10])
    for row in range(2):
        expected = held_by_loop(memory, x[row])[20 - removed : 40 - removed]
        assert torch.allclose(torch.cat([piece[row] for piece in found]), expected, **STRICT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [-1e4, -90.0, -60.0])  # weights of 0, of a subnormal float32 number, and of 1e-26
def test_slots_with_tiny_assignments_keep_their_value(dtype, score):
    memory, x = make_sequence_memory().to(dtype), draw(2, 400, FEATURES).to(dtype)
    x[..., 0] = 1  # the only feature that the queries use
    x.requires_grad_()
    with torch.no_grad():
        memory.pooling_query.zero_()
        memory.pooling_query[1, 0] = score * math.sqrt(FEATURES)
    found = read(memory, x, rows_of(x))
    assert torch.allclose(found[:, :, 1], memory.initial_slots[1].expand(2, 400, -1), **STRICT)
    assert (found[:, -1, [0, 2]] - memory.initial_slots[[0, 2]]).abs().min() > 1e-3
    assert all(gradient.isfinite().all() for gradient in gradients(found, [x, *memory.parameters()]))


def test_equal_assignments_decay_at_the_rate_of_the_slot():
    memory, x = make_sequence_memory(), draw(1, 9, FEATURES)
    with torch.no_grad():
        memory.pooling_query.zero_()
    kept = memory.decay_logit.sigmoid()[:, None]
    expected = kept * memory.initial_slots + (1 - kept) * x[0, :4].mean(dim=0)
    assert torch.allclose(read(memory, x, rows_of(x))[0, 4], expected, **STRICT)


def test_assignment_is_at_least_float32():
    memory = make_sequence_memory().float()
    slots, _ = memory(draw(1, 12, FEATURES).bfloat16(), make_row_layout(1, 12, CPU))
    assert slots.dtype == torch.float32 and slots.isfinite().all()


# Attention


def rms_norm(norm, x):
    return norm.weight * x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def read_by_loop(attention, x, slots):
    """Attend from one entity `[D]` to slots `[S, D]`."""
    query = rms_norm(attention.q_norm, attention.q_proj(x).view(attention.num_heads, -1))
    key, value = rms_norm(attention.k_norm, attention.k_proj(slots)), attention.v_proj(slots)
    heads = []
    for head in range(attention.num_heads):
        scores = key @ query[head] / math.sqrt(query.shape[1])
        heads.append(scores.softmax(dim=0) @ value)
    return attention.o_proj(torch.cat(heads))


def make_attention(num_heads=2, dropout=0.0):
    torch.manual_seed(1)
    attention = MemoryAttention(FEATURES, num_heads, dropout).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    return attention.eval()


def gradients(outputs, inputs):
    return torch.autograd.grad((outputs * draw(*outputs.shape, seed=9)).sum(), inputs)


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("per_row", [False, True])
def test_bank_attention_equals_the_loop(num_heads, per_row):
    attention, x = make_attention(num_heads), draw(2, 7, FEATURES).requires_grad_()
    bank = draw(2, SLOTS, FEATURES, seed=2) if per_row else draw(SLOTS, FEATURES, seed=2)
    found = attention(x, bank)
    banks = bank if per_row else [bank, bank]
    expected = [torch.stack([read_by_loop(attention, entity, banks[row]) for entity in x[row]]) for row in range(2)]
    expected = torch.stack(expected)
    assert torch.allclose(found, expected, **STRICT)
    inputs = [x, *attention.parameters()]
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert one.any() and torch.allclose(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("with_bank", [False, True])
@pytest.mark.parametrize("lengths", [[[3], [3]], [[29], [29]], [[1, 4, 9, 5, 10], [12, 17]], [[4, 4, 4], [12]]])
def test_sequence_memory_attention_equals_the_loop(with_bank, lengths):
    attention, length = make_attention(), sum(lengths[0])
    x = draw(2, length, FEATURES).requires_grad_()
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    rows = make_row_layout(2, length, CPU, segment_ids=segments)
    memory = ChunkMemory(FEATURES, SLOTS, 4, initial_decay=0.8).double()
    memory.reset_parameters(std=1.0)
    slots, layout = memory(x, rows)
    bank = draw(2, FEATURES, seed=2) if with_bank else None
    found = attention(x, bank, slots, layout)
    chunk = layout.slot // memory.chunk_length
    expected = []
    for row in range(2):
        for i in range(length):
            seen = slots[row, chunk[row, i]]
            expected.append(read_by_loop(attention, x[row, i], torch.cat([seen, bank]) if with_bank else seen))
    expected = torch.stack(expected).view_as(found)
    assert torch.allclose(found, expected, **STRICT)
    inputs = [x, *attention.parameters()]
    found, expected = (torch.autograd.grad(one.square().sum(), inputs, retain_graph=True) for one in (found, expected))
    assert all(torch.allclose(one, other, atol=1e-9, rtol=0) for one, other in zip(found, expected, strict=True))


def test_dropout_is_active_in_training_only():
    attention, x, bank = make_attention(dropout=0.5), draw(2, 7, FEATURES), draw(SLOTS, FEATURES)
    with torch.no_grad():
        plain = attention(x, bank)
        assert torch.equal(attention(x, bank), plain)
        assert not torch.allclose(attention.train()(x, bank), plain)


# Stand-alone memory


def make_network(num_memory_heads=2):
    torch.manual_seed(0)
    return FlowMemoryNetwork(FEATURES, SLOTS, num_memory_heads, memory_bank_decay=DECAY).double()


def test_network_attends_before_it_updates():
    network, x = make_network(), draw(2, 9, FEATURES)
    before = network.memory_bank.clone()
    out, metrics = network(x)
    read = [[read_by_loop(network.attention, network.norm(entity), before) for entity in row] for row in x]
    assert torch.allclose(out, x + torch.stack([torch.stack(row) for row in read]), **STRICT)
    assert torch.allclose(network.memory_bank, written_by_loop(before, x.flatten(0, 1)), **STRICT)
    norm = metrics["memory_write_norm"]
    assert norm.shape == () and not norm.requires_grad
    assert torch.allclose(norm, (network.memory_bank - before).norm(), **STRICT)
    assert not torch.allclose(network(x)[0], out)  # it attends to the updated bank


def test_equal_networks_stay_equal():
    network, x = make_network(), draw(5, 2, 9, FEATURES)
    other = copy.deepcopy(network)
    for batch in x:
        outputs = [one(batch)[0] for one in (network, other)]
        assert torch.equal(*outputs) and torch.equal(network.memory_bank, other.memory_bank)


def test_network_trains_but_not_through_the_update():
    network, x = make_network(), draw(2, 9, FEATURES).requires_grad_()
    out, _ = network(x)
    again, _ = network(x)
    (out.square().sum() + again.square().sum()).backward()  # the bank of the first pass was overwritten
    assert all(parameter.grad.any() for parameter in network.parameters())
    assert not network.memory_bank.requires_grad and network.memory_bank.grad_fn is None


@pytest.mark.parametrize(
    ("training", "options"), [(True, {"update_memory": False}), (False, {}), (False, {"update_memory": True})]
)
def test_updates_need_training_mode_and_update_memory(training, options):
    network, x = make_network().train(training), draw(2, 9, FEATURES)
    out, metrics = network(x, **options)
    assert torch.equal(network.memory_bank, make_network().memory_bank) and network.staged is None
    assert metrics["memory_write_norm"] == 0 and torch.equal(network(x, **options)[0], out)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_network_ignores_inputs_that_are_not_finite(value):
    network, x = make_network(), draw(2, 9, FEATURES)
    x[0, 0, 0] = value
    network(x)
    assert torch.equal(network.memory_bank, make_network().memory_bank)


def test_bank_is_in_the_state_dict():
    network, x = make_network(), draw(2, 9, FEATURES)
    network(x)
    other = FlowMemoryNetwork(FEATURES, SLOTS, 2).double()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.memory_bank, network.memory_bank)
    assert torch.equal(other.eval()(x)[0], network.eval()(x)[0])


@pytest.mark.parametrize("shape", [(9, FEATURES), (2, 9, FEATURES + 1), (2, 3, 9, FEATURES), (FEATURES,)])
def test_wrong_shapes_raise(shape):
    with pytest.raises(ValueError) as error:
        make_network()(draw(*shape))
    assert f"[batch, length, {FEATURES}]" in str(error.value) and str(list(shape)) in str(error.value)


@pytest.mark.parametrize(("requested", "taken"), [(1, 1), (3, 3), (4, 3), (5, 3), (6, 6), (20, 6)])
def test_heads_are_lowered_to_a_divisor(requested, taken):
    network = make_network(requested)
    assert network.attention.num_heads == taken
    assert network(draw(1, 4, FEATURES))[0].shape == (1, 4, FEATURES)


@pytest.mark.parametrize("name", ["d_model", "memory_size", "num_memory_heads"])
def test_invalid_network_sizes_raise(name):
    with pytest.raises(ValueError, match=rf"{name}.*0"):
        FlowMemoryNetwork(**{"d_model": 4, "memory_size": 4, "num_memory_heads": 2, name: 0})
