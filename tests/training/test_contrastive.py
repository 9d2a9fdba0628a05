"""Tests contrastive training: rows, sampler, recall, a run and its folder, sentence-transformers, the benchmark."""

import math
import wave
from functools import partial

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from dfn_hf import DFNConfig
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.assets.verses import load_verses
from dfn_hf.benchmarks.datasets.labelled_fields import handwritten_digit_fields
from dfn_hf.benchmarks.datasets.spoken_digits import CUTS, HELD_OUT, WORDS, spoken_digits
from dfn_hf.benchmarks.quality import contrastive
from dfn_hf.benchmarks.quality.contrastive import (
    TASKS,
    ContrastiveSettings,
    contrastive_runs,
    contrastive_table,
    measure_contrastive,
    run_contrastive,
)
from dfn_hf.data.audio import BANDS, read_recording, spectrum_field
from dfn_hf.data.contrastive import ContrastiveCollator, DistinctPairsSampler, pair_views, text_pairs, text_view
from dfn_hf.evaluation.retrieval_metrics import embed, retrieval, second_views
from dfn_hf.hub.sentence_embeddings import to_sentence_transformer
from dfn_hf.modeling.dfn.modeling_dfn_contrastive import DFNForContrastive
from dfn_hf.training.contrastive import train_contrastive
from dfn_hf.training.trainer import TrainingSettings

TEXTS = ["In the beginning God created the heaven", "And the earth", "hello", "Y la tierra estaba desordenada"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("byte")


def make_model(tokenizer, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return DFNForContrastive(
        DFNConfig(
            **sizes | {"local_window": 8, "num_neighbors": 0, "projection_dim": 24} | options,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def draw_fields(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "coordinates": torch.rand(5 + number, 2, generator=generator),
            "values": torch.randn(5 + number, 1, generator=generator),
        }
        for number in range(count)
    ]


def test_rows_are_padded_to_batches(tokenizer):
    rows = pair_views(draw_fields(4), text_view(TEXTS, tokenizer, max_length=9))
    batch = ContrastiveCollator(tokenizer.pad_token_id)(rows)
    assert set(batch) == {"coordinates", "values", "mask", "pair_input_ids", "pair_attention_mask"}
    assert batch["coordinates"].shape == (4, 8, 2) and batch["mask"].dtype == torch.bool
    assert batch["mask"].sum(dim=1).tolist() == [5, 6, 7, 8]
    assert batch["pair_input_ids"].shape == (4, 9) and batch["pair_attention_mask"][2].sum() == 5
    assert (batch["pair_input_ids"][2, 5:] == tokenizer.pad_token_id).all()
    assert second_views(rows)[1] == text_view(TEXTS, tokenizer, max_length=9)[1]
    verses = load_verses("validation").select(range(3))
    assert [list(row) for row in text_pairs(verses, tokenizer)] == 3 * [["input_ids", "pair_input_ids"]]
    with pytest.raises(ValueError, match=r"text 1 \(''\) has no tokens"):
        text_view(["a", ""], tokenizer)
    with pytest.raises(ValueError, match="first has 2 views and second has 1"):
        pair_views([{}, {}], [{}])


def test_batches_contain_no_second_view_twice(tokenizer):
    numbers = np.random.default_rng(0).integers(0, 6, 90)
    rows = pair_views(
        text_view([f"row {n}" + "." * int(n) for n in range(90)], tokenizer),
        text_view([f"caption {n}" for n in numbers], tokenizer),
    )
    sampler = DistinctPairsSampler(rows, 5, seed=1)
    epochs = [list(sampler), list(sampler)]
    assert epochs[0] != epochs[1]
    for order in epochs:
        assert len(order) % 5 == 0 and len(set(order)) == len(order) > 60
        for start in range(0, len(order), 5):
            assert len({numbers[number] for number in order[start : start + 5]}) == 5
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]
    with pytest.raises(ValueError, match="batch_size is 7 .* only 6 distinct"):
        DistinctPairsSampler(rows, 7)
    fields = pair_views(text_view(TEXTS[:2], tokenizer), 2 * draw_fields(1))
    with pytest.raises(ValueError, match="only 1 distinct"):
        DistinctPairsSampler(fields, 2)


def test_recall_equals_a_direct_count():
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(30, 6, generator=generator)
    pair_embeds = embeds + torch.randn(30, 6, generator=generator)
    found = retrieval(embeds, pair_embeds)
    similarity = embeds @ pair_embeds.T
    for best, share, back in (
        (1, found.recall_at_1, found.back_recall_at_1),
        (5, found.recall_at_5, found.back_recall_at_5),
        (10, found.recall_at_10, found.back_recall_at_10),
    ):
        hits = [row in similarity[row].topk(best).indices for row in range(30)]
        back_hits = [row in similarity[:, row].topk(best).indices for row in range(30)]
        assert (share, back) == pytest.approx((sum(hits) / 30, sum(back_hits) / 30))
    assert found.candidates == 30
    assert retrieval(torch.ones(3, 2), torch.ones(3, 2)).recall_at_1 == 0  # ties count against the model
    with pytest.raises(ValueError, match="equal shape"):
        retrieval(embeds, pair_embeds[:5])


def test_embeddings_do_not_depend_on_the_batch(tokenizer):
    model = make_model(tokenizer, contrastive_fields=True)
    collator = ContrastiveCollator(tokenizer.pad_token_id)
    for rows in (text_view(TEXTS, tokenizer), draw_fields(4)):
        interleave_lengths = embed(model, rows, collator, batch_size=3)
        for number, row in enumerate(rows):
            assert torch.allclose(embed(model, [row], collator)[0], interleave_lengths[number], atol=1e-5)


def test_training_improves_recall_and_the_saved_model_loads(tokenizer, tmp_path):
    words = [f"{a}{b}" for a in "abcdefgh" for b in "klmnop"]
    rows = pair_views(text_view(words, tokenizer), text_view([word.upper()[::-1] for word in words], tokenizer))
    model = make_model(tokenizer)
    settings = TrainingSettings(max_steps=60, batch_size=12, learning_rate=1e-2, save_steps=30)
    result = train_contrastive(
        model, tokenizer, rows, rows, tmp_path / "embedder", settings, provenance="Pairs of letters.", progress=False
    )
    assert result.validation_loss < 0.5 * math.log(12) < result.initial_loss
    loaded = DFNForContrastive.from_pretrained(result.folder)
    collator = ContrastiveCollator(tokenizer.pad_token_id)
    found = retrieval(embed(loaded, rows, collator), embed(loaded, second_views(rows), collator))
    assert found.recall_at_1 > 0.5
    card = (result.folder / "README.md").read_text()
    assert "sentence-similarity" in card and "Pairs of letters." in card and "text-generation" not in card
    code = card.split("```python\n")[1].split("```")[0].replace('"embedder"', f'"{result.folder}"')
    exec(compile(code, "card", "exec"), scope := {})
    assert scope["embeds"].shape == (2, 24)
    with pytest.raises(ValueError, match="48 pairs to train on but batch_size is 64"):
        train_contrastive(model, tokenizer, rows, rows, tmp_path / "x", TrainingSettings(batch_size=64))


def test_sentence_transformer_equals_the_model(tokenizer, tmp_path):
    model = make_model(tokenizer).eval()
    made = to_sentence_transformer(model, tokenizer)
    made.save(str(tmp_path / "sentences"))
    loaded = SentenceTransformer(str(tmp_path / "sentences"), device="cpu")
    expected = embed(model, text_view(TEXTS, tokenizer), ContrastiveCollator(tokenizer.pad_token_id))
    for sentences in (made, loaded):
        assert np.allclose(sentences.encode(TEXTS), expected, atol=1e-5)
    assert loaded.encode(TEXTS).shape == (4, 24)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "sentences"), type(model.model))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "sentences")) == len(tokenizer)


def write_wav(path, samples, rate=8000, width=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 2 ** (8 * width - 1)).astype(f"<i{width}").tobytes())


def test_tone_has_energy_in_its_mel_band_only(tmp_path):
    time = np.arange(4000) / 8000
    fields = []
    for hertz in (300, 2500):
        write_wav(tmp_path / f"{hertz}.wav", 0.5 * np.sin(2 * np.pi * hertz * time))
        samples, rate = read_recording(tmp_path / f"{hertz}.wav")
        assert rate == 8000 and samples.abs().max() == pytest.approx(0.5, abs=1e-3)
        fields.append(spectrum_field(samples, rate))
    low, high = (field["values"].mean(dim=0).argmax() for field in fields)
    assert low < high
    assert fields[0]["values"].shape == (len(fields[0]["coordinates"]), BANDS)
    assert fields[0]["coordinates"].diff(dim=0).numpy() == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(ValueError, match="but a window needs"):
        spectrum_field(torch.zeros(100), 8000)
    write_wav(tmp_path / "wide.wav", time, width=4)
    with pytest.raises(ValueError, match="32 bits"):
        read_recording(tmp_path / "wide.wav")
    write_wav(tmp_path / "empty.wav", [])
    with pytest.raises(ValueError, match="no sample"):
        read_recording(tmp_path / "empty.wav")
    with pytest.raises(ValueError, match="none.wav cannot be read .No such file"):
        read_recording(tmp_path / "none.wav")
    for rate in (1, 200):
        with pytest.raises(ValueError, match=f"the sampling rate is {rate} Hz but"):
            spectrum_field(torch.zeros(4000), rate)


def write_recordings(folder):
    """Write noise for each recording in `CUTS`, long enough to train on."""
    noise = partial(np.random.default_rng(0).uniform, -0.1, 0.1)
    for digit in range(10):
        write_wav(folder / f"sounds/en/digits/{digit}.wav", noise(4000))
    for line in CUTS.strip().splitlines():
        recording, takes = line.split(": ")
        seconds = max(float(take.rpartition("-")[2]) for take in takes.split(", "))
        write_wav(folder / f"sounds/en/{recording}.wav", noise(int(8000 * seconds) + 1))


def test_held_out_cuts_come_from_other_recordings(tmp_path):
    write_recordings(tmp_path)
    train, held_out = spoken_digits(tmp_path)
    assert len(train) == 112 and len(held_out) == 31
    assert {take.recording for take in held_out} == set(HELD_OUT)
    assert not {take.recording for take in train} & set(HELD_OUT)
    assert {take.word for take in train} == {take.word for take in held_out} == set(WORDS)
    assert all(0.2 < len(take.samples) / take.rate < 0.8 for take in held_out)
    with pytest.raises(ValueError, match="apt-get download"):
        spoken_digits(tmp_path / "sounds" / "en" / "digits" / "none")


def test_images_are_held_out_by_index():
    train, held_out = handwritten_digit_fields()
    assert (len(train.fields), len(held_out.fields)) == (1347, 450)
    assert held_out.fields[0]["values"].shape == (64, 1) and held_out.captions[7] == "a handwritten seven"


def test_table_has_a_row_per_model(tmp_path, monkeypatch):
    write_recordings(tmp_path)
    monkeypatch.setattr(contrastive, "CANDIDATES", 20)
    monkeypatch.setattr(contrastive, "AUGMENTED_COPIES", 1)
    small = {"steps": 2, "batch_size": 8, "hidden_size": 16, "pairs": 40}
    runs = [ContrastiveSettings(task=task, model=model, **small) for task, models in TASKS.items() for model in models]
    assert {(run.task, run.model) for run in contrastive_runs(TASKS, [0, 1])} == {
        (run.task, run.model) for run in runs
    }
    assert len(contrastive_runs(TASKS, [0, 1])) == 2 * len(runs) - 4
    finished = run_contrastive(runs, tmp_path / "contrastive.csv", tmp_path)
    assert run_contrastive(runs, tmp_path / "contrastive.csv") == finished
    table = contrastive_table(finished)
    assert len(table.splitlines()) == 2 + sum(len(models) for models in TASKS.values())
    parameters = {run.model: found.parameters for run, found in finished if run.task == "verses"}
    assert parameters["transformer"] == pytest.approx(parameters["dfn"], rel=0.02)
    with pytest.raises(ValueError, match="task is 'words'"):
        measure_contrastive(ContrastiveSettings(task="words"))
    with pytest.raises(ValueError, match="for images choose"):
        measure_contrastive(ContrastiveSettings(task="images", model="bytes"))
