"""The cache of a layer: every kind of state through growth, padding, crop, selection and offload."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig

from dfn_hf import DFNConfig
from dfn_hf.modeling.modules.cache import FlowCacheLayer, state_layers
from dfn_hf.modeling.modules.cache_states import GrowingState, ReplaceState
from dfn_hf.modeling.modules.row_layout import make_row_layout

CPU = torch.device("cpu")
TAIL = 3


class Recorder:
    """A cache layer filled with numbered entities; `rows[b]` lists the expected entities of row b."""

    def __init__(self, batch):
        self.layer = FlowCacheLayer()
        self.rows = [[] for _ in range(batch)]
        self.undone = []

    def call(self, mask):
        """Make one call with a column mask `[batch][length]`; returns the results of `append` and `roll`."""
        layer, mask = self.layer, torch.tensor(mask).bool()
        batch, length = mask.shape
        layer.start_forward(batch, length, CPU)
        rows = make_row_layout(batch, length, CPU, mask=mask, past=layer.lengths, aligned_past=layer.aligned)
        layer.set_layout(rows)
        new = torch.zeros(batch, length, 2)
        for row, entities in enumerate(self.rows):
            for step in range(int(mask[row].sum())):
                new[row, step] = 100.0 * (row + 1) + len(entities)
                entities.append(100.0 * (row + 1) + len(entities))
        counters, entries = layer.index(self.index_shapes, self.undo).values()
        counters.add_(1)
        entries[:, counters[0, 0].long() - 1] = counters[:, :1]
        appended, tail = layer.append("entities", new[:, None]), layer.roll("tail", new, TAIL)
        layer.finish_forward()
        return appended, tail

    def index_shapes(self):
        calls = int(self.layer.data("index")[0, 0]) + 1 if "index" in self.layer.states else 1
        batch = len(self.rows)
        return {"index": ((batch, 4), torch.float32), "index_entries": ((batch, calls, 1), torch.float32)}

    def undo(self, layer, old, new):
        assert layer is self.layer
        self.undone.append((old.tolist(), new.tolist()))

    def crop(self, columns):
        before = self.layer.lengths
        self.layer.crop(-columns)
        for entities, count in zip(self.rows, (before - self.layer.lengths).tolist(), strict=True):
            del entities[len(entities) - count :]

    def check(self):
        layer = self.layer
        assert layer.lengths.tolist() == [len(entities) for entities in self.rows]
        assert layer.get_seq_length() == layer.seq_length
        tail = layer.data("tail")
        for row, entities in enumerate(self.rows):
            assert layer.data("entities")[row, 0, : len(entities), 0].tolist() == entities
            expected = ([0.0] * TAIL + entities)[-TAIL:]
            assert tail[row, tail.shape[1] - TAIL :, 0].tolist() == expected


def ones(batch, length):
    return [[1] * length] * batch


CALLS = {
    "aligned": [ones(2, 4), ones(2, 1), ones(2, 1), ones(2, 7)],
    "left": [[[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], ones(2, 1), ones(2, 3)],
    "right, then tokens": [[[1, 1, 0, 0], [1, 1, 1, 1]], ones(2, 2), [[1, 0, 0], [0, 0, 1]]],
    "an empty row": [[[0, 0], [1, 1]], [[0], [1]], [[1], [1]]],
}


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_every_row_holds_its_own_entities(name, record):
    recorder = Recorder(2)
    if record:
        recorder.layer.activate_past_recording()
    for mask in CALLS[name]:
        before = [list(entities) for entities in recorder.rows]
        appended, tail = recorder.call(mask)
        recorder.check()
        assert appended.shape[2] >= max(len(entities) for entities in recorder.rows)
        assert tail.shape[1] == TAIL + len(mask[0])
        for row, entities in enumerate(before):
            assert tail[row, :TAIL, 0].tolist() == ([0.0] * TAIL + entities)[-TAIL:]
            new = recorder.rows[row][len(entities) :]
            assert tail[row, TAIL : TAIL + len(new), 0].tolist() == new
    calls = len(CALLS[name])
    assert recorder.layer.data("index").tolist() == [[calls] * 4] * 2
    assert recorder.layer.data("index_entries")[..., 0].tolist() == [[*range(1, calls + 1)]] * 2
    entities = recorder.layer.data("tail").shape[1]
    assert entities == (TAIL + recorder.layer.seq_length if record else TAIL)


def test_an_index_of_another_layout_starts_empty():
    layer = FlowCacheLayer()
    layer.start_forward(2, 1, CPU)
    counters = ((2, 1), torch.int32)
    flat = {"counters": counters, "flat": ((2, 3), torch.int16)}
    for tensor in layer.index(lambda: flat, None).values():
        tensor.fill_(1)
    assert layer.index(lambda: flat, None)["flat"].sum() == 6
    paged = layer.index(lambda: {"counters": counters, "paged": ((2, 2, 2), torch.int32)}, None)
    assert list(paged) == list(layer.states) == ["counters", "paged"]
    assert all(not tensor.any() for tensor in paged.values())
    assert paged["paged"].dtype == torch.int32 and paged["paged"].shape == (2, 2, 2)


def test_an_index_grows_and_does_not_shrink():
    layer = FlowCacheLayer()
    layer.start_forward(2, 1, CPU)
    layer.index(lambda: {"leaves": ((2, 0, 3), torch.int32)}, None)
    for leaves, kept in ((2, 2), (5, 5), (1, 5)):
        data = layer.index(lambda leaves=leaves: {"leaves": ((2, leaves, 3), torch.int32)}, None)["leaves"]
        assert data.shape == (2, kept, 3) and not data[:, 2:].any()
        data[:, :2] += 1
    assert (data[:, :2] == 3).all()


def test_get_mask_sizes_counts_columns():
    recorder = Recorder(2)
    for mask in CALLS["left"]:
        recorder.call(mask)
    assert recorder.layer.get_seq_length() == 9
    assert recorder.layer.get_mask_sizes(4) == (13, 0)
    assert recorder.layer.batch_size == 2


@pytest.mark.parametrize("lengths", [[[1, 1]] * 2000, [[1, 0], [0, 1]] * 1000])
def test_growth_copies_each_entry_a_bounded_number_of_times(lengths, monkeypatch):
    copied = []
    reserve = GrowingState.reserve

    def counted(self, capacity):
        before = self.data.shape[2]
        reserve(self, capacity)
        if self.data.shape[2] != before:
            copied.append(before)

    monkeypatch.setattr(GrowingState, "reserve", counted)
    layer = FlowCacheLayer()
    for step, counts in enumerate(lengths):
        layer.start_forward(2, 1, CPU)
        mask = torch.tensor(counts)[:, None].bool()
        layer.set_layout(make_row_layout(2, 1, CPU, mask=mask, past=layer.lengths, aligned_past=layer.aligned))
        layer.append("entities", torch.full((2, 1, 1, 1), float(step)))
        layer.finish_forward()
    assert sum(copied) <= 5 * len(lengths) and len(copied) <= 30
    entities = [step for step, counts in enumerate(lengths) if counts[0]]
    assert layer.data("entities")[0, 0, : len(entities), 0].tolist() == entities


def test_append_keeps_the_gradient_of_new_entries():
    layer = FlowCacheLayer()
    pieces = [torch.randn(2, 1, 3, 2, requires_grad=True) for _ in range(2)]
    for piece in pieces:
        layer.start_forward(2, 3, CPU)
        layer.set_layout(make_row_layout(2, 3, CPU, aligned_past=layer.aligned))
        entities = layer.append("entities", piece)
        tail = layer.roll("tail", piece[:, 0], 2)
        layer.finish_forward()
    (entities.sum() + tail.sum()).backward()
    assert pieces[0].grad is None
    assert torch.equal(pieces[1].grad, torch.full((2, 1, 3, 2), 2.0))
    assert not layer.data("entities").requires_grad and not layer.data("tail").requires_grad


# Crop


@pytest.mark.parametrize("removed", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("name", CALLS)
def test_crop_removes_the_right_number_from_each_row(name, removed):
    recorder = Recorder(2)
    recorder.layer.activate_past_recording()
    for mask in CALLS[name]:
        recorder.call(mask)
    columns = recorder.layer.seq_length
    if removed > columns:
        with pytest.raises(ValueError, match=rf"crop\(-{removed}\) removes more than the {columns} tokens"):
            recorder.layer.crop(-removed)
        recorder.check()
        return
    lengths = recorder.layer.lengths.tolist()
    recorder.crop(removed)
    recorder.check()
    assert recorder.layer.seq_length == columns - removed
    real = torch.cat([torch.tensor(mask) for mask in CALLS[name]], dim=1)[:, : columns - removed].sum(dim=1).tolist()
    assert recorder.layer.lengths.tolist() == real
    assert recorder.undone == ([(lengths, real)] if removed else [])
    # The crop deletes the recorded inputs; later inputs are recorded again.
    assert recorder.layer.data("tail").shape[1] == TAIL
    recorder.call(ones(2, 3))
    recorder.crop(2)
    recorder.call([[1, 0], [1, 1]])
    recorder.check()


@pytest.mark.parametrize("removed", [torch.tensor(-2), torch.tensor([-2])])
def test_crop_accepts_a_tensor(removed):
    recorder = Recorder(1)
    recorder.layer.activate_past_recording()
    recorder.call(ones(1, 6))
    recorder.layer.crop(removed)
    assert recorder.layer.get_seq_length() == recorder.layer.aligned == 4
    assert type(recorder.layer.aligned) is type(recorder.layer.get_seq_length()) is int


def test_crop_of_an_unused_layer_does_nothing():
    layer = FlowCacheLayer()
    layer.crop(0)
    layer.crop(-3)
    assert layer.get_seq_length() == 0


def test_refused_crop_changes_nothing():
    recorder = Recorder(2)
    recorder.call(ones(2, 9))
    with pytest.raises(ValueError, match=r"crop\(-10\).*9 tokens"):
        recorder.layer.crop(-10)
    # The rolling state was not recorded: no other state may have been cropped before the error.
    with pytest.raises(ValueError, match=r"at most 0 tokens from this cache, not 1: .*activate_past_recording"):
        recorder.layer.crop(-1)
    assert recorder.undone == [] and recorder.layer.seq_length == 9
    recorder.check()
    recorder.call(ones(2, 1))
    recorder.check()


def test_a_positive_crop_keeps_this_number_of_columns():
    recorder, other = Recorder(2), Recorder(2)
    for each in (recorder, other):
        each.layer.activate_past_recording()
        each.call(ones(2, 9))
    recorder.layer.crop(7)
    recorder.layer.crop(12)
    other.layer.crop(-2)
    assert recorder.layer.get_seq_length() == other.layer.get_seq_length() == 7
    for name, state in other.layer.states.items():
        assert torch.equal(recorder.layer.states[name].data, state.data)


def test_a_short_row_needs_no_recording():
    recorder = Recorder(2)
    recorder.call([[1, 1, 1], [0, 1, 0]])
    recorder.crop(2)
    recorder.check()
    assert recorder.layer.lengths.tolist() == [1, 0]


def test_rolling_state_of_size_zero_needs_no_recording():
    layer = FlowCacheLayer()
    layer.start_forward(1, 5, CPU)
    layer.set_layout(make_row_layout(1, 5, CPU))
    history = layer.roll("tail", torch.ones(1, 5, 2), 0)
    assert history.shape == (1, 5, 2)
    layer.finish_forward()
    layer.crop(-3)
    assert layer.get_seq_length() == 2 and layer.data("tail").shape == (1, 0, 2)


def test_replaced_state_is_selected_and_cannot_be_cropped():
    recorder = Recorder(2)
    recorder.layer.activate_past_recording()
    recorder.call(ones(2, 3))
    recorder.layer.states["fixed"] = ReplaceState(torch.tensor([[1.0], [2.0]]))
    with pytest.raises(ValueError, match="cannot be cropped"):
        recorder.layer.crop(-1)
    recorder.check()
    recorder.layer.batch_select_indices(torch.tensor([1]))
    assert recorder.layer.data("fixed").tolist() == [[2.0]]


# Rows and devices


def ragged():
    recorder = Recorder(2)
    for mask in CALLS["left"]:
        recorder.call(mask)
    return recorder


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda layer: layer.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ],
)
def test_rows_move_with_all_their_state(change, rows):
    recorder = ragged()
    for name in ("index", "index_entries"):
        data = recorder.layer.data(name)
        data.copy_(torch.tensor([1.0, 2.0]).view(2, *[1] * (data.dim() - 1)).expand_as(data))
    mask = recorder.layer.mask
    change(recorder.layer)
    recorder.rows = [list(recorder.rows[row]) for row in rows]
    recorder.check()
    for name in ("index", "index_entries"):
        assert recorder.layer.data(name).flatten(1)[:, 0].tolist() == [row + 1 for row in rows]
    assert torch.equal(recorder.layer.mask, mask[rows])
    assert recorder.layer.batch_size == len(rows)


def test_changes_to_an_unused_layer_do_nothing():
    layer = FlowCacheLayer()
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(3)
    layer.offload()
    layer.prefetch()
    assert layer.get_seq_length() == 0


def test_reset_keeps_recording():
    recorder = ragged()
    recorder.layer.activate_past_recording()
    recorder.layer.reset()
    assert recorder.layer.get_seq_length() == 0 and recorder.layer.states == {} and recorder.layer.mask is None
    recorder.rows = [[], [], []]
    recorder.call(ones(3, 5))
    recorder.crop(4)
    recorder.check()


def test_offload_and_prefetch_move_every_tensor():
    layer = ragged().layer
    layer.device = torch.device("meta")
    layer.prefetch()
    assert all(state.data.device.type == "meta" for state in layer.states.values())
    recorder = ragged()
    recorder.layer.offload()
    recorder.layer.prefetch()
    recorder.check()


def test_a_copy_is_independent():
    recorder = ragged()
    copied = copy.deepcopy(recorder.layer)
    recorder.call(ones(2, 4))
    assert copied.get_seq_length() == 9
    recorder.layer, recorder.rows = copied, [entities[:-4] for entities in recorder.rows]
    recorder.check()


# Errors


def test_another_batch_is_refused():
    recorder = ragged()
    with pytest.raises(ValueError, match=r"holds 2 rows and the input has 3.*batch_repeat_interleave"):
        recorder.layer.start_forward(3, 1, CPU)
    recorder.check()


def test_the_batch_of_an_unused_layer_is_unknown():
    with pytest.raises(AttributeError, match="first call"):
        _ = FlowCacheLayer().batch_size


def test_other_models_cannot_use_the_layer():
    key = torch.zeros(1, 1, 1, 1)
    for store in (FlowCacheLayer().update, FlowCacheLayer().lazy_initialization):
        with pytest.raises(ValueError, match="flow model"):
            store(key, key)


LLAMA = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)


@pytest.mark.parametrize(
    "cache",
    [
        DynamicCache(),
        DynamicCache(config=LLAMA),
        EncoderDecoderCache(DynamicCache(), DynamicCache()),
        ((torch.zeros(1), torch.zeros(1)),),
        DynamicCache(config=DFNConfig(num_hidden_layers=1)),
    ],
)
def test_unsuitable_caches_are_refused(cache):
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        state_layers(cache, 2)


def test_state_layers_of_a_suitable_cache():
    cache = DynamicCache(config=DFNConfig(num_hidden_layers=2))
    assert state_layers(cache, 2) == cache.layers
