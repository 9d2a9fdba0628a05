"""`import dfn_hf` imports torch and transformers only, and registers the families as they are needed."""

import subprocess
import sys

import pytest

HEAVY = ("accelerate", "datasets", "matplotlib", "pandas", "peft", "pyarrow", "sacrebleu", "scipy", "torchao", "typer")
REPORT = "import sys; print([name for name in {names} if name in sys.modules])"


def run(script: str) -> str:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_brings_no_heavy_module_and_no_model_class():
    names = (*HEAVY, "transformers.modeling_utils", "transformers.pipelines", "dfn_hf.modeling.dfn.modeling_dfn")
    assert run(f"import dfn_hf\n{REPORT.format(names=names)}") == "[]"


@pytest.mark.parametrize(
    "script",
    [
        "AutoModelForCausalLM.from_config(AutoConfig.for_model('dfn', hidden_size=32, num_hidden_layers=1))",
        "AutoModelForCausalLM.from_pretrained(dfn_hf.checkpoint_path('dfn-tiny'))",
        "AutoModelForCausalLM.from_config(pickle.loads(pickle.dumps(dfn_hf.DFNConfig())))",
    ],
)
def test_auto_classes_find_the_models(script):
    names = "import dfn_hf, pickle; from transformers import AutoConfig, AutoModelForCausalLM\n"
    assert run(f"{names}print(type({script}).__module__)") == "dfn_hf.modeling.dfn.modeling_dfn"


def test_unpickled_configuration_finds_its_model_in_another_process(tmp_path):
    path = tmp_path / "config.pkl"
    run(f"import dfn_hf, pickle; pickle.dump(dfn_hf.DFNConfig(), open({str(path)!r}, 'wb'))")
    script = "import pickle; from transformers import AutoModelForCausalLM\n"
    script += f"config = pickle.load(open({str(path)!r}, 'rb'))\n"
    script += "print(type(AutoModelForCausalLM.from_config(config)).__name__)"
    assert run(script) == "DFNForCausalLM"


@pytest.mark.parametrize("first", ["dfn_hf", "peft"])
def test_peft_finds_its_targets_whichever_is_imported_first(first):
    second = {"dfn_hf": "peft", "peft": "dfn_hf"}[first]
    script = (
        f"import {first}, {second}\nfrom dfn_hf import DFNConfig, DFNForCausalLM\n"
        "model = peft.get_peft_model(DFNForCausalLM(DFNConfig()), peft.LoraConfig())\n"
        "print(sum('lora_A' in name for name, _ in model.named_parameters()) > 0)"
    )
    assert run(script) == "True"


@pytest.mark.parametrize("first", ["dfn_hf", "transformers.pipelines"])
def test_text2text_pipeline_is_known_whichever_is_imported_first(first):
    second = {"dfn_hf": "transformers.pipelines", "transformers.pipelines": "dfn_hf"}[first]
    script = f"import {first}, {second}\nfrom transformers.pipelines import PIPELINE_REGISTRY\n"
    script += "print('liquid-text2text' in PIPELINE_REGISTRY.get_supported_tasks())"
    assert run(script) == "True"


def test_every_export_exists():
    assert run("import dfn_hf; print(all(hasattr(dfn_hf, name) for name in dfn_hf.__all__))") == "True"
