"""A static cache equals a growing one, and its tensors keep their addresses."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from dfn_hf.modeling.dfn import attention as dfn_attention
from tests.support.families import draw_ids, draw_model
from tests.support.small_models import make_small_model

SEEDS = (0, 1, 3, 4, 5, 11)  # every norm, both searches, memory and none
STRICT = {"atol": 1e-9, "rtol": 0}
PROMPT_MASK = torch.tensor([[0] * 5 + [1] * 15, [1] * 20])
MASKS = {
    "none": None,
    "left": torch.cat([PROMPT_MASK, torch.ones(2, 20, dtype=torch.int64)], dim=1),
    "holes": torch.tensor([[0, 1, 1, 0] * 10, [1] * 17 + [0, 0, 0] + [1] * 19 + [0]]),
}
CALLS = (3, 17, 1, 1, 7, 1, 1, 1, 5, 1, 1, 1)  # 40 columns


@pytest.fixture(params=["as on a CPU", "as on a GPU or compiled"], autouse=True)
def form(request, monkeypatch):
    """Run decode steps both in C, as on a CPU, and in torch operations of fixed shape, as on a GPU."""
    if request.param == "as on a GPU or compiled":
        monkeypatch.setattr(
            dfn_attention,
            "is_decode_step",
            lambda state, x: state is not None and state.is_compileable and x.shape[2] == 1,
        )
    return request.param


def run(model, cache, ids, mask=None, calls=CALLS, **options):
    """Return the outputs for `ids` `[batch, columns]`, call by call."""
    outputs, place = [], 0
    for length in calls:
        columns = slice(place, place + length)
        call_mask = None if mask is None else mask[:, columns]
        with torch.no_grad():
            outputs.append(model(ids[:, columns], attention_mask=call_mask, past_key_values=cache, **options))
        place += length
    return outputs


def logits_of(outputs):
    return torch.cat([output.logits for output in outputs], dim=1)


def tensors_of(cache):
    tensors = []
    for layer in cache.layers:
        tensors += [layer.lengths, layer.seen, *(state.data for state in layer.states.values())]
    return tensors


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_logits_neighbors_and_weights(seed, mask):
    model, ids, mask = draw_model("dfn", seed), draw_ids(2, 40, seed), MASKS[mask]
    shown = {"output_attentions": True, "output_entities": True}
    growing = run(model, DynamicCache(config=model.config), ids, mask, **shown)
    fixed = run(model, StaticCache(config=model.config, max_cache_len=40), ids, mask, **shown)
    for expected, outputs in zip(growing, fixed, strict=True):
        assert torch.allclose(outputs.logits, expected.logits, **STRICT)
        for layer in range(model.config.num_hidden_layers):
            assert torch.equal(outputs.entities[layer].neighbors, expected.entities[layer].neighbors)
            assert torch.allclose(outputs.attentions[layer], expected.attentions[layer], **STRICT)


@pytest.mark.parametrize("prompt", [None, PROMPT_MASK])
@pytest.mark.parametrize("seed", SEEDS)
def test_generated_tokens(seed, prompt):
    model, ids = draw_model("dfn", seed), draw_ids(2, 20, seed)
    options = {"attention_mask": prompt, "max_new_tokens": 12, "pad_token_id": 0}
    modes = (
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prefill_chunk_size": 6},
    )
    for mode in modes:
        tokens = []
        for implementation in ("dynamic", "static"):
            torch.manual_seed(seed)
            tokens.append(model.generate(ids, cache_implementation=implementation, **options, **mode))
        assert torch.equal(*tokens), mode


def test_tensors_keep_shape_and_address():
    model, ids = draw_model("dfn", 11), draw_ids(2, 40, 5)
    cache = StaticCache(config=model.config, max_cache_len=50)
    run(model, cache, ids, calls=(3,))
    names = list(cache.layers[0].states)
    places = [(tensor.data_ptr(), tensor.shape) for tensor in tensors_of(cache)]
    run(model, cache, ids, calls=CALLS[1:])
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    assert names == list(cache.layers[0].states)
    assert places == [(tensor.data_ptr(), tensor.shape) for tensor in tensors_of(cache)]


@pytest.mark.parametrize("seed", SEEDS)
def test_reset(seed):
    model, ids = draw_model("dfn", seed), draw_ids(2, 40, seed)
    cache = StaticCache(config=model.config, max_cache_len=40)
    run(model, cache, draw_ids(2, 40, seed + 1), MASKS["holes"])
    assert cache.get_seq_length() == 40
    cache.reset()
    assert cache.get_seq_length() == 0
    expected = run(model, DynamicCache(config=model.config), ids)
    assert torch.allclose(logits_of(run(model, cache, ids)), logits_of(expected), **STRICT)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_move_with_all_their_state(seed):
    model, ids, more = draw_model("dfn", seed), draw_ids(3, 20, seed), draw_ids(3, 6, seed + 1)
    mask = torch.cat([PROMPT_MASK, PROMPT_MASK[:1].flip(1)])
    order = torch.tensor([2, 0, 0])
    logits = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=26)):
        run(model, cache, ids, mask, calls=(20,))
        cache.reorder_cache(order)
        logits.append(logits_of(run(model, cache, more, torch.ones_like(more), calls=[1] * 6)))
    assert torch.allclose(*logits, **STRICT)


@pytest.mark.parametrize("overrides", [{"num_neighbors": 0}, {"conv_kernel": 1}, {"local_window": 1}])
def test_disabled_mechanisms(overrides):
    model, ids = draw_model("dfn", 11, **overrides), draw_ids(2, 40, 5)
    expected = run(model, DynamicCache(config=model.config), ids, MASKS["holes"])
    fixed = run(model, StaticCache(config=model.config, max_cache_len=40), ids, MASKS["holes"])
    assert torch.allclose(logits_of(fixed), logits_of(expected), **STRICT)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients(seed):
    model, ids = draw_model("dfn", seed), draw_ids(2, 21, seed)
    results = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=21)):
        run(model, cache, ids, calls=(20,))
        model.zero_grad()
        model(ids[:, 20:], past_key_values=cache).logits.square().sum().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for expected, gradient in zip(*results, strict=True):
        assert (gradient is None) == (expected is None)
        assert gradient is None or torch.allclose(gradient, expected, atol=1e-9, rtol=1e-9)


def test_too_many_tokens_are_refused():
    model, ids = draw_model("dfn", 11), draw_ids(2, 40, 5)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(ValueError, match=r"max_cache_len is 20.*0 tokens and 21 more"):
        run(model, cache, ids, calls=(21,))
    expected = logits_of(run(model, cache, ids, calls=(18, 1)))
    with pytest.raises(ValueError, match=r"max_cache_len is 20.*19 tokens and 2 more"):
        model(ids[:, :2], past_key_values=cache)
    cache.reset()
    assert torch.equal(logits_of(run(model, cache, ids, calls=(18, 1, 1)))[:, :19], expected)


def test_unsupported_operations_are_refused():
    model = draw_model("dfn", 11)
    cache = StaticCache(config=model.config, max_cache_len=20)
    run(model, cache, draw_ids(2, 8, 5), calls=(8,))
    for change in (
        lambda: cache.crop(-1),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
        lambda: cache.layers[0].offload(),
    ):
        with pytest.raises(ValueError, match=r"fixed shape.*DynamicCache\(config=model.config\)"):
            change()
    with pytest.raises(ValueError, match="holds 2 rows and the input has 3"):
        model(draw_ids(3, 1, 5), past_key_values=cache)


@pytest.mark.parametrize("family", ["dfn-adaptive", "flownetwork", "liquid"])
def test_models_with_growing_state_are_refused(family):
    model, ids = make_small_model(family), torch.randint(3, 50, (1, 4))
    with pytest.raises(ValueError, match=r"'static' cannot hold.*\"dynamic\""):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match=r"StaticCache.*DynamicCache\(config=model.config\)"):
        model(ids, past_key_values=cache, **({"decoder_input_ids": ids} if family == "liquid" else {}))
