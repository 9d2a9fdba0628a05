"""Caches that are filled under `torch.inference_mode` and used outside of it."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.support.families import FAMILIES, draw_ids, draw_model

STRICT = {"atol": 1e-9, "rtol": 0}


def filled_cache(model, ids, make, sizes):
    cache = make(model)
    with torch.inference_mode():
        for piece in ids.split(sizes, dim=1):
            model(piece, past_key_values=cache)
    return cache


def dynamic(model):
    return DynamicCache(config=model.config)


def static(model):
    return StaticCache(config=model.config, max_cache_len=60)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_continue_after_inference_mode(family, with_gradient):
    model, ids = draw_model(family, 3), draw_ids(2, 45, 0)
    cache = filled_cache(model, ids[:, :30], dynamic, [10, 1, 19])
    with torch.set_grad_enabled(with_gradient):
        found = model(ids[:, 30:], past_key_values=cache).logits
        if with_gradient:
            found.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(found.detach(), model(ids).logits[:, 30:], **STRICT)


@pytest.mark.parametrize("family", FAMILIES)
def test_change_a_cache_after_inference_mode(family):
    model, ids = draw_model(family, 3), draw_ids(2, 45, 0)
    cache = dynamic(model)
    cache.activate_past_recording()
    with torch.inference_mode():
        model(ids[:, :38], past_key_values=cache)
    cache.crop(-8)
    cache.batch_select_indices(torch.tensor([1, 0]))
    with torch.no_grad():
        found = model(ids[[1, 0], 30:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids[[1, 0]]).logits[:, 30:], **STRICT)


def test_static_cache_after_inference_mode():
    model, ids = draw_model("dfn", 3), draw_ids(2, 45, 0)
    cache = filled_cache(model, ids[:, :30], static, [30])
    with torch.no_grad():
        found = model(ids[:, 30:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids).logits[:, 30:], **STRICT)
        cache = filled_cache(model, ids[:, :30], static, [30])
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, **STRICT)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_from_a_cache_of_inference_mode(family):
    model, ids = draw_model(family, 3), draw_ids(1, 40, 0)
    model.generation_config.eos_token_id = None
    cache = filled_cache(model, ids[:, :30], dynamic, [10, 10, 10])
    found = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(found, model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
