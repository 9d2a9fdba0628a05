"""What other code finds out by the names of model classes: label smoothing, lm-eval's kind of model."""

import pytest
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import dfn_hf
from dfn_hf import DFNConfig, DFNForCausalLM, FlowNetworkConfig, FlowNetworkForCausalLM, LiquidConfig
from dfn_hf.registration import model_classes

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
CAUSAL = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(intermediate_size=64, **SIZES)),
    "dfn": lambda: DFNForCausalLM(DFNConfig(**SIZES)),
    "dfn-adaptive": lambda: DFNForCausalLM(DFNConfig(entity_sampling="adaptive", **SIZES)),
    "flownetwork": lambda: FlowNetworkForCausalLM(FlowNetworkConfig(memory_size=0, **SIZES)),
}


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_label_smoothing_scores_the_next_token(name, with_adapter, tmp_path):
    torch.manual_seed(0)
    model = CAUSAL[name]()
    if with_adapter:
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear"))
    ids = torch.randint(64, (4, 12))
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", max_steps=1, logging_steps=1,
            learning_rate=0.0, per_device_train_batch_size=4, label_smoothing_factor=0.1, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()]),
    )  # fmt: skip
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    with torch.no_grad():
        logp = model.eval()(input_ids=ids).logits.log_softmax(dim=-1)[:, :-1]
    expected = -0.9 * logp.gather(-1, ids[:, 1:, None]).mean() - 0.1 * logp.mean()
    assert abs(logged - expected.item()) < 1e-3


def test_every_auto_class_knows_the_names():
    for config, heads in model_classes().items():
        for auto_class, model_class in heads.items():
            assert auto_class._model_mapping._model_mapping[config.model_type] == model_class.__name__


@pytest.mark.parametrize(
    ("checkpoint", "auto_class"), [("dfn-tiny", AutoModelForCausalLM), ("liquid-tiny", AutoModelForSeq2SeqLM)]
)
def test_lm_eval_knows_encoder_decoders(checkpoint, auto_class):
    folder = str(dfn_hf.checkpoint_path(checkpoint))
    model = HFLM(pretrained=folder, device="cpu", batch_size=1)
    assert model.AUTO_MODEL_CLASS is auto_class
    assert isinstance(AutoConfig.from_pretrained(folder), LiquidConfig) == (auto_class is AutoModelForSeq2SeqLM)
