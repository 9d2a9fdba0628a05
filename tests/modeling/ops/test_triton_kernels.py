"""The Triton kernels against torch and a loop, on a GPU or else in Triton's interpreter."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from dfn_hf import DFNConfig, DFNForCausalLM
from dfn_hf.modeling.ops import box_tree, dispatch
from dfn_hf.modeling.ops.box_tree import BLOCK, RECENT, empty_tree_index
from dfn_hf.modeling.ops.box_tree_torch import search_tree_torch
from dfn_hf.modeling.ops.flow_attention import flow_attention, flow_attention_reference
from dfn_hf.modeling.ops.neighbor_search import search_tree
from tests.modeling.ops.test_box_tree import KINDS, WHOLE, draw_positions, random_splits, search_in_loops
from tests.modeling.ops.test_flow_attention import DIFFERENTIABLE, TOLERANCE, draw_inputs, outputs_and_gradients
from tests.support.tree_sizes import set_sizes

triton_launch = pytest.importorskip(
    "dfn_hf.modeling.ops.kernels.triton_launch", reason="Triton supports Linux only", exc_type=ImportError
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ATTENTION = ("flow_attention_forward_triton", "flow_attention_backward_triton")


@pytest.fixture
def launched(monkeypatch):
    """Send tensors of any device to the kernels; returns the names of the launched functions."""
    monkeypatch.setenv("DFN_HF_KERNELS", "0")  # the comparison runs in torch
    monkeypatch.setattr(dispatch, "triton_available", lambda device: True)
    names = []

    def observed(name, launch):
        def call(*arguments):
            names.append(name)
            return launch(*arguments)

        return call

    for name in ("search_tree_triton", *ATTENTION):
        monkeypatch.setattr(triton_launch, name, observed(name, getattr(triton_launch, name)))
    return names


# Search


def set_all_sizes(monkeypatch, **sizes):
    """Change constants of the box tree and of the launch."""
    set_sizes(monkeypatch, **{name: size for name, size in sizes.items() if hasattr(box_tree, name)})
    for name, size in sizes.items():
        if hasattr(triton_launch, name):
            monkeypatch.setattr(triton_launch, name, size)


@pytest.fixture
def small_trees(monkeypatch):
    set_all_sizes(monkeypatch, LEAF_SIZE=4, BLOCK=8, RECENT=12)


def assert_same(found, expected):
    assert [x.dtype for x in found] == [torch.int64, torch.int32]
    assert all(map(torch.equal, (x.cpu() for x in found), (x.cpu() for x in expected)))


def search_in_both(queries, keys, *sizes, reach=None, counts=None):
    """Return `search_tree` of whole rows in Triton, and in torch."""
    index = torch.arange(queries.shape[1]).expand(len(queries), -1)
    queries, keys, index, reach, counts = (
        None if x is None else x.to(DEVICE) for x in (queries, keys, index, reach, counts)
    )
    found = search_tree(queries, index, keys, *sizes, reach=reach, counts=counts)
    return found, search_tree_torch(queries, index, keys, *sizes, reach, counts, None)


@pytest.mark.parametrize("kind", KINDS)
def test_triton_equals_torch_and_the_loop(kind, launched, monkeypatch):
    choose = random.Random(kind).choice
    for case in range(3):
        sizes = {"LEAF_SIZE": choose([2, 4, 16]), "BLOCK": choose([4, 8, 16]), "RECENT": choose([4, 12, 20])}
        launch = {"CODES": choose([64, 1024]), "LOCATED_LEAVES": choose([4, 32]), "ENTITIES": choose([1, 8])}
        launch["PROGRAMS"] = choose([1, 4, 2048])
        set_all_sizes(monkeypatch, **sizes, **launch, SPARE_LEAVES=choose([0, 2, 256]))
        queries, keys = draw_positions(kind, (choose([1, 2]), choose([1, 9, 30, 45]), choose(range(1, 10))), seed=case)
        sizes = choose(range(1, 21)), choose(range(10)), choose(range(1, 13))
        found, expected = search_in_both(queries, keys, *sizes)
        assert_same(found, expected)
        assert_same(found, search_in_loops(queries, keys, *sizes))
    assert launched == ["search_tree_triton"] * 3


@pytest.mark.parametrize("num_queries", [5, 1])
def test_the_sizes_of_the_model(num_queries, launched):
    """The last queries of a row search, with an index that is three blocks behind."""
    length = RECENT + 3 * BLOCK
    queries, keys = (x.to(DEVICE) for x in draw_positions("clusters", (1, length, 4), seed=1))
    position, index = torch.arange(length, device=DEVICE)[None], empty_tree_index("flat", 1, length, 4, DEVICE)
    last = slice(length - num_queries, None)
    found = search_tree(queries[:, last], position[:, last], keys, 16, 0, 8, index=index)
    assert launched == ["search_tree_triton"] and index.counters[0, 0] == 3 * BLOCK
    assert_same(found, [x[:, last] for x in search_tree_torch(queries, position, keys, 16, 0, 8, *WHOLE)])


def test_segments_and_padding(small_trees, launched):
    lengths, counts = [[50, 1, 9], [3, 37]], torch.tensor([60, 40])
    queries, keys = draw_positions("clusters", (2, 64, 2), seed=2)
    reach = torch.stack([torch.cat([torch.arange(length) for length in (*row, 64 - sum(row))]) for row in lengths])
    found, expected = search_in_both(queries, keys, 5, 3, 2, reach=reach, counts=counts)
    assert_same(found, expected)
    found, expected = search_in_both(queries, keys, 5, 3, 2, counts=counts - 20)
    assert_same(found, expected)
    assert (found[0][1, 20:] == -1).all() and (found[0][1, 10:20] >= 0).any()
    assert launched[0] == "search_tree_triton"


class CallsInBoth:
    """Searches ragged rows call by call in Triton and in torch, each with its own trees."""

    def __init__(self, queries, keys, *sizes):
        self.queries, self.keys, self.sizes = queries.to(DEVICE), keys.to(DEVICE), sizes
        rows, length, position_dim = keys.shape
        self.indices = [empty_tree_index("flat", rows, length, position_dim, DEVICE) for _ in range(2)]
        self.past = torch.zeros(rows, dtype=torch.int64, device=DEVICE)

    def append(self, counts):
        counts = counts.to(DEVICE)
        index = self.past[:, None] + torch.arange(int(counts.max()), device=DEVICE)
        place = index.clamp(max=self.queries.shape[1] - 1)[..., None].expand(-1, -1, self.queries.shape[-1])
        arguments = self.queries.gather(1, place), index, self.keys, *self.sizes
        in_triton, in_torch = self.indices
        found = search_tree(*arguments, reach=index, counts=counts, index=in_triton)
        assert_same(found, search_tree_torch(*arguments, None, counts, in_torch))
        assert torch.equal(in_triton.counters, in_torch.counters)
        self.past = self.past + counts

    def crop(self, lengths):
        self.past = torch.minimum(self.past, lengths.to(DEVICE))
        base = box_tree.tree_base(self.past - self.sizes[1] + 1)
        for index in self.indices:
            index.counters[index.counters[:, 0] > base] = 0


@pytest.mark.parametrize("kind", ["clusters", "walk"])
def test_steps_and_chunks_equal_torch(kind, small_trees, launched):
    calls = CallsInBoth(*draw_positions(kind, (2, 60, 2), seed=3), 5, 3, 2)
    for counts in random_splits([60, 45], random.Random(kind).choice):
        calls.append(counts)
    assert calls.past.tolist() == [60, 45]
    assert (calls.indices[0].counters[:, 1] > 1).all()


def test_steps_after_a_crop_build_the_trees_again(small_trees, launched):
    calls = CallsInBoth(*draw_positions("clusters", (3, 60, 3), seed=4), 6, 1, 3)
    calls.append(torch.tensor([50, 60, 10]))
    calls.crop(torch.tensor([40, 30, 10]))
    assert calls.indices[0].counters[:, 0].tolist() == [0, 0, 0]
    for _ in range(3):
        calls.append(torch.tensor([1, 1, 0]))
    assert calls.indices[0].counters[:, 0].tolist() == [24, 16, 0]
    calls.append(torch.tensor([3, 20, 30]))


def test_steps_do_not_wait_for_the_device(small_trees, launched, monkeypatch):
    calls = CallsInBoth(*draw_positions("uniform", (2, 40, 2), seed=5), 4, 0, 2)
    query, keys, index = calls.queries[:, 39:], calls.keys, torch.full((2, 1), 39, device=DEVICE)

    def refuse(*arguments):
        raise AssertionError("the host read a tensor of the device")

    for name in ("item", "tolist", "nonzero", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    triton_launch.search_tree_triton(query, index, keys, 4, 0, 2, None, None, calls.indices[0])


# Attention


CASES = {
    "plain": {"length": 19},
    "window 1": {"window": 1},
    "window longer than the row": {"window": 40},
    "no neighbours": {"num_neighbors": 0},
    "no neighbours found": {"share": 0.0, "past": (3, 3)},
    "ragged past": {"past": (0, 23), "room": 3, "window": 5},
    "one step": {"length": 1, "past": (9, 30)},
    "several tiles": {"batch": 1, "past": (2,), "length": 37, "window": 35, "num_neighbors": 2},
}


def attend(**inputs):
    y, lse = flow_attention(**{name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in inputs.items()})
    return y.cpu(), lse.cpu()


@pytest.fixture
def attention_launched(launched):
    yield
    assert set(launched) == set(ATTENTION)


def assert_equals_the_loop(inputs, value_dtype):
    dtypes = dict.fromkeys(DIFFERENTIABLE, torch.float32) | {"value": value_dtype}
    rounded = inputs | {name: inputs[name].to(dtypes[name]).double() for name in DIFFERENTIABLE}
    found = outputs_and_gradients(attend, rounded, **dtypes)
    expected = outputs_and_gradients(flow_attention_reference, rounded)
    for name in expected:
        scale = expected[name].abs().max().clamp(min=1)
        assert (found[name] - expected[name]).abs().max() <= TOLERANCE[value_dtype] * scale, name


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("attention_launched")
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_loop(case):
    assert_equals_the_loop(draw_inputs(7, **CASES[case]), torch.float32)


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("attention_launched", "deterministic")
def test_gradients_with_and_without_atomic_additions(value_dtype):
    inputs = draw_inputs(8, length=9, past=(5, 0), room=1)
    inputs["reach"] = inputs["query_index"] % 3  # segments start within the window
    assert_equals_the_loop(inputs, value_dtype)


@pytest.mark.usefixtures("attention_launched")
def test_values_of_any_stride():
    inputs = draw_inputs(9)
    expected = outputs_and_gradients(attend, inputs, **dict.fromkeys(DIFFERENTIABLE, torch.float32))
    inputs["value"] = inputs["value"].mT.contiguous().mT  # features are not contiguous
    inputs["key"] = inputs["key"].transpose(1, 2).contiguous().transpose(1, 2)
    found = outputs_and_gradients(attend, inputs, **dict.fromkeys(DIFFERENTIABLE, torch.float32))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("attention_launched")
def test_large_logits_stay_finite():
    inputs = draw_inputs(2)
    inputs["query"] = 1e3 * inputs["query"]
    outputs = outputs_and_gradients(attend, inputs, **dict.fromkeys(DIFFERENTIABLE, torch.float32))
    assert all(value.isfinite().all() for value in outputs.values())


# Dispatch


def test_model_gives_the_same_in_triton(launched, small_trees, monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20}
    search = {"num_neighbors": 4, "local_window": 4, "num_leaves": 2}
    model = DFNForCausalLM(DFNConfig(**sizes, **search, num_hidden_layers=1, initializer_range=0.5)).to(DEVICE)
    ids = torch.randint(0, 40, (2, 29), device=DEVICE)

    def run():
        model.zero_grad()
        outputs = model(ids, labels=ids, use_cache=False, output_entities=True)
        outputs.loss.backward()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            continued = [model(ids[:, part], past_key_values=cache).logits for part in (slice(25), slice(25, 29))]
        gradients = [parameter.grad for parameter in model.parameters()]
        return outputs.entities[0].neighbors, [outputs.logits, *continued, *gradients]

    neighbors, found = run()
    cached_call = ["search_tree_triton", "flow_attention_forward_triton"]
    assert launched == ["search_tree_triton", *ATTENTION, *cached_call, *cached_call]
    monkeypatch.setattr(dispatch, "triton_available", lambda device: False)
    expected_neighbors, expected = run()
    assert torch.equal(neighbors, expected_neighbors) and (neighbors >= 0).any()
    for x, wanted in zip(found, expected, strict=True):
        assert torch.allclose(x, wanted, atol=1e-4 * float(wanted.detach().abs().max().clamp(min=1)), rtol=0)


@pytest.mark.parametrize("misfit", ["dropout", "float64", "wide values"])
def test_unsupported_inputs_run_in_torch(misfit, launched):
    inputs = draw_inputs(0, length=3)
    if misfit != "float64":
        inputs |= {name: inputs[name].float() for name in DIFFERENTIABLE}
    if misfit == "wide values":
        inputs["value"] = inputs["value"].repeat(1, 1, 1, 100)
    y, _ = flow_attention(**inputs, dropout=0.5 if misfit == "dropout" else 0.0)
    assert launched == [] and y.isfinite().all()


@pytest.mark.parametrize("obstacle", ["an old GPU", "no Triton", "switched off", "no GPU"])
def test_triton_is_unavailable(obstacle, monkeypatch):
    capability = (7, 5) if obstacle == "an old GPU" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("DFN_HF_KERNELS", "0" if obstacle == "switched off" else "1")
    if obstacle == "no Triton":
        monkeypatch.setitem(sys.modules, "dfn_hf.modeling.ops.kernels.triton_launch", None)
    device = torch.device("cpu" if obstacle == "no GPU" else "cuda")
    dispatch._can_run.cache_clear()
    assert not dispatch.triton_available(device)
    monkeypatch.undo()
    dispatch._can_run.cache_clear()


def test_triton_is_available_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("DFN_HF_KERNELS", "1")
    assert dispatch.triton_available(torch.device("cuda"))
    dispatch._can_run.cache_clear()


# Compiled


@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_a_gpu(capability):
    """Sizes are those of the default model. A new process compiles them: this one interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "support" / "compiled_kernels.py"
    done = subprocess.run([sys.executable, str(script), capability], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == {
        "catch_up_kernel", "locate_kernel", "enter_kernel", "nearest_leaves_kernel", "search_kernel",
        "forward_kernel", "backward_queries_kernel", "backward_neighbors_kernel", "backward_keys_kernel",
    }  # fmt: skip
    for kernel in kernels:
        # Registers spill to the stack, by hundreds of bytes if blocks are too large.
        assert kernel["stack"] < 64, kernel
