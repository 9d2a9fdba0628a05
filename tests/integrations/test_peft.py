"""Tests PEFT methods on small models of every family."""

import copy

import peft
import peft.utils.constants
import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import PreTrainedModel

from dfn_hf.hub.peft_defaults import LINEAR_MAPS, LOW_RANK_METHODS
from tests.support.marks import first_quickly
from tests.support.small_models import MODELS, make_small_model

EXACT = {"rtol": 0, "atol": 1e-10}
FP32 = {"rtol": 0, "atol": 1e-5}
families = pytest.mark.parametrize("family", MODELS)


def make_model(family: str) -> PreTrainedModel:
    return make_small_model(family).double()


def task_of(family: str) -> str:
    return "SEQ_2_SEQ_LM" if family == "liquid" else "CAUSAL_LM"


def draw_ids() -> torch.Tensor:
    return torch.randint(1, 50, (2, 19), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(input_ids=draw_ids(), labels=draw_ids()).logits


def adapt(family: str, config) -> PeftModel:
    """Train a model with the adapter for three steps; every trainable weight changes."""
    torch.manual_seed(1)
    adapted = get_peft_model(make_model(family), config).double().train()
    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters()}
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(input_ids=draw_ids(), labels=draw_ids()).loss.backward()
        optimizer.step()
    for name, weight in adapted.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name
    return adapted


@families
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"use_dora": True},
        {"use_rslora": True, "modules_to_save": ["embed_tokens"]},
    ],
    ids=["default", "all-linear", "dora", "with embedding"],
)
def test_lora_trains_merges_and_loads(family, options, tmp_path):
    if "modules_to_save" in options:
        options = options | {"ensure_weight_tying": True}
    adapted = adapt(family, LoraConfig(r=2, task_type=task_of(family), **options))
    expected = logits_of(adapted)
    assert not torch.allclose(expected, logits_of(make_model(family)), **EXACT)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(family), tmp_path).double()
    assert torch.allclose(logits_of(loaded), expected, **EXACT)
    assert torch.allclose(logits_of(adapted.merge_and_unload()), expected, **EXACT)


@families
def test_default_targets_are_linear_layers(family):
    adapted = get_peft_model(make_model(family), LoraConfig(r=2))
    linear_maps = LINEAR_MAPS[adapted.config.model_type]
    assert adapted.peft_config["default"].target_modules == set(linear_maps)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    for target in linear_maps:
        assert any(f".{target}.lora_A" in name for name in trained), target
    assert not any("lm_head" in name for name in trained)


@pytest.mark.parametrize("method", LOW_RANK_METHODS)
def test_low_rank_methods_have_default_targets(method):
    mapping = getattr(peft.utils.constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")
    assert all(mapping[family] == targets for family, targets in LINEAR_MAPS.items())


@families
def test_ia3(family):
    adapted = adapt(family, IA3Config(task_type=task_of(family)))
    assert torch.allclose(logits_of(copy.deepcopy(adapted).merge_and_unload()), logits_of(adapted), **EXACT)


@families
@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(num_virtual_tokens=3), PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8)],
    ids=["prompt tuning", "p-tuning"],
)
def test_virtual_tokens(family, config, tmp_path):
    config = copy.deepcopy(config)
    config.task_type = task_of(family)
    adapted = adapt(family, config)
    expected = logits_of(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(family), tmp_path).double()
    assert torch.allclose(logits_of(loaded), expected, **FP32)  # PEFT loads virtual tokens as float32
    written = adapted.generate(input_ids=draw_ids(), max_new_tokens=3, do_sample=False)
    # The output contains no virtual tokens; that of an encoder-decoder has a start token.
    assert written.shape == (2, 4 if family == "liquid" else draw_ids().shape[1] + 3)


def test_experts_as_target_parameters():
    targets = ["experts.up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets, task_type="SEQ_2_SEQ_LM")
    adapted = adapt("liquid", config)
    expected = logits_of(adapted)
    assert not torch.allclose(expected, logits_of(make_model("liquid")), **EXACT)
    assert torch.allclose(logits_of(adapted.merge_and_unload()), expected, **EXACT)


@families
def test_load_adapter_of_transformers(family, tmp_path):
    adapted = adapt(family, LoraConfig(r=2, task_type=task_of(family)))
    expected = logits_of(adapted)
    adapted.save_pretrained(tmp_path)
    model = make_model(family)
    plain = logits_of(model)
    model.load_adapter(str(tmp_path))
    assert torch.allclose(logits_of(model.double()), expected, **EXACT)
    model.disable_adapters()
    assert torch.allclose(logits_of(model), plain, **EXACT)


@families
def test_error_for_prefix_tuning_names_an_alternative(family):
    adapted = get_peft_model(make_model(family), PrefixTuningConfig(num_virtual_tokens=3, task_type=task_of(family)))
    with pytest.raises(ValueError, match="prompt tuning"):
        adapted(input_ids=draw_ids(), labels=draw_ids())


METHODS = {
    "AdaLoRA": lambda task: peft.AdaLoraConfig(task_type=task, total_step=10),
    "LoHa": lambda task: peft.LoHaConfig(task_type=task),
    "LoKr": lambda task: peft.LoKrConfig(task_type=task),
    "OFT": lambda task: peft.OFTConfig(task_type=task, oft_block_size=8),
    "BOFT": lambda task: peft.BOFTConfig(task_type=task),
    "VeRA": lambda task: peft.VeraConfig(task_type=task),
    "FourierFT": lambda task: peft.FourierFTConfig(task_type=task, n_frequency=50),
    "HRA": lambda task: peft.HRAConfig(task_type=task),
    "RoAd": lambda task: peft.RoadConfig(task_type=task),
}


@pytest.mark.parametrize("family", first_quickly(MODELS))
@pytest.mark.parametrize("method", METHODS)
def test_default_targets_train_and_merge(family, method):
    base = make_model(family)
    expected = logits_of(base)
    torch.manual_seed(1)
    adapted = get_peft_model(base, METHODS[method](task_of(family))).double().train()
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(input_ids=draw_ids(), labels=draw_ids()).loss.backward()
        optimizer.step()
    trained = logits_of(adapted)
    assert (trained - expected).abs().max() > 1e-4
    with torch.no_grad(), adapted.disable_adapter():
        torch.testing.assert_close(logits_of(adapted), expected, **EXACT)
    torch.testing.assert_close(logits_of(adapted.merge_and_unload()), trained, atol=1e-6, rtol=0)


@families
def test_each_row_has_the_adapter_of_its_name(family):
    adapted = get_peft_model(make_model(family), mixed_config(family), adapter_name="a").double()
    adapted.add_adapter("b", mixed_config(family))
    adapted.double().eval()
    ids, names = torch.randint(1, 50, (3, 40), generator=torch.Generator().manual_seed(1)), ["a", "b", "a"]
    alone = []
    with torch.no_grad():
        for row, name in zip(ids.split(1), names, strict=True):
            adapted.set_adapter(name)
            alone.append(adapted(input_ids=row, labels=row).logits)
        mixed = adapted(input_ids=ids, labels=ids, adapter_names=names).logits
    torch.testing.assert_close(mixed, torch.cat(alone), **EXACT)
    assert (alone[0] - adapted(input_ids=ids[:1], labels=ids[:1], adapter_names=["b"]).logits).abs().max() > 1e-2


def mixed_config(family):
    return LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type=task_of(family))
