"""The memory bank, its reading and its writing, against loops over entities and slots."""

import copy
import math

import pytest
import torch
from torch import nn

from dfn_hf import FlowMemoryNetwork
from dfn_hf.modeling.chunk_memory import ChunkMemory
from dfn_hf.modeling.flow_memory import MemoryAttention, MemoryBank
from dfn_hf.modeling.padding import lay_rows

CPU = torch.device("cpu")
FEATURES, SLOTS, DECAY = 6, 3, 0.9
STRICT = {"atol": 1e-12, "rtol": 0}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_bank(dtype=torch.float64):
    torch.manual_seed(0)
    return MemoryBank(FEATURES, SLOTS, DECAY).to(dtype)


def rows_of(x, mask=None):
    return lay_rows(*x.shape[:2], CPU, mask=mask)


def written_by_loop(bank, entities):
    """Slots after they took in `entities` `[number, D]`, straight from the equation."""
    slots = []
    shares = [(4 * bank @ entity / math.sqrt(FEATURES)).softmax(dim=0) for entity in entities]
    for j in range(len(bank)):
        total = sum(share[j] * entity for share, entity in zip(shares, entities, strict=True))
        mean = total / sum(share[j] for share in shares)
        slots.append(DECAY * bank[j] + (1 - DECAY) * mean)
    return torch.stack(slots)


# The bank


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 20)])
def test_a_write_equals_the_loop(shape):
    bank, x = make_bank(), draw(*shape, FEATURES)
    before = bank.memory_bank.clone()
    norm = bank.stage(x, rows_of(x))
    assert torch.equal(bank.memory_bank, before)  # nothing changes without commit
    bank.commit()
    expected = written_by_loop(before, x.flatten(0, 1))
    assert torch.allclose(bank.memory_bank, expected, **STRICT)
    assert torch.allclose(norm, (expected - before).norm(), **STRICT)


def test_accumulated_micro_batches_write_what_one_batch_does():
    x = draw(8, 9, FEATURES)
    whole, pieces = make_bank(), make_bank()
    norm = whole.stage(x, rows_of(x))
    for row in x:
        assert pieces.stage(row[None], rows_of(row[None])) != norm  # each counts what it alone would change
    whole.commit()
    pieces.commit()
    assert torch.allclose(whole.memory_bank, pieces.memory_bank, **STRICT)


def test_a_second_commit_writes_nothing():
    bank, x = make_bank(), draw(2, 9, FEATURES)
    bank.commit()
    assert torch.equal(bank.memory_bank, make_bank().memory_bank)
    bank.stage(x, rows_of(x))
    bank.commit()
    once = bank.memory_bank.clone()
    bank.commit()
    assert bank.staged is None and torch.equal(bank.memory_bank, once)
    assert not torch.equal(once, make_bank().memory_bank)


def test_padding_does_not_count():
    bank, alone = make_bank(), make_bank()
    x, mask = draw(2, 9, FEATURES), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = mask[1, 5] = mask[1, 8] = False
    rows = rows_of(x, mask)
    entities = x[mask][None]
    norms = bank.stage(rows.compact(x), rows), alone.stage(entities, rows_of(entities))
    bank.commit()
    alone.commit()
    assert torch.allclose(*norms, **STRICT) and torch.allclose(bank.memory_bank, alone.memory_bank, **STRICT)


def test_a_batch_of_padding_writes_nothing():
    bank, x = make_bank(), draw(2, 9, FEATURES)
    rows = rows_of(x, torch.zeros(2, 9, dtype=torch.bool))
    assert bank.stage(rows.compact(x), rows) == 0
    bank.commit()
    assert torch.equal(bank.memory_bank, make_bank().memory_bank)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_leaves_the_slots_as_they_are(value):
    bank, x = make_bank(), draw(2, 9, FEATURES)
    x[1, 3, 2] = value
    assert bank.stage(x, rows_of(x)) == 0
    bank.commit()
    assert torch.equal(bank.memory_bank, make_bank().memory_bank)
    x = draw(2, 9, FEATURES)
    bank.stage(x, rows_of(x))
    bank.commit()
    expected = written_by_loop(make_bank().memory_bank, x.flatten(0, 1))
    assert torch.allclose(bank.memory_bank, expected, **STRICT)  # and does not stay staged


def test_what_the_bank_cannot_hold_is_not_written():
    bank, x = make_bank(torch.float32), draw(2, 9, FEATURES) * 1e200
    bank.stage(x, rows_of(x))
    bank.commit()
    assert torch.equal(bank.memory_bank, make_bank(torch.float32).memory_bank)


def test_a_slot_that_got_nothing_stays():
    bank = make_bank()
    with torch.no_grad():
        bank.memory_bank.copy_(torch.tensor([[1.0], [-1.0], [1.0]]) * 1e4)
    before = bank.memory_bank.clone()
    x = torch.ones(1, 4, FEATURES, dtype=torch.float64)
    bank.stage(x, rows_of(x))
    bank.commit()
    assert torch.equal(bank.memory_bank[1], before[1])
    assert torch.allclose(bank.memory_bank[[0, 2]], DECAY * before[[0, 2]] + (1 - DECAY), **STRICT)


def test_the_order_of_entities_does_not_matter_in_float32():
    x = draw(4, 500, FEATURES).float()
    banks = make_bank(torch.float32), make_bank(torch.float32)
    for bank, entities in zip(banks, (x, x.flip(0, 1)), strict=True):
        bank.stage(entities, rows_of(entities))
        assert all(staged.dtype == torch.float64 for staged in bank.staged)
        bank.commit()
    assert torch.equal(banks[0].memory_bank, banks[1].memory_bank)


def test_no_gradient_passes_through_a_write():
    bank, x = make_bank(), draw(2, 9, FEATURES).requires_grad_()
    norm = bank.stage(x, rows_of(x))
    assert not any(one.requires_grad for one in (norm, *bank.staged))
    bank.commit()
    assert not bank.memory_bank.requires_grad and bank.memory_bank.grad_fn is None
    assert not list(bank.parameters())


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("name", ["d_model", "memory_size"])
def test_a_bank_names_what_it_cannot_be_made_of(name, size):
    with pytest.raises(ValueError, match=rf"`{name}` must be at least 1, got {size}"):
        MemoryBank(**{"d_model": 4, "memory_size": 4, name: size})


# Reading


def normalised(norm, x):
    return norm.weight * x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def read_by_loop(attention, x, slots):
    """What one entity `[D]` reads from slots `[S, D]`."""
    query = normalised(attention.q_norm, attention.q_proj(x).view(attention.num_heads, -1))
    key, value = normalised(attention.k_norm, attention.k_proj(slots)), attention.v_proj(slots)
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
def test_reading_the_bank_equals_the_loop(num_heads, per_row):
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
def test_reading_in_chunks_equals_the_loop(with_bank, lengths):
    attention, length = make_attention(), sum(lengths[0])
    x = draw(2, length, FEATURES).requires_grad_()
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    rows = lay_rows(2, length, CPU, segment_ids=segments)
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


def test_dropout_is_for_training():
    attention, x, bank = make_attention(dropout=0.5), draw(2, 7, FEATURES), draw(SLOTS, FEATURES)
    with torch.no_grad():
        plain = attention(x, bank)
        assert torch.equal(attention(x, bank), plain)
        assert not torch.allclose(attention.train()(x, bank), plain)


# A memory that stands alone


def make_network(num_memory_heads=2):
    torch.manual_seed(0)
    return FlowMemoryNetwork(FEATURES, SLOTS, num_memory_heads, bank_decay=DECAY).double()


def test_it_reads_and_then_writes():
    network, x = make_network(), draw(2, 9, FEATURES)
    before = network.memory_bank.clone()
    out, metrics = network(x)
    read = [[read_by_loop(network.attention, network.norm(entity), before) for entity in row] for row in x]
    assert torch.allclose(out, x + torch.stack([torch.stack(row) for row in read]), **STRICT)
    assert torch.allclose(network.memory_bank, written_by_loop(before, x.flatten(0, 1)), **STRICT)
    norm = metrics["memory_write_norm"]
    assert norm.shape == () and not norm.requires_grad
    assert torch.allclose(norm, (network.memory_bank - before).norm(), **STRICT)
    assert not torch.allclose(network(x)[0], out)  # it reads what was written


def test_two_equal_memories_stay_equal():
    network, x = make_network(), draw(5, 2, 9, FEATURES)
    other = copy.deepcopy(network)
    for batch in x:
        outputs = [one(batch)[0] for one in (network, other)]
        assert torch.equal(*outputs) and torch.equal(network.memory_bank, other.memory_bank)


def test_it_learns_but_not_through_the_write():
    network, x = make_network(), draw(2, 9, FEATURES).requires_grad_()
    out, _ = network(x)
    again, _ = network(x)
    (out.square().sum() + again.square().sum()).backward()  # the first pass read what has been written over since
    assert all(parameter.grad.any() for parameter in network.parameters())
    assert not network.memory_bank.requires_grad and network.memory_bank.grad_fn is None


@pytest.mark.parametrize(
    ("training", "options"), [(True, {"update_memory": False}), (False, {}), (False, {"update_memory": True})]
)
def test_it_writes_in_training_only_and_when_it_is_asked_to(training, options):
    network, x = make_network().train(training), draw(2, 9, FEATURES)
    out, metrics = network(x, **options)
    assert torch.equal(network.memory_bank, make_network().memory_bank) and network.staged is None
    assert metrics["memory_write_norm"] == 0 and torch.equal(network(x, **options)[0], out)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_remembered(value):
    network, x = make_network(), draw(2, 9, FEATURES)
    x[0, 0, 0] = value
    network(x)
    assert torch.equal(network.memory_bank, make_network().memory_bank)


def test_its_bank_is_saved_with_it():
    network, x = make_network(), draw(2, 9, FEATURES)
    network(x)
    other = FlowMemoryNetwork(FEATURES, SLOTS, 2).double()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.memory_bank, network.memory_bank)
    assert torch.equal(other.eval()(x)[0], network.eval()(x)[0])


@pytest.mark.parametrize("shape", [(9, FEATURES), (2, 9, FEATURES + 1), (2, 3, 9, FEATURES), (FEATURES,)])
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(ValueError) as error:
        make_network()(draw(*shape))
    assert f"[batch, length, {FEATURES}]" in str(error.value) and str(list(shape)) in str(error.value)


@pytest.mark.parametrize(("requested", "taken"), [(1, 1), (3, 3), (4, 3), (5, 3), (6, 6), (20, 6)])
def test_heads_are_lowered_to_what_divides_the_width(requested, taken):
    network = make_network(requested)
    assert network.attention.num_heads == taken
    assert network(draw(1, 4, FEATURES))[0].shape == (1, 4, FEATURES)


@pytest.mark.parametrize("name", ["d_model", "memory_size", "num_memory_heads"])
def test_a_memory_names_what_it_cannot_be_made_of(name):
    with pytest.raises(ValueError, match=rf"{name}.*0"):
        FlowMemoryNetwork(**{"d_model": 4, "memory_size": 4, "num_memory_heads": 2, name: 0})
