"""Every name that a package exports lazily exists."""

import importlib
import subprocess
import sys

import pytest

PACKAGES = ("dfn_hf", "dfn_hf.data", "dfn_hf.evaluation", "dfn_hf.training")
OPTIONAL = ("datasets", "matplotlib", "pandas", "pyarrow", "sacrebleu")
# transformers imports some optional packages where they are installed: those count as imported before.
START = f"""
import sys
import transformers.generation, transformers.modeling_utils, transformers.models.llama.modeling_llama
before = {{name for name in {OPTIONAL} if name in sys.modules}}
"""
END = f"\nprint({{name for name in {OPTIONAL} if name in sys.modules}} - before or 'none')"
WITHOUT_DATASETS = "import sys\nsys.modules['datasets'] = None\n"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_export_exists(package):
    module = importlib.import_module(package)
    assert module.__all__ and dir(module) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_loading_and_generating_imports_no_optional_package():
    result = run(
        START + "import dfn_hf\n"
        "from dfn_hf.data import load_tokenizer\n"
        "from dfn_hf.evaluation import generate_text\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(dfn_hf.checkpoint_path('dfn-tiny'))\n"
        "generate_text(model, load_tokenizer('bpe'), 'And', max_new_tokens=4)" + END
    )
    assert result.stdout.splitlines()[-1:] == ["none"], result.stdout + result.stderr


@pytest.mark.parametrize("command", ["info dfn-tiny", "generate dfn-tiny --max-new-tokens 2 --prompt And"])
def test_commands_import_no_optional_package(command):
    call = f"from dfn_hf.cli import app\napp({command.split()!r}, standalone_mode=False)"
    result = run(START + call + END)
    assert result.stdout.splitlines()[-1:] == ["none"], result.stdout + result.stderr


@pytest.mark.parametrize("name", ["pack", "load_corpus", "load_pairs"])
def test_a_missing_package_is_named_with_its_extra(name):
    result = run(f"{WITHOUT_DATASETS}from dfn_hf.data import {name}")
    assert result.returncode == 1
    assert "datasets is not installed: run pip install 'dfn-hf[train]'" in result.stderr
