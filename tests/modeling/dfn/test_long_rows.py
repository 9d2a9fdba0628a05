"""Guarantees of the neighbour search in rows long enough for the box tree. Short rows: tests/invariants."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from dfn_hf import DFNModel
from dfn_hf.modeling.dfn import attention as dfn_attention
from dfn_hf.modeling.ops.box_tree import BLOCK, RECENT, index_layout, index_shapes
from tests.modeling.dfn.test_bidirectional import draw as draw_bidirectional
from tests.support.families import VOCABULARY, draw_ids, draw_model
from tests.support.marks import first_quickly

STRICT = {"atol": 1e-9, "rtol": 0}
WINDOW = 5
FIRST = RECENT + BLOCK + WINDOW - 1  # the first query that reads the tree
LENGTH = FIRST + 2 * BLOCK
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "local_window": WINDOW, "num_neighbors": 5,
    "num_leaves": 1, "position_dim": 4, "memory_slots": 0, "moved_query": True, "flow_norm": "entity",
    "flow_step": 1.0, "conv_kernel": 3, "carry_positions": False,
}  # fmt: skip
# Spans of at most 2 bytes: about 3 entities in 4 bytes.
ADAPTIVE = {"entity_sampling": "adaptive", "entity_rate": 0.6, "max_entity_length": 2, "readout_window": 1}
searches = pytest.mark.parametrize("search", first_quickly(["tree", "exact"]))
samplings = pytest.mark.parametrize("sampling", ["token", "adaptive"])


@pytest.fixture(params=["1", "0"], ids=["C", "torch"])
def kernels(request, monkeypatch):
    """Search in C, and in torch operations."""
    monkeypatch.setenv("DFN_HF_KERNELS", request.param)


def make(sampling, search):
    if sampling == "token":
        return draw_model("dfn", 3, search_implementation=search, **SMALL)
    return draw_model("dfn-adaptive", 3, search_implementation=search, **SMALL | ADAPTIVE)


def draw_row_ids(sampling, batch=1, seed=0):
    """Ids of rows with at least `LENGTH` entities."""
    return draw_ids(batch, LENGTH if sampling == "token" else 2 * LENGTH, seed)


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


def run(model, cache, ids, mask=None, start=0):
    """Logits of `ids` `[batch, columns]`, the columns from `start` on of rows whose mask is `mask`."""
    with torch.no_grad():
        mask = None if mask is None else mask[:, : start + ids.shape[1]]
        return model(ids, attention_mask=mask, past_key_values=cache).logits


def in_pieces(model, cache, ids, sizes, mask=None):
    pieces, start = [], 0
    for size in sizes:
        pieces.append(run(model, cache, ids[:, start : start + size], mask, start))
        start += size
    assert start == ids.shape[1]
    return torch.cat(pieces, dim=1)


def entered(cache):
    """Entities in the box tree of each layer that searches, row and head, `[layers, B, H]`."""
    held = [layer.data("tree_counters") for layer in cache.layers]
    return torch.stack([counters[..., 0] for counters in held if counters is not None])


def neighbors_of(model, ids):
    with torch.no_grad():
        return [layer.neighbors for layer in model(ids, output_entities=True, use_cache=False).entities]


def test_the_tree_is_read_after_the_recent_entities():
    model = make("token", "tree")
    ids = draw_row_ids("token")
    exact = neighbors_of(make("token", "exact"), ids)
    found = neighbors_of(model, ids)
    # Later layers have other positions where the first found other neighbours.
    assert torch.equal(found[0][:, :, :FIRST], exact[0][:, :, :FIRST])
    assert (found[0] != exact[0]).any()
    model.config.num_leaves = 2**10
    for ours, expected in zip(neighbors_of(model, ids), exact, strict=True):
        assert torch.equal(ours, expected)


@searches
@samplings
def test_chunks_and_steps_equal_one_call(sampling, search):
    model, ids = make(sampling, search), draw_row_ids(sampling, 2)
    whole, columns = logits_of(model, ids), ids.shape[1]
    steps = (columns - FIRST) // 8
    for sizes in ([700, columns - 700], [columns - steps, *[1] * steps], [1, 300, 7, columns - 1000, 600, 92]):
        cache = DynamicCache(config=model.config)
        assert torch.allclose(in_pieces(model, cache, ids, sizes), whole, **STRICT)
        assert search == "exact" or (entered(cache) >= BLOCK).all()


@searches
@samplings
def test_crops_leave_no_trace(sampling, search, kernels):
    model, ids, other = make(sampling, search), draw_row_ids(sampling, 2), draw_row_ids(sampling, 2, seed=1)
    whole = logits_of(model, ids)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    run(model, cache, torch.cat([ids[:, :-400], other[:, -400:]], dim=1))
    cache.crop(-400)
    assert torch.allclose(run(model, cache, ids[:, -400:-3]), whole[:, -400:-3], **STRICT)
    for draft in (2, 150, 1):
        run(model, cache, other[:, :draft])
        cache.crop(-draft)
    assert torch.allclose(run(model, cache, ids[:, -3:]), whole[:, -3:], **STRICT)


@pytest.mark.parametrize("removed", [1, 60, BLOCK + 50, LENGTH - 1])
def test_a_crop_changes_only_trees_with_removed_entities(removed, kernels):
    model, ids = make("token", "tree"), draw_row_ids("token", 2)
    mask = torch.ones_like(ids)
    mask[0, :200] = 0
    expected = logits_of(model, ids, attention_mask=mask)[:, -removed:]
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    run(model, cache, ids, mask)
    before = entered(cache)
    cache.crop(-removed)
    seen = cache.layers[0].lengths[:, None] - WINDOW + 1  # of the next query
    base = (seen - RECENT).clamp(min=0) // BLOCK * BLOCK
    after, kept = entered(cache), before <= base
    assert torch.equal(after[kept], before[kept]) and (after <= base).all()
    assert kept[0].any(dim=-1).tolist() == {1: [True, True], 60: [False, True]}.get(removed, [False, False])
    logits = run(model, cache, ids[:, -removed:], mask, LENGTH - removed)
    real = mask[:, -removed:].bool()
    assert torch.allclose(logits[real], expected[real], **STRICT)
    assert torch.equal(entered(cache), before)


@searches
@samplings
def test_packed_documents_equal_single_documents(sampling, search):
    model, ids = make(sampling, search), draw_row_ids(sampling)
    lengths = [40, ids.shape[1] - 1, 3, 30]
    ids = torch.cat([draw_ids(1, lengths[0], 5), ids[:, 1:], draw_ids(1, sum(lengths[2:]), 6)], dim=1)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    alone = torch.cat([logits_of(model, piece) for piece in ids.split(lengths, dim=1)], dim=1)
    assert torch.allclose(logits_of(model, ids, segment_ids=segments), alone, **STRICT)


@searches
@samplings
def test_padding_does_not_change_real_positions(sampling, search):
    model, ids = make(sampling, search), draw_row_ids(sampling, 3)
    columns = ids.shape[1]
    mask = torch.ones_like(ids)
    mask[0, : columns // 4] = 0
    mask[1, 5::11] = 0
    mask[2, -40:] = 0
    padded = logits_of(model, ids, attention_mask=mask)
    pieces = in_pieces(model, DynamicCache(config=model.config), ids, [columns - 150, 140, *[1] * 10], mask)
    for row in range(3):
        real = mask[row].bool()
        alone = logits_of(model, ids[row : row + 1, real])[0]
        assert torch.allclose(padded[row, real], alone, **STRICT)
        assert torch.allclose(pieces[row, real], alone, **STRICT)


@searches
@samplings
def test_rows_move_with_their_trees(sampling, search):
    model, ids = make(sampling, search), draw_row_ids(sampling, 2)
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    place = ids.shape[1] - BLOCK - 20
    expected = logits_of(model, ids, attention_mask=mask)[:, place:]
    changes = [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: [layer.offload() for layer in cache.layers], [0, 1]),
    ]
    for change, rows in changes:
        cache = DynamicCache(config=model.config)
        run(model, cache, ids[:, :place], mask)
        change(cache)
        logits = run(model, cache, ids[rows, place:], mask[rows], place)
        assert torch.allclose(logits, expected[rows], **STRICT)


def test_beams_with_and_without_cache():
    model, ids = make("token", "tree"), draw_row_ids("token", 2)[:, -FIRST - BLOCK + 3 :]  # a block enters
    options = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("fixed_shape", [False, True])
@searches
def test_static_cache(search, fixed_shape, monkeypatch):
    if fixed_shape:  # as on a GPU
        monkeypatch.setattr(dfn_attention, "is_decode_step", lambda state, x: x.shape[2] == 1)
    model, ids = make("token", search), draw_row_ids("token", 2)
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    whole = logits_of(model, ids, attention_mask=mask)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    sizes = [700, FIRST + BLOCK - 700, *[1] * BLOCK]
    for _ in range(2):
        pieces = in_pieces(model, cache, ids, sizes, mask)
        assert torch.allclose(pieces[mask.bool()], whole[mask.bool()], **STRICT)
        cache.reset()
        sizes = [LENGTH - 1, 1]


def test_the_search_may_change_with_a_filled_cache():
    model, ids = make("token", "tree"), draw_row_ids("token", 2)
    sizes = [ids.shape[1] - 300, 100, 100, 100]
    whole = {}
    for search in ("tree", "exact"):
        model.config.search_implementation = search
        whole[search] = neighbors_of_first_layer(model, ids)
    cache, start = DynamicCache(config=model.config), 0
    for size, search in zip(sizes, ("exact", "tree", "exact", "tree"), strict=True):
        model.config.search_implementation = search
        found = neighbors_of_first_layer(model, ids[:, start : start + size], cache)
        assert torch.equal(found, whole[search][:, :, start : start + size])
        start += size
    assert not torch.equal(whole["tree"], whole["exact"])


def neighbors_of_first_layer(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, output_entities=True).entities[0].neighbors


def test_a_cache_changes_its_layout(monkeypatch):
    model, ids = make("token", "tree"), draw_row_ids("token", 2)
    whole = logits_of(model, ids)
    cache, start = DynamicCache(config=model.config), 0
    for size, switch in ((LENGTH - 200, "1"), (60, "0"), (70, "1"), (70, "0")):
        monkeypatch.setenv("DFN_HF_KERNELS", switch)
        logits = run(model, cache, ids[:, start : start + size])
        assert torch.allclose(logits, whole[:, start : start + size], **STRICT)
        layout = index_layout(ids.device, model.config.position_dim)
        held = {name for name in cache.layers[0].states if name.startswith("tree_")}
        assert held == {f"tree_{name}" for name in index_shapes(layout, LENGTH, model.config.position_dim)}
        start += size


def test_short_rows_keep_no_leaves():
    model = make("token", "tree")
    cache = DynamicCache(config=model.config)
    run(model, cache, draw_ids(2, 500, 0))
    sizes = {name: state.data.numel() for name, state in cache.layers[0].states.items() if name.startswith("tree_")}
    assert sizes.pop("tree_counters") == 2 * 2 * 4 and not any(sizes.values())


@searches
def test_bidirectional_rows_are_independent(search):
    model = draw_bidirectional(3, DFNModel, search_implementation=search, **SMALL)
    ids = draw_row_ids("token", 2)
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).last_hidden_state
        for row in range(2):
            real = mask[row].bool()
            assert torch.allclose(padded[row, real], model(ids[row : row + 1, real]).last_hidden_state[0], **STRICT)


def test_a_million_values_of_one_place_are_searched():
    """All entities in one place: the tree keeps the latest ones."""
    model = make("token", "tree")
    ids = torch.full((1, LENGTH), VOCABULARY - 1)
    with torch.no_grad():
        model.model.layers[0].attention.entities.position_proj.weight.zero_()
        model.model.layers[0].attention.entities.flow_proj.weight.zero_()
    neighbors = neighbors_of(model, ids)[0]
    latest = torch.arange(LENGTH)[:, None] - WINDOW - torch.arange(5)
    assert torch.equal(neighbors[0, 0], torch.where(latest < 0, -1, latest))
