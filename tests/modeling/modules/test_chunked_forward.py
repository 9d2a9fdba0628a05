"""A forward pass in chunks equals one over whole rows: outputs, gradients, metrics and cache."""

import pytest
import torch
from transformers import DynamicCache

from dfn_hf import FlowNetworkConfig, FlowNetworkForCausalLM
from dfn_hf.modeling.modules.chunked_forward import forward_chunk_length

LENGTH = 61
EXACT = {"rtol": 0, "atol": 1e-11}
WHOLE = LENGTH


def make_model(**options) -> FlowNetworkForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_memory_heads": 2,
        "intermediate_size": 32,
        "flow_window": 9,
        "min_flow_window": 2,
        "memory_chunk": 6,
        "memory_size": 3,
        "initializer_range": 0.7,
    }
    return FlowNetworkForCausalLM(FlowNetworkConfig(**{**sizes, **options})).double().eval()


def set_forward_chunks(model, length: int) -> None:
    for layer in model.model.layers:
        layer.forward_chunk_length = length


def draw_input(padded: bool):
    ids = torch.randint(0, 50, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :20] = 0
        mask[1, 40:] = 0
        mask[2, 5:50] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


VARIANTS = [{}, {"memory_size": 0}, {"flow_window": 1, "min_flow_window": 1}, {"flow_window": 40}]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [6, 12, 30, 60])
def test_outputs_gradients_and_metrics(options, padded, size):
    model = make_model(**options)
    inputs = draw_input(padded)
    found = {}
    for length in (WHOLE, size):
        set_forward_chunks(model, length)
        model.zero_grad()
        outputs = model(**inputs, use_cache=False)
        outputs.loss.backward()
        found[length] = outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    (whole, whole_gradients), (chunked, gradients) = found[WHOLE], found[size]
    assert torch.allclose(chunked.logits, whole.logits, **EXACT)
    assert gradients.keys() == whole_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, whole_gradients[name], **EXACT), name
    for name, value in whole.metrics.items():
        assert torch.allclose(chunked.metrics[name], value, rtol=1e-6, atol=0), name


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [6, 30])
@torch.no_grad()
def test_cache_filled_in_chunks(options, padded, size):
    model = make_model(**options)
    inputs = draw_input(padded)
    more = torch.randint(0, 50, (3, 70), generator=torch.Generator().manual_seed(2))
    logits = {}
    for length in (WHOLE, size):
        set_forward_chunks(model, length)
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        first = model(**inputs, past_key_values=cache).logits
        assert cache.get_seq_length() == LENGTH
        cache.crop(-4)
        second = model(more, past_key_values=cache).logits  # continues in the middle of a memory chunk
        assert cache.get_seq_length() == LENGTH - 4 + 70
        logits[length] = torch.cat([first, second], dim=1)
    assert torch.allclose(logits[size], logits[WHOLE], **EXACT)


def test_packed_rows_and_training_with_a_cache_are_not_chunked():
    model = make_model()
    inputs = draw_input(padded=False)
    segments = torch.arange(LENGTH).div(25, rounding_mode="floor").expand(3, -1)
    set_forward_chunks(model, WHOLE)
    packed = model(inputs["input_ids"], segment_ids=segments).logits
    model(**inputs, past_key_values=DynamicCache(config=model.config)).loss.backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    set_forward_chunks(model, 6)
    assert torch.equal(model(inputs["input_ids"], segment_ids=segments).logits, packed)
    model(**inputs, past_key_values=DynamicCache(config=model.config)).loss.backward()
    assert torch.equal(model.model.embed_tokens.weight.grad, gradient)


def test_checkpointed_gradients_are_the_same():
    model = make_model().train()
    inputs = draw_input(padded=True)
    set_forward_chunks(model, 12)
    model(**inputs, use_cache=False).loss.backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs, use_cache=False).loss.backward()
    assert torch.allclose(model.model.embed_tokens.weight.grad, gradient, **EXACT)


def test_forward_chunk_length():
    assert forward_chunk_length(64, block=127) == 4032
    assert forward_chunk_length(7, block=40) % 7 == 0
    assert forward_chunk_length(10_000, block=127) == 10_000
    assert forward_chunk_length(64, block=10_000) == 64


def test_chunked_forward_compiles_into_one_graph():
    model = make_model().float()
    set_forward_chunks(model, 30)
    inputs = {"input_ids": draw_input(padded=False)["input_ids"], "use_cache": False}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
