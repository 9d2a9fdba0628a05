"""Errors of text generation."""

import pytest
import torch

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.evaluation import generate_text
from tests.support.small_models import make_small_model


@pytest.mark.parametrize("family", ["dfn", "flownetwork"])
def test_weights_that_are_not_finite_are_an_error(family):
    model = make_small_model(family, vocab_size=260)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not finite: its weights are damaged"):
        generate_text(model, load_tokenizer("byte"), "a", max_new_tokens=2)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_the_temperature_is_a_finite_number(temperature):
    with pytest.raises(ValueError, match="temperature must be at least 0 and finite"):
        generate_text(make_small_model("dfn", vocab_size=260), load_tokenizer("byte"), "a", temperature=temperature)
