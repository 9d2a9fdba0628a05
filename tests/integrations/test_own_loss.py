"""Losses that the caller computes from the logits: `aux_loss` is what has to be added."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from dfn_hf import (
    DFNConfig,
    DFNForCausalLM,
    DFNForSequenceClassification,
    FlowNetworkConfig,
    FlowNetworkForCausalLM,
    LiquidConfig,
    LiquidForSeq2SeqLM,
    LiquidForSequenceClassification,
)

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ADAPTIVE = {"entity_sampling": "adaptive", "entity_rate": 0.3}
LIQUID = {
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "reconstruction_loss_coef": 0.3,
    "base_compression_ratio": 0.5,
}
CLASSIFIERS = {
    "dfn": lambda: DFNForSequenceClassification(DFNConfig(num_labels=3, **ADAPTIVE, **SIZES)),
    "liquid": lambda: LiquidForSequenceClassification(LiquidConfig(num_labels=3, **LIQUID, **SIZES)),
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)  # transformers' loss is in float32


def draw(make):
    torch.manual_seed(0)
    model = make().double()
    return model, torch.randint(2, 40, (3, 30))


def test_own_loss_of_adaptive_entities():
    model, ids = draw(lambda: DFNForCausalLM(DFNConfig(**ADAPTIVE, **SIZES)))
    with_labels = model(ids, labels=ids)
    assert with_labels.aux_loss > 0
    torch.testing.assert_close(with_labels.loss, with_labels.token_loss + with_labels.aux_loss)
    outputs = model(ids)
    own = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(own + outputs.aux_loss, with_labels.loss)
    assert_equal(gradients(model, own + outputs.aux_loss), gradients(model, model(ids, labels=ids).loss))


def test_own_loss_of_an_encoder_decoder():
    model, ids = draw(lambda: LiquidForSeq2SeqLM(LiquidConfig(**LIQUID, **SIZES)))
    target = ids[:, :9]
    inputs = {"input_ids": ids, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(target)}
    outputs = model(**inputs)
    own = F.cross_entropy(outputs.logits.flatten(0, 1), target.flatten())
    expected = model(**inputs, labels=target)
    assert outputs.aux_loss > 0
    torch.testing.assert_close(own + outputs.aux_loss, expected.loss)
    assert_equal(gradients(model, own + outputs.aux_loss), gradients(model, model(**inputs, labels=target).loss))
    assert model.eval()(**inputs).aux_loss is None


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_own_loss_of_classes(name):
    model, ids = draw(CLASSIFIERS[name])
    mask, classes = torch.ones_like(ids), torch.tensor([0, 2, 1])
    outputs = model(input_ids=ids, attention_mask=mask)
    own = F.cross_entropy(outputs.logits, classes)
    expected = model(input_ids=ids, attention_mask=mask, labels=classes).loss
    assert outputs.aux_loss > 0
    torch.testing.assert_close(own + outputs.aux_loss, expected)


@pytest.mark.parametrize(
    "make", [lambda: DFNForCausalLM(DFNConfig(**SIZES)), lambda: FlowNetworkForCausalLM(FlowNetworkConfig(**SIZES))]
)
def test_models_without_auxiliary_losses(make):
    model, ids = draw(make)
    assert "aux_loss" not in model(ids) and "aux_loss" not in model(ids, labels=ids)


def test_a_trainer_with_its_own_loss_keeps_the_rate_of_entities(tmp_path):
    """The rate of entities approaches `entity_rate` only if the auxiliary loss is trained."""
    rates = {}
    for with_aux in (True, False):
        torch.manual_seed(0)
        config = DFNConfig(entity_sampling="adaptive", entity_rate=0.15, ratio_loss_coef=1.0, **SIZES)
        model = DFNForCausalLM(config)

        def compute_loss(outputs, labels, num_items_in_batch=None, with_aux=with_aux):
            loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return loss + outputs.aux_loss if with_aux else loss

        rows = torch.randint(40, (64, 60), generator=torch.Generator().manual_seed(1)).tolist()
        trainer = Trainer(
            model,
            TrainingArguments(
                str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", max_steps=40, learning_rate=1e-2,
                per_device_train_batch_size=8, disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
            compute_loss_func=compute_loss,
        )  # fmt: skip
        trainer.train()
        with torch.no_grad():
            rates[with_aux] = model.eval()(torch.tensor(rows)).boundary_mask.float().mean().item()
    assert abs(rates[True] - 0.15) < 0.05 < abs(rates[False] - 0.15), rates
