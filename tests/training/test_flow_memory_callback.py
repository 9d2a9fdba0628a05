"""Tests that `FlowMemoryCallback` updates the memory bank once per optimizer step, and at no other time."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from dfn_hf import DFNConfig, DFNForCausalLM, FlowMemoryCallback, FlowNetworkConfig, FlowNetworkForCausalLM
from dfn_hf.modeling.flownetwork.memory import MemoryBank

STEPS = 3
TINY = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
MEMORY = {"memory_size": 3, "num_memory_heads": 2, "memory_chunk": 4, "flow_window": 6, "min_flow_window": 2}


def make_model(**fields):
    torch.manual_seed(0)
    return FlowNetworkForCausalLM(FlowNetworkConfig(**TINY | MEMORY | fields))


def bank_of(model):
    return model.base_model.memory.memory_bank


def make_blocks(number):
    ids = torch.randint(40, (number, 24), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def train(model, folder, callbacks=None, batch_size=2, accumulation=1, **options):
    """Train for STEPS optimizer steps with `Trainer`, on the same blocks in the same order for all batch sizes."""
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        train_sampling_strategy="sequential",
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    callbacks = [FlowMemoryCallback()] if callbacks is None else callbacks
    blocks = make_blocks(STEPS * batch_size * accumulation)
    Trainer(model, settings, train_dataset=blocks, eval_dataset=make_blocks(4), callbacks=callbacks).train()


@pytest.fixture
def commits(monkeypatch):
    """One bool per call of `MemoryBank.commit`: whether an update was staged."""
    staged, commit = [], MemoryBank.commit

    def counted(bank):
        staged.append(bank.staged is not None)
        commit(bank)

    monkeypatch.setattr(MemoryBank, "commit", counted)
    return staged


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_bank_is_updated_once_per_optimizer_step(commits, accumulation, checkpointing, tmp_path):
    model = make_model()
    before = bank_of(model).clone()
    train(model, tmp_path, accumulation=accumulation, gradient_checkpointing=checkpointing)
    assert commits == [True] * STEPS
    assert not torch.allclose(bank_of(model), before) and model.model.memory.staged is None


def test_bank_equals_that_of_a_custom_loop(tmp_path):
    model, by_hand = make_model(), make_model().train()
    train(model, tmp_path, accumulation=2, batch_size=2, weight_decay=0.0, lr_scheduler_type="constant", optim="sgd")
    ids = torch.tensor(make_blocks(4 * STEPS)["input_ids"])
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1e-3)
    for batch in ids.split(4):
        loss = by_hand(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        by_hand.commit_memory()
    assert torch.allclose(bank_of(model), bank_of(by_hand), atol=1e-6, rtol=0)


def test_accumulation_updates_the_bank_like_one_large_batch(tmp_path):
    large, small = make_model(), make_model()
    train(large, tmp_path, batch_size=8)
    train(small, tmp_path, batch_size=1, accumulation=8)
    assert torch.allclose(bank_of(large), bank_of(small), atol=1e-6, rtol=0)
    assert not torch.allclose(bank_of(large), bank_of(make_model()), atol=1e-3)


def test_evaluation_does_not_update_the_bank(commits, tmp_path):
    model, alone, evaluated = make_model(), make_model(), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.bank = bank_of(model).clone()

        def on_evaluate(self, args, state, control, **kwargs):
            evaluated.append(torch.equal(bank_of(model), self.bank) and model.model.memory.staged is None)

    options = {"eval_strategy": "steps", "eval_steps": 1}
    train(model, tmp_path, [FlowMemoryCallback(), Watch()], **options)
    assert evaluated == [True] * STEPS and commits == [True] * STEPS
    train(alone, tmp_path)
    assert torch.equal(bank_of(model), bank_of(alone))


def test_bank_is_constant_without_the_callback(commits, tmp_path):
    model = make_model()
    train(model, tmp_path, callbacks=[])
    assert not commits and torch.equal(bank_of(model), bank_of(make_model()))


def test_a_model_without_a_bank_trains_with_the_callback(commits, tmp_path):
    torch.manual_seed(0)
    model = DFNForCausalLM(DFNConfig(**TINY))
    before = model.lm_head.weight.clone()
    train(model, tmp_path)
    assert not commits and not torch.equal(model.lm_head.weight, before)
    model = make_model(memory_size=0)
    train(model, tmp_path)
    assert not commits and model.model.memory is None


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_bank_is_constant_with_adapters(commits, targets, tmp_path):
    model = make_model()
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=2, task_type="CAUSAL_LM"))
    train(adapted, tmp_path)
    learnt = [weight for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert learnt and any(weight.any() for weight in learnt)
    assert not commits and torch.equal(bank_of(model), bank_of(make_model())) and model.model.memory.staged is None
