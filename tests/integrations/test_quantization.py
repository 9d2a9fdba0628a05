"""Tests bitsandbytes and torchao quantization on small models of every family."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from dfn_hf.benchmarks.quality.quantization import is_quantized
from tests.support.small_models import MODELS, make_small_model

FORMATS = {
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 double": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "torchao int8 weights": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao int8 dynamic": lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
}
NOT_QUANTIZED = {
    "dfn": ("flow_map", "position_proj", "flow_proj", "influence_proj"),
    "flownetwork": ("context_proj", "route_proj", "pattern_selector", "key_proj", "intensity_proj"),
    "liquid": ("gate",),
}
families = pytest.mark.parametrize("family", MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with a random model of each family."""
    folder = tmp_path_factory.mktemp("models")
    for family in MODELS:
        make_small_model(family).save_pretrained(folder / family)
    return folder


def load(folder, family: str, name: str) -> PreTrainedModel:
    model_class = type(MODELS[family]())
    return model_class.from_pretrained(folder, quantization_config=FORMATS[name]()).eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (2, 21), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(**batch()).logits


@families
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_model_saves_loads_and_generates(family, name, folders, tmp_path):
    model = load(folders / family, family, name)
    maps = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {path for path, module in maps.items() if is_quantized(module)}
    assert len(quantized) >= 8 and "lm_head" not in quantized
    model.save_pretrained(tmp_path / "unused")
    logits = logits_of(model)
    assert logits.isfinite().all() and logits.std() > 1e-3
    written = model.generate(batch()["input_ids"], max_new_tokens=4, do_sample=False)
    loaded = type(model).from_pretrained(tmp_path / "unused").eval()
    assert torch.equal(logits_of(loaded), logits)
    assert torch.equal(loaded.generate(batch()["input_ids"], max_new_tokens=4, do_sample=False), written)


@families
def test_bitsandbytes_does_not_quantize_routing_layers(family, folders):
    model = load(folders / family, family, "int8")
    maps = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in NOT_QUANTIZED[model.config.model_type]:
        named = [module for path, module in maps.items() if path.rsplit(".", 1)[-1] == name]
        assert named and not any(is_quantized(module) for module in named), name


@families
def test_routing_layers_are_float32_in_a_float16_model(family, folders):
    model = type(MODELS[family]()).from_pretrained(folders / family, dtype=torch.float16).eval()
    kept = {path for path, weight in model.named_parameters() if weight.dtype == torch.float32}
    for name in NOT_QUANTIZED[model.config.model_type]:
        assert any(f".{name}." in path for path in kept), name
    assert logits_of(model).isfinite().all()


@families
@pytest.mark.parametrize("name", ["int8", "nf4 double"])
def test_qlora_trains(family, name, folders):
    model = load(folders / family, family, name)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    task = "SEQ_2_SEQ_LM" if family == "liquid" else "CAUSAL_LM"
    adapted = get_peft_model(model, LoraConfig(r=4, task_type=task)).train()
    trainable = [weight for weight in adapted.parameters() if weight.requires_grad]
    frozen = {path: weight.clone() for path, weight in adapted.named_parameters() if not weight.requires_grad}
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = adapted(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(weight, frozen[path]) for path, weight in adapted.named_parameters() if path in frozen)
