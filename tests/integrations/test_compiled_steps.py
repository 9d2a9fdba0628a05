"""Tests that decode steps with a static cache compile to one graph, once."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from transformers import CompileConfig, DynamicCache, StaticCache

from dfn_hf import DFNConfig, DFNForCausalLM
from dfn_hf.modeling.ops.box_tree import BLOCK, RECENT
from tests.modeling.modules.test_static_cache import MASKS, STRICT, logits_of, run
from tests.support.families import draw_ids
from tests.support.marks import first_quickly
from tests.support.small_models import make_small_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("backend", first_quickly(["aot_eager", "inductor"]))
@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("search", first_quickly(["tree", "exact"]))
def test_decode_steps_compile_to_one_graph(search, mask, backend):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = DFNConfig(
        vocab_size=40, **sizes, local_window=4, num_neighbors=5, memory_slots=2, memory_chunk=4,
        flow_norm="running", readout_window=2, search_implementation=search, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids, mask = DFNForCausalLM(config).double().eval(), draw_ids(2, 40, 0), MASKS[mask]
    calls = (20, *[1] * 20)
    expected = run(model, DynamicCache(config=config), ids, mask, calls)
    cache = StaticCache(config=config, max_cache_len=40)
    first = run(model, cache, ids, mask, (20,))
    step = torch.compile(model, fullgraph=True, backend=backend)
    steps = run(step, cache, ids[:, 20:], None if mask is None else mask[:, 20:], (1,))
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps += run(step, cache, ids[:, 21:], None if mask is None else mask[:, 21:], [1] * 19)
    assert torch.allclose(logits_of(first + steps), logits_of(expected), **STRICT)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_block_enters_the_tree_in_a_compiled_step():
    model = make_small_model("dfn", num_leaves=1)
    window, place = model.config.local_window, RECENT + 2 * BLOCK - 3
    ids, calls = draw_ids(2, place + window + 6, 0), (place + window, *[1] * 6)
    expected = run(model, DynamicCache(config=model.config), ids, None, calls)
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    first = run(model, cache, ids, None, calls[:1])
    counters = cache.layers[0].data("tree_counters")
    assert (counters[..., 0] == BLOCK).all()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    steps = run(step, cache, ids[:, calls[0] :], None, calls[1:])
    assert (counters[..., 0] == 2 * BLOCK).all()
    assert torch.allclose(logits_of(first + steps), logits_of(expected), rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_generate_compiles_decode_steps():
    model, ids = make_small_model("dfn"), draw_ids(2, 9, 0)
    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            tokens = model.generate(ids, cache_implementation="static", compile_config=compiling, **options)
            assert torch.equal(tokens, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


IN_PLACE = {"index_put", "copy_", "view", "_unsafe_view"}  # a compiler performs index_put in place
SYNCHRONIZING = {"_local_scalar_dense", "nonzero", "lift_fresh_copy"}  # synchronize device and host


def test_graph_contains_no_cache_copy_and_no_synchronization():
    model, longest, graphs = make_small_model("dfn"), 997, []

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return graph

    cache = StaticCache(config=model.config, max_cache_len=longest)
    run(model, cache, draw_ids(1, 40, 0), calls=(40,))
    run(
        torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep)),
        cache,
        draw_ids(1, 1, 0),
        None,
        (1,),
    )
    calls = [node for node in graphs[0].nodes if node.op == "call_function"]
    names = {node: node.target.__name__.split(".")[0] for node in calls if hasattr(node.target, "__name__")}
    assert len(names) > 100
    assert [node.stack_trace for node in names if names[node] in SYNCHRONIZING] == []
    assert not [node for node in graphs[0].nodes if node.op == "get_attr"]
    whole = [names[node] for node in names if longest in getattr(node.meta.get("val"), "shape", ())]
    assert whole and IN_PLACE.issuperset(whole)
