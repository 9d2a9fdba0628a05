"""The neighbour search and flow attention as torch.library operators, which compiled models call."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dfn_hf.modeling.ops import custom_ops, flow_attention, neighbor_search
from dfn_hf.modeling.ops.box_tree import BLOCK, RECENT, empty_tree_index, index_layout
from tests.modeling.ops.test_flow_attention import draw_inputs
from tests.support.small_models import make_small_model

DIFFERENTIABLE = ("query", "key", "value", "decay")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # C, torch
def test_attention_operator_passes_opcheck(dropout, dtype):
    inputs = draw_inputs(3, window=4)
    for name in DIFFERENTIABLE:
        inputs[name] = inputs[name].to(dtype).requires_grad_()
    arguments = (*inputs.values(), dropout, torch.tensor(7))
    torch.library.opcheck(flow_attention._forward_operator, arguments)


def draw_search(length, layout=None):
    """Return the arguments of the search operator for rows of `length` entities, with an index in the given layout."""
    query, key = torch.randint(-50, 50, (2, 2, length, 3), generator=torch.Generator().manual_seed(0)).short()
    arguments = [query, torch.arange(length).expand(2, -1).contiguous(), key, 5, 3, 2, None, None]
    if layout is None:
        return arguments
    index = empty_tree_index(layout, 2, length, 3, query.device)
    return arguments + list(vars(index).values())


@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("with_index", [False, True])
def test_search_operator_passes_opcheck(with_index, switch, monkeypatch):
    monkeypatch.setenv("DFN_HF_KERNELS", switch)
    layout = index_layout(torch.device("cpu"), 3) if with_index else None
    arguments = draw_search(RECENT + 2 * BLOCK, layout)
    torch.library.opcheck(neighbor_search._tree_operator, tuple(arguments))


def test_exact_search_operator_passes_opcheck():
    torch.library.opcheck(neighbor_search._exact_operator, tuple(draw_search(40)[:5] + [None]))


@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_compiled_search_makes_its_index_and_fills_it(switch, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("DFN_HF_KERNELS", switch)
    query, positions, key, *sizes, _, _ = draw_search(RECENT + 3 * BLOCK)

    def search():
        index = empty_tree_index(index_layout(query.device, 3), 2, query.shape[1], 3, query.device)
        indices, squared = neighbor_search.search_tree(query, positions, key, *sizes, index=index)
        return indices, squared, index.counters

    expected = search()
    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")()
    for x, y in zip(compiled, expected, strict=True):
        assert torch.equal(x, y)
    assert compiled[2][:, 0].tolist() == [2 * BLOCK] * 2


def test_a_model_compiles_into_one_graph():
    torch._dynamo.reset()
    model = make_small_model("dfn")
    ids = torch.randint(3, 50, (2, 21))

    def loss(ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    expected = loss(ids)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(ids)
    compiled.backward()
    assert torch.allclose(compiled, expected, rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        bound = 1e-4 * max(1, float(gradients[name].abs().max()))
        assert torch.allclose(parameter.grad, gradients[name], rtol=0, atol=bound), name


def copy_of_the_code(folder: Path, changed: bool):
    """Import a copy of the ops folder under another name, as transformers does with code from the Hub."""
    shutil.copytree(Path(custom_ops.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if changed:
        with (folder / "chunking.py").open("a") as file:
            file.write("\n# another revision\n")
    spec = importlib.util.spec_from_file_location(
        f"copy_{folder.name}", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)
    return importlib.import_module(f"{spec.name}.flow_attention")


def test_copies_of_the_code_coexist(tmp_path):
    inputs = draw_inputs(3, window=4)
    arguments = (*inputs.values(), 0.0, torch.tensor(0))
    expected, _ = flow_attention._forward_operator(*arguments)
    same, other = (copy_of_the_code(tmp_path / name, name == "other") for name in ("same", "other"))
    for module in (flow_attention, same, other):
        assert torch.equal(module._forward_operator(*arguments)[0], expected)
    assert str(same._forward_operator) == str(flow_attention.custom_op(flow_attention.flow_attention_forward, None))
    assert str(other._forward_operator) != str(same._forward_operator)
