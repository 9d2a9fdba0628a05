"""transformers' pipelines in batches, against one input at a time."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import dfn_hf

TEXTS = ["In the beginning God created the heaven", "And the earth", "hello", "To be, or not to be, that is"]
CHECKPOINTS = ["dfn-tiny", "dfn-bytes", "flownetwork-tiny", "liquid-tiny"]
checkpoints = pytest.mark.parametrize("checkpoint", CHECKPOINTS)


@checkpoints
def test_features_in_batches(checkpoint):
    folder = dfn_hf.checkpoint_path(checkpoint)
    extract = pipeline(
        "feature-extraction", model=AutoModel.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    alone, together = ([np.array(features[0]) for features in extract(TEXTS, batch_size=size)] for size in (1, 2))
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other[: len(one)]).max() < 1e-3 or np.abs(one - other[-len(one) :]).max() < 1e-3


@checkpoints
def test_classes_in_batches(checkpoint):
    folder = dfn_hf.checkpoint_path(checkpoint)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    classify = pipeline(
        "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), top_k=None
    )
    alone, together = (classify(TEXTS, batch_size=size) for size in (1, 2))
    for one, other in zip(alone, together, strict=True):
        scores = [{each["label"]: each["score"] for each in row} for row in (one, other)]
        assert all(abs(scores[0][label] - scores[1][label]) < 1e-4 for label in scores[0])
