"""Flow attention and its recomputed backward pass against a loop over the equation."""

import pytest
import torch

from dfn_hf.modeling.ops import flow_attention_torch
from dfn_hf.modeling.ops.flow_attention import flow_attention, flow_attention_reference, flow_weights
from dfn_hf.modeling.ops.kernels import flow_attention_cpu
from dfn_hf.modeling.ops.kernels.flow_attention_cpu import attention_library

STRICT = {"atol": 1e-11, "rtol": 1e-11}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def draw_inputs(
    seed, *, batch=2, heads=2, length=13, past=(0, 0), window=4, num_neighbors=3, features=3, room=0, share=0.7
):
    """Draw arguments of `flow_attention` in float64.

    Args:
        past: number of entities before this call, per row.
        features: features of the values.
        room: entries of the storage after the last entity.
        share: fraction of the neighbours that exist; the others are −1.
    """
    generator = torch.Generator().manual_seed(seed)
    past = torch.tensor(past)
    index = past[:, None] + torch.arange(length)
    stored = int(past.max()) + length + room

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # Every row has segments; no query attends past its segment's start.
    reach = torch.minimum(index, index % 11 + 4 * window)
    neighbors = torch.full((batch, heads, length, num_neighbors), -1)
    for row in range(batch):
        for head in range(heads):
            for a in range(length):
                i = int(index[row, a])
                far = list(range(i - int(reach[row, a]), i - window + 1))
                order = torch.randperm(len(far), generator=generator)[: int(share * num_neighbors + 0.5)]
                neighbors[row, head, a, : len(order)] = torch.tensor([far[j] for j in order], dtype=torch.int64)
    return {
        "query": randn(batch, heads, length, 5),
        "key": randn(batch, heads, stored, 5),
        "value": randn(batch, heads, stored, features),
        "decay": randn(heads).exp(),
        "query_index": index,
        "reach": reach,
        "neighbors": neighbors,
        "window": window,
    }


CASES = {
    "plain": {},
    "one row, one head": {"batch": 1, "heads": 1, "past": (0,), "length": 29},
    "one entity": {"length": 1},
    "one step": {"length": 1, "past": (9, 30)},
    "window 1": {"window": 1},
    "window longer than the row": {"window": 40},
    "no neighbours": {"num_neighbors": 0},
    "no neighbours found": {"share": 0.0, "past": (3, 3)},
    "past": {"past": (17, 17), "room": 6},
    "ragged past": {"past": (0, 23), "room": 3, "window": 5},
    "odd sizes": {"batch": 3, "heads": 3, "past": (1, 0, 7), "length": 37, "window": 7, "num_neighbors": 6},
    "values of several vectors": {"features": 131},
    "many queries": {"batch": 1, "heads": 1, "past": (3,), "length": 530, "window": 18},
    "several chunks": {"batch": 1, "past": (2,), "length": 150, "window": 3},
    "several chunks, wide window": {"batch": 1, "past": (0,), "length": 131, "window": 70, "num_neighbors": 2},
}


@pytest.fixture(params=CASES)
def inputs(request, monkeypatch):
    monkeypatch.setattr(flow_attention_torch, "ELEMENT_CHUNK", 1)  # chunks of the minimum length, 64 queries
    return draw_inputs(7, **CASES[request.param])


DIFFERENTIABLE = ("query", "key", "value", "decay")


def outputs_and_gradients(attend, inputs, **dtypes):
    """Return y, the log-sum-exp and the gradients of a random function of both, all float64."""
    inputs = dict(inputs)
    for name in DIFFERENTIABLE:
        inputs[name] = inputs[name].to(dtypes.get(name), copy=True).requires_grad_()
    y, lse = attend(**inputs)
    generator = torch.Generator().manual_seed(0)
    scored = sum((x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in (y, lse))
    gradients = torch.autograd.grad(scored, [inputs[name] for name in DIFFERENTIABLE])
    assert all(gradient.dtype == inputs[name].dtype for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True))
    return {"y": y.detach().double(), "lse": lse.detach().double()} | {
        name: gradient.double() for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True)
    }


def test_equals_the_loop(inputs):
    found = outputs_and_gradients(flow_attention, inputs)
    expected = outputs_and_gradients(flow_attention_reference, inputs)
    for name in expected:
        assert torch.allclose(found[name], expected[name], **STRICT), name


C_FORMS = {"default": (), "without AVX-512": ("-U__AVX512F__",)}


@pytest.mark.parametrize("value_dtype", TOLERANCE)
@pytest.mark.parametrize("form", ["torch", *C_FORMS])
def test_equals_the_loop_in_lower_precision(inputs, value_dtype, form, monkeypatch):
    monkeypatch.setenv("DFN_HF_KERNELS", "0" if form == "torch" else "1")
    monkeypatch.setattr(
        flow_attention_cpu, "ATTENTION_FLAGS", (*flow_attention_cpu.ATTENTION_FLAGS, *C_FORMS.get(form, ()))
    )
    runs_in_c = attention_library(torch.ones(1), torch.ones(1, dtype=value_dtype)) is not None
    assert runs_in_c == (form != "torch" and value_dtype == torch.float32)
    dtypes = dict.fromkeys(DIFFERENTIABLE, torch.float32) | {"value": value_dtype}
    rounded = inputs | {name: inputs[name].to(dtypes[name]).double() for name in DIFFERENTIABLE}
    found = outputs_and_gradients(flow_attention, rounded, **dtypes)
    expected = outputs_and_gradients(flow_attention_reference, rounded)
    for name in expected:
        scale = expected[name].abs().max().clamp(min=1)
        assert (found[name] - expected[name]).abs().max() <= TOLERANCE[value_dtype] * scale, name


def test_dtypes_of_the_outputs():
    inputs = draw_inputs(0)
    inputs |= {name: inputs[name].float() for name in ("query", "key", "decay")}
    y, lse = flow_attention(**inputs | {"value": inputs["value"].bfloat16()})
    assert y.dtype == torch.bfloat16 and lse.dtype == torch.float32


def test_chunk_size_does_not_matter(monkeypatch):
    inputs = draw_inputs(3, batch=1, past=(5,), length=200, window=9)
    whole = outputs_and_gradients(flow_attention, inputs)
    monkeypatch.setattr(flow_attention_torch, "ELEMENT_CHUNK", 1)
    in_chunks = outputs_and_gradients(flow_attention, inputs)
    for name in whole:
        assert torch.allclose(in_chunks[name], whole[name], **STRICT), name


def test_flow_weights_reproduce_the_output(inputs):
    arguments = {name: value for name, value in inputs.items() if name != "value"}
    weights = flow_weights(**arguments, ahead=torch.zeros_like(arguments["reach"]))
    assert torch.allclose(weights.sum(dim=-1), torch.ones_like(weights[..., 0]), **STRICT)
    y, _ = flow_attention(**inputs)
    assert torch.allclose(weights @ inputs["value"], y, **STRICT)
    # Exactly the neighbours and the visible entities of the window have a weight.
    local = inputs["reach"].clamp(max=inputs["window"] - 1) + 1
    expected = local[:, None] + (inputs["neighbors"] >= 0).sum(dim=-1)
    assert torch.equal((weights > 0).sum(dim=-1), expected)


def test_entries_after_the_last_entity_are_not_read():
    inputs = draw_inputs(1, past=(0, 6), room=4)
    outputs = outputs_and_gradients(flow_attention, inputs)
    for row, stored in enumerate((inputs["query_index"][:, -1] + 1).tolist()):
        inputs["key"][row, :, stored:] = inputs["value"][row, :, stored:] = 1e6
        assert not outputs["key"][row, :, stored:].any() and not outputs["value"][row, :, stored:].any()
    assert torch.equal(outputs_and_gradients(flow_attention, inputs)["y"], outputs["y"])


def test_large_logits_stay_finite():
    inputs = draw_inputs(2)
    inputs["query"] = 1e3 * inputs["query"]
    outputs = outputs_and_gradients(flow_attention, inputs, **dict.fromkeys(DIFFERENTIABLE, torch.float32))
    assert all(value.isfinite().all() for value in outputs.values())


def test_autocast_has_no_effect():
    inputs = draw_inputs(4)
    inputs |= {name: inputs[name].float() for name in DIFFERENTIABLE}
    expected = outputs_and_gradients(flow_attention, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_gradients(flow_attention, inputs)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# Dropout


def dropped(inputs, seed, dropout=0.4):
    torch.manual_seed(seed)
    return flow_attention(**inputs, dropout=dropout)


def test_dropout_follows_the_global_seed(inputs):
    y, lse = dropped(inputs, 0)
    again, _ = dropped(inputs, 0)
    other, _ = dropped(inputs, 1)
    assert torch.equal(y, again) and not torch.equal(y, other)
    undropped = flow_attention(**inputs)
    assert torch.equal(lse, undropped[1])


def test_dropout_keeps_the_expectation():
    inputs = draw_inputs(6, length=9)
    y = torch.stack([dropped(inputs, seed)[0] for seed in range(600)])
    error = (y.mean(dim=0) - flow_attention(**inputs)[0]).abs() / (y.std(dim=0) / 600**0.5)
    assert error.max() < 5


def test_dropout_is_the_same_in_the_backward_pass(inputs):
    # y is linear in the values, so y · g equals value · grad_value if both passes drop the same weights.
    value = inputs["value"].requires_grad_()
    y, _ = dropped(inputs, 3)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    (y * g).sum().backward()
    assert torch.allclose((value * value.grad).sum(), (y * g).sum(), **STRICT)


# Memory


def saved_elements(length):
    inputs = draw_inputs(8, batch=1, heads=1, past=(0,), length=length, window=8)
    inputs["query"].requires_grad_()
    inputs["value"].requires_grad_()
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        flow_attention(**inputs)
    return sizes


def test_saved_memory_is_linear_in_the_length():
    short, long = saved_elements(300), saved_elements(600)
    assert sum(long) <= 2 * sum(short)
    inputs_elements = 600 * (5 + 5 + 3) + 607 * (5 + 3) + 1 + 600 * (1 + 1 + 3)
    assert sum(long) <= inputs_elements
