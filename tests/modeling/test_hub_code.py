"""The merged files of each family: their number, their names, and the files in a saved folder."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from transformers import AutoConfig

from dfn_hf import DFNConfig, FlowNetworkConfig, LiquidConfig
from dfn_hf.modeling import hub_code
from dfn_hf.registration import CONFIGURATIONS, model_classes

FILES = {
    "dfn": {"configuration_dfn.py", "dfn_kernels.py", "modeling_dfn.py"},
    "flownetwork": {"configuration_flownetwork.py", "modeling_flownetwork.py"},
    "liquid": {"configuration_liquid.py", "modeling_liquid.py"},
    "dfn_native": {"configuration_dfn_native.py", "modeling_dfn_native.py"},
    "flownetwork_native": {"configuration_flownetwork_native.py", "modeling_flownetwork_native.py"},
    "liquid_native": {"configuration_liquid_native.py", "modeling_liquid_native.py"},
}
CONFIGS = CONFIGURATIONS


def files_of(config) -> dict[str, str]:
    return hub_code.merged_files(hub_code.ROOT.parent / sys.modules[config.__module__].__file__)


def defined_names(statements):
    """Yield the names that the top level of a file binds, as (name, statement)."""
    for node in statements:
        text = ast.unparse(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, text
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield from ((name.id, text) for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            yield from ((alias.asname or alias.name, f"import {alias.name}") for alias in node.names)
        elif isinstance(node, ast.Try):
            yield from defined_names(node.body)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_each_family_has_at_most_three_files_and_unique_names(config):
    files = files_of(config)
    assert set(files) == FILES[config.model_type] and len(files) <= 3
    statements = {statement for text in files.values() for statement in defined_names(ast.parse(text).body)}
    counts = Counter(name for name, _ in statements)
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_each_part_names_its_source(config):
    for text in files_of(config).values():
        assert text.startswith(hub_code.MARK)
        sources = [line[2:] for line in text.splitlines() if line.startswith("# modeling/")]
        assert sources and all((hub_code.ROOT / source.removeprefix("modeling/")).exists() for source in sources)
        assert hub_code.HubCodeMixin.__name__ not in text and "c_source(" not in text


def test_kernels_file_contains_the_c_code():
    text = files_of(DFNConfig)["dfn_kernels.py"]
    for source in hub_code.KERNELS.glob("*.[ch]"):
        code = source.read_text(encoding="utf-8")
        assert all(part in text for part in re.split('#include ".+"\n', code))
    assert '#include "' not in text


def test_a_configuration_loads_from_one_file(tmp_path):
    DFNConfig().save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        if path.name != "configuration_dfn.py":
            path.write_text("raise AssertionError('imported')")
    script = (
        "import sys; sys.modules['dfn_hf'] = None\n"
        "from transformers import AutoConfig\n"
        f"assert AutoConfig.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).num_neighbors == 16"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)


def test_kernels_file_imports_without_triton(tmp_path):
    DFNConfig().save_pretrained(tmp_path)
    script = "import sys; sys.modules['triton'] = None; import dfn_kernels; dfn_kernels.compiled_library"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_saving_another_family_deletes_merged_files_and_keeps_others(tmp_path):
    (tmp_path / "modeling_mine.py").write_text("mine = 1\n")
    DFNConfig().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == FILES["dfn"] | {"modeling_mine.py"}
    FlowNetworkConfig().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == FILES["flownetwork"] | {"modeling_mine.py"}
    assert (tmp_path / "modeling_mine.py").read_text() == "mine = 1\n"


def test_auto_map_entries_are_frozen():
    """Saved folders refer to these classes, so a change would break every folder on the Hub."""
    assert DFNConfig().auto_map == {
        "AutoConfig": "configuration_dfn.DFNConfig",
        "AutoModel": "modeling_dfn.DFNModel",
        "AutoModelForCausalLM": "modeling_dfn.DFNForCausalLM",
        "AutoModelForSequenceClassification": "modeling_dfn.DFNForSequenceClassification",
        "AutoModelForPreTraining": "modeling_dfn.DFNForFieldReconstruction",
        "AutoModelForTextEncoding": "modeling_dfn.DFNForContrastive",
    }
    assert FlowNetworkConfig().auto_map == {
        "AutoConfig": "configuration_flownetwork.FlowNetworkConfig",
        "AutoModel": "modeling_flownetwork.FlowNetworkModel",
        "AutoModelForCausalLM": "modeling_flownetwork.FlowNetworkForCausalLM",
        "AutoModelForSequenceClassification": "modeling_flownetwork.FlowNetworkForSequenceClassification",
    }
    assert LiquidConfig().auto_map == {
        "AutoConfig": "configuration_liquid.LiquidConfig",
        "AutoModel": "modeling_liquid.LiquidModel",
        "AutoModelForSeq2SeqLM": "modeling_liquid.LiquidForSeq2SeqLM",
        "AutoModelForSequenceClassification": "modeling_liquid.LiquidForSequenceClassification",
    }


def test_import_in_another_form_is_refused(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("from .other import thing as other_thing\n")
    with pytest.raises(ValueError, match="module.py:1: import names from a module, without `as`"):
        list(hub_code.relative_imports(module))


def test_loaded_configuration_is_the_packages_own(tmp_path):
    LiquidConfig().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LiquidConfig


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_source_inspection_of_transformers_gives_the_same_in_a_saved_folder(config, tmp_path):
    from transformers import AutoModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model_class = model_classes()[config][AutoModel]
    config().save_pretrained(tmp_path)
    loaded = get_class_from_dynamic_module(config().auto_map["AutoModel"], str(tmp_path))
    for guess in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
        assert getattr(loaded, guess)() == getattr(model_class, guess)(), guess
