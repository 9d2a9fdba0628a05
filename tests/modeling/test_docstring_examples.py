"""The examples in the docstrings of `dfn_hf.modeling` run and print what they show."""

import doctest
import importlib
import pkgutil
import re

import pytest
import torch

from dfn_hf import modeling

MODULES = [
    module.name
    for module in pkgutil.walk_packages(modeling.__path__, f"{modeling.__name__}.")
    if not module.ispkg and ".kernels." not in module.name  # kernels have no examples; some of them need Triton
]
PUBLIC = {
    "dfn.attention": ["DynamicFlowAttention"],
    "dfn.configuration_dfn": ["DFNConfig"],
    "dfn.layers": ["DFNLayer", "FlowNorm"],
    "dfn.modeling_dfn": ["DFNForCausalLM", "DFNForSequenceClassification", "DFNModel"],
    "dfn.modeling_dfn_contrastive": ["DFNForContrastive"],
    "dfn.modeling_dfn_field": ["DFNForFieldReconstruction"],
    "modules.causal_conv": ["CausalConv"],
    "modules.chunk_memory": ["ChunkMemory"],
    "modules.depthwise_conv": ["DepthwiseConv1d"],
    "modules.rms_norm": ["RMSNorm"],
    "modules.row_layout": ["RowLayout", "make_row_layout"],
    "modules.windowed_attention": ["GroupedQueryAttention", "SelfAttention"],
    "ops.chunking": ["apply_chunked"],
    "ops.flow_attention": ["flow_attention"],
    "ops.hilbert_curve": ["Box", "hilbert_keys"],
    "ops.neighbor_search": ["nearest_predecessors"],
}


class FencedExampleParser(doctest.DocTestParser):
    """Parses examples within or without Markdown code fences."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"^ *```.*$", "", string, flags=re.MULTILINE), name)


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_show(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(parser=FencedExampleParser()).find(module):
        torch.manual_seed(0)
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_and_modules_have_an_example(name):
    module = importlib.import_module(f"{modeling.__name__}.{name}")
    assert [public for public in PUBLIC[name] if ">>> " not in (getattr(module, public).__doc__ or "")] == []
