"""Tests the evaluation of causal language models."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.evaluation.language_model import evaluate_causal_lm, scored_windows

DOCUMENTS = ["To be, or not to be.", "Ünïcode — “quotes”", "", "x"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("byte")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def losses_without_batching(model, tokenizer, context_length):
    """Losses and ranks over disjoint windows, without batching and masks."""
    losses, ranks = [], []
    for text in filter(None, DOCUMENTS):
        tokens = [tokenizer.bos_token_id, *text.encode()]
        for target in range(1, len(tokens)):
            start = (target - 1) // context_length * context_length
            with torch.no_grad():
                logits = model.eval()(torch.tensor([tokens[start:target]])).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[tokens[target]].item())
            ranks.append(logits.argsort(descending=True).tolist().index(tokens[target]))
    return losses, ranks


@pytest.mark.parametrize("context_length", [5, 64])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_equal_those_without_batching(model, tokenizer, context_length, batch_size):
    losses, ranks = losses_without_batching(model, tokenizer, context_length)
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)

    found = evaluate_causal_lm(model, tokenizer, DOCUMENTS, context_length=context_length, batch_size=batch_size)

    assert found.num_tokens == found.num_bytes == num_bytes == len(losses)
    assert found.num_documents == 3
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-5)
    assert found.top1_accuracy == sum(rank < 1 for rank in ranks) / len(ranks)
    assert found.top5_accuracy == sum(rank < 5 for rank in ranks) / len(ranks)


@pytest.mark.parametrize(
    ("length", "context_length", "stride"), [(2, 4, 4), (9, 4, 4), (23, 8, 3), (24, 5, 1), (8, 9, 2)]
)
def test_every_token_is_scored_once_with_the_documented_context(length, context_length, stride):
    scored = []
    for window, num_scored in scored_windows(list(range(length)), context_length, stride):
        assert len(window) <= context_length + 1
        scored += window[-num_scored:]
        for token in window[-num_scored:]:
            assert token - window[0] >= min(token, context_length - stride + 1)
    assert scored == list(range(1, length))


def test_later_tokens_do_not_change_scores(model, tokenizer):
    """A longer document adds token losses to the total and changes none."""
    short, longer = (
        evaluate_causal_lm(model, tokenizer, [text], context_length=16)
        for text in ("We are such", "We are such stuff")
    )
    with torch.no_grad():
        tokens = torch.tensor([[tokenizer.bos_token_id, *b"We are such stuff"]])
        logits = model(tokens[:, :16]).logits[0].log_softmax(-1)
    added = -sum(logits[at, tokens[0, at + 1]].item() for at in range(11, 16))
    last = -model(tokens[:, 16:17]).logits[0, 0].log_softmax(-1)[tokens[0, 17]].item()
    assert longer.loss * 17 == pytest.approx(short.loss * 11 + added + last, rel=1e-5)


def test_ties_count_against_the_model(model, tokenizer):
    class ConstantModel(torch.nn.Module):
        config = model.config
        device = torch.device("cpu")

        def forward(self, input_ids, **kwargs):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 258)})

    found = evaluate_causal_lm(ConstantModel(), tokenizer, DOCUMENTS, context_length=8)
    assert (found.top1_accuracy, found.top5_accuracy) == (0, 0)
    assert found.bits_per_byte == pytest.approx(math.log2(258))


def test_training_mode_is_kept(model, tokenizer):
    evaluate_causal_lm(model.train(), tokenizer, DOCUMENTS, context_length=8)
    assert model.training


@pytest.mark.parametrize(
    ("documents", "options", "words"),
    [
        (["", ""], {}, "no text"),
        (DOCUMENTS, {"context_length": 65}, "lower it to 64"),
        (DOCUMENTS, {"context_length": 0}, "context_length must"),
        (DOCUMENTS, {"context_length": 8, "stride": 9}, "stride must"),
        (DOCUMENTS, {"context_length": 8, "batch_size": 0}, "batch_size must"),
    ],
)
def test_errors_name_the_argument(model, tokenizer, documents, options, words):
    with pytest.raises(ValueError, match=words):
        evaluate_causal_lm(model, tokenizer, documents, **{"context_length": 64, **options})


def test_ids_outside_the_vocabulary_are_rejected(model):
    with pytest.raises(ValueError, match="4096 tokens but the model's vocab_size is 258"):
        evaluate_causal_lm(model, load_tokenizer("bpe"), DOCUMENTS, context_length=8)


def test_logits_that_are_not_finite_are_rejected(model, tokenizer):
    damaged = LlamaForCausalLM(model.config)
    damaged.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        evaluate_causal_lm(damaged, tokenizer, DOCUMENTS, context_length=8)
