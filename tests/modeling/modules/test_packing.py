"""Packed documents, however the call describes them, against the documents alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from dfn_hf import (
    DFNConfig,
    DFNForContrastive,
    DFNForSequenceClassification,
    DFNModel,
    FlowNetworkConfig,
    FlowNetworkForSequenceClassification,
    LiquidConfig,
    LiquidForSeq2SeqLM,
    LiquidForSequenceClassification,
    LiquidModel,
)
from dfn_hf.modeling.modules.packing import packed_documents
from tests.support.families import FAMILIES, VOCABULARY, draw_model

CAUSAL = [name for name in FAMILIES if not name.startswith("liquid")]
LENGTHS = (9, 12, 5)
COLLATED = {
    "position_ids": {},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "all": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def documents():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(VOCABULARY, (n,), generator=generator).tolist()} for n in LENGTHS]


@pytest.mark.parametrize("kind", COLLATED)
@pytest.mark.parametrize("family", CAUSAL)
def test_documents_of_the_flattening_collator_are_apart(family, kind):
    model = draw_model(family, 3)
    batch = DataCollatorWithFlattening(return_tensors="pt", **COLLATED[kind])(documents())
    with torch.no_grad():
        packed = model(**batch)
        alone = [model(torch.tensor([document["input_ids"]])).logits[0] for document in documents()]
    torch.testing.assert_close(packed.logits[0], torch.cat(alone), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_loss_does_not_score_the_first_token_of_a_document(family):
    model = draw_model(family, 3).eval()
    batch = DataCollatorWithFlattening(return_tensors="pt", **COLLATED["all"])(documents())
    ids, starts = batch["input_ids"], torch.tensor([0, 9, 21])
    labels = ids.index_fill(1, starts, -100)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
    with torch.no_grad():
        expected = model(ids, segment_ids=segments, labels=labels).loss
        for name in ("position_ids", "seq_idx", "cu_seq_lens_q"):
            assert torch.allclose(model(ids, labels=ids, **{name: batch[name]}).loss, expected, atol=1e-9, rtol=0)


def test_order_of_the_descriptions():
    """segment_ids before cu_seq_lens, before seq_idx, before position_ids, which a mask or a cache replaces."""
    given = {
        "cu_seq_lens_q": torch.tensor([0, 1, 6]),
        "cu_seq_lens_k": torch.tensor([0, 1, 6]),
        "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]]),
    }
    positions, segments = torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.tensor([[0, 0, 0, 0, 1, 1]])
    assert packed_documents((1, 6), segments, positions, True, **given).tolist() == [[0, 0, 0, 0, 1, 1]]
    assert packed_documents((1, 6), None, positions, True, **given).tolist() == [[0, 1, 1, 1, 1, 1]]
    assert packed_documents((1, 6), None, positions, True, seq_idx=given["seq_idx"]).tolist() == [[0, 0, 1, 1, 1, 1]]
    assert packed_documents((1, 6), None, positions, True).tolist() == [[0, 0, 0, 1, 1, 1]]
    assert packed_documents((1, 6), None, positions, False) is None
    assert packed_documents((1, 6), None, torch.arange(6)[None], True) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, r"cu_seq_lens_q must rise from 0 to the length 5.*\[0, 3\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 2, 5])}, "cu_seq_lens_q must rise"),
        ({"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 2, 5])}, "cu_seq_lens_k differ"),
        ({"seq_idx": torch.zeros(1, 4)}, r"seq_idx must be \[batch, length\] = \[1, 5\] or \[1, 5\], got \[1, 4\]"),
        ({"position_ids": torch.zeros(5)}, "position_ids must be"),
        ({"segment_ids": torch.zeros(1, 6)}, "segment_ids must be"),
    ],
)
def test_wrong_descriptions_are_refused(arguments, message):
    model = DFNModel(DFNConfig(**SIZES))
    with pytest.raises(ValueError, match=message):
        model(torch.randint(VOCABULARY, (1, 5)), **arguments)


def test_ends_of_documents_need_one_row():
    model = DFNModel(DFNConfig(**SIZES))
    with pytest.raises(ValueError, match="cu_seq_lens_q describes the documents of one row, but the batch has 2"):
        model(torch.randint(VOCABULARY, (2, 5)), cu_seq_lens_q=torch.tensor([0, 2, 5]))


@pytest.mark.parametrize("name", ["segment_ids", "seq_idx", "cu_seq_lens_q", "position_ids"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DFNForSequenceClassification(DFNConfig(**SIZES)),
        lambda: FlowNetworkForSequenceClassification(FlowNetworkConfig(**SIZES)),
        lambda: DFNForContrastive(DFNConfig(**SIZES)),
        lambda: LiquidModel(LiquidConfig(**SIZES)),
        lambda: LiquidForSeq2SeqLM(LiquidConfig(**SIZES)),
        lambda: LiquidForSequenceClassification(LiquidConfig(**SIZES)),
    ],
    ids=["dfn classes", "flownetwork classes", "contrastive", "liquid", "liquid seq2seq", "liquid classes"],
)
def test_models_of_whole_rows_refuse_packed_documents(make, name):
    described = {
        "segment_ids": torch.tensor([[0, 0, 0, 1, 1]]),
        "seq_idx": torch.tensor([[0, 0, 0, 1, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 5]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
    }
    ids = torch.randint(VOCABULARY, (1, 5))
    with pytest.raises(ValueError, match=f"{name} describes packed documents"):
        make()(input_ids=ids, **{name: described[name]})
