"""Benchmarks of long contexts: their tasks, their text, and their measurements."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from dfn_hf import DFNConfig, DFNForCausalLM
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.benchmarks.datasets.mqar import IGNORED
from dfn_hf.benchmarks.datasets.token_windows import TokenWindows
from dfn_hf.benchmarks.harness.results import ResultsFile
from dfn_hf.benchmarks.quality import long_lm
from dfn_hf.benchmarks.recall import retrieval
from dfn_hf.data.tokens import token_ids

DEPTHS, PAIRS = retrieval.DEPTHS, retrieval.PAIRS_PER_DEPTH


def small_dfn(vocab_size=64):
    torch.manual_seed(0)
    return DFNForCausalLM(DFNConfig(vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))


class TestRetrieval:
    def test_only_the_planted_pair_gives_the_answer(self):
        batch = retrieval.planted_batch(
            torch.Generator().manual_seed(0), batch_size=3, length=128, num_pairs=8, vocab_size=64
        )
        for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            answered = [column for column, label in enumerate(labels) if label != IGNORED]
            assert len(answered) == len({labels[column] for column in answered}) == 8
            for column in answered:
                key = tokens[column - 1]
                assert key < 32 and tokens.count(key) == 2
                assert tokens[tokens.index(key) + 1] == labels[column] and tokens.index(key) < column - 1

    def test_each_pair_occurs_once_at_its_depth(self):
        length = 8192
        context, keys, values = retrieval.planted_context(torch.Generator().manual_seed(0), length, 64)
        assert context.shape == (length,) and keys.shape == values.shape == (len(DEPTHS), PAIRS)
        assert (keys < 32).all() and (values >= 32).all() and len(set(values.flatten().tolist())) == values.numel()
        for depth, depth_keys, depth_values in zip(DEPTHS, keys, values, strict=True):
            for key, value in zip(depth_keys, depth_values, strict=True):
                (place,) = (context == key).nonzero()
                assert context[place + 1] == value
                assert abs(place.item() / length - depth) < 0.005
        assert set(context.tolist()) == set(range(64))

    @pytest.mark.parametrize(("changes", "field"), [({"length": 256}, "length"), ({"vocab_size": 30}, "vocab_size")])
    def test_impossible_contexts_are_rejected(self, changes, field):
        with pytest.raises(ValueError, match=f"^{field} is {changes[field]}"):
            retrieval.planted_context(torch.Generator(), **{"length": 8192, "vocab_size": 64, **changes})

    def test_a_too_short_context_is_rejected_before_training(self, tmp_path, monkeypatch):
        monkeypatch.setattr(retrieval, "trained_model", None)
        runs = [retrieval.RetrievalSettings(length) for length in (8192, 3999)]
        with pytest.raises(ValueError, match="^length is 3999: .* at least 4000 tokens"):
            retrieval.run_retrieval(runs, tmp_path / "runs.csv")
        retrieval.planted_context(torch.Generator().manual_seed(0), 4000, 64)

    def test_queries_do_not_see_each_other(self):
        model = small_dfn().eval()
        context, keys, _ = retrieval.planted_context(torch.Generator().manual_seed(0), 4096, 64)
        state = retrieval.read_context(model, context, chunk_length=1000)
        answers = [retrieval.answer_queries(model, state, keys.flatten()) for _ in range(2)]
        with torch.no_grad():
            expected = [
                model(input_ids=torch.cat([context, key[None]])[None], logits_to_keep=1).logits[0, -1].argmax()
                for key in keys.flatten()[:3]
            ]
        assert state.get_seq_length() == 4096
        assert torch.equal(*answers)
        assert answers[0][:3].tolist() == [answer.item() for answer in expected]
        assert len(set(answers[0].tolist())) > 1

    def test_the_model_is_fine_tuned_on_longer_rows(self, monkeypatch):
        lengths = []

        def noted(model, batches, **options):
            batch = next(batches)["input_ids"]
            lengths.append((tuple(batch.shape), options["steps"]))
            return fit(model, batches, **options)

        fit = retrieval.fit
        monkeypatch.setattr(retrieval, "fit", noted)
        settings = retrieval.RetrievalSettings(
            0, steps=1, tuning_steps=2, tuning_batch_size=1, tuning_length=80, tuning_num_pairs=3
        )
        tuned = retrieval.trained_model(settings, lambda line: None)
        untuned = retrieval.trained_model(replace(settings, tuning_steps=0), lambda line: None)
        assert lengths == [((1, 80), 2)]
        assert all(one.config.num_leaves == settings.num_leaves for one in (tuned, untuned))
        assert not torch.equal(tuned.model.embed_tokens.weight, untuned.model.embed_tokens.weight)

    def test_cache_mib_is_the_size_of_the_tensors(self):
        state = DynamicCache(config=small_dfn().config)
        assert retrieval.cache_mib(state) == 0
        state = retrieval.read_context(small_dfn().eval(), torch.zeros(64, dtype=torch.long), 64)
        held = [held.data for layer in state.layers for held in layer.states.values()]
        assert retrieval.cache_mib(state) * 2**20 == sum(data.untyped_storage().nbytes() for data in held) > 0

    def test_the_table_has_the_accuracy_per_depth(self):
        result = [
            retrieval.RetrievalResult(found=found, seconds=2.0, peak_mib=500, cache_mib=30, machine="m")
            for found in ([5, 4, 5], [3, 5, 5], [0, 0, 1])
        ]
        runs = [retrieval.RetrievalSettings(2**14, context) for context in (0, 1)]
        runs.append(retrieval.RetrievalSettings(2**14, num_neighbors=0))
        lines = retrieval.retrieval_table(list(zip(runs, result, strict=True))).splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        assert cells[2][:7] == ["16,384", "16", "1", "10", "0.80", "0.90", "1.00"]
        assert cells[3][:7] == ["16,384", "0", "1", "5", "0.00", "0.00", "0.20"]


class TestTokenWindows:
    def test_consecutive_windows_follow_each_other_within_documents(self):
        documents = [np.arange(10), np.arange(3), np.arange(100, 108)]
        windows = TokenWindows(documents, 4)

        def rows(max_windows):
            batches = windows.consecutive_batches(max_windows, 2)
            return torch.cat([batch["input_ids"] for batch in batches]).tolist()

        expected = [[0, 1, 2, 3], [4, 5, 6, 7], [100, 101, 102, 103], [104, 105, 106, 107]]
        assert rows(9) == expected
        assert rows(2) == expected[::2]


class TestLongLM:
    @pytest.mark.parametrize(
        ("length", "firsts"), [(200, [1]), (256, [1]), (257, [1, 256]), (4096, [1, 256, 512, 1024, 2048])]
    )
    def test_buckets_cover_all_positions(self, length, firsts):
        positions = torch.arange(1, length)
        buckets = [positions[bucket].tolist() for bucket in long_lm.position_buckets(length)]
        assert [bucket[0] for bucket in buckets] == firsts
        assert sum(buckets, []) == positions.tolist()

    @pytest.mark.parametrize("name", long_lm.TOKENIZERS)
    def test_token_bytes_sum_to_the_text(self, name):
        tokenizer = load_tokenizer(name)
        text = "“Où?” says he:\nnowhere  – at all"
        assert long_lm.token_bytes(tokenizer)[token_ids(text, tokenizer)].sum() == len(text.encode())

    def test_held_out_losses_equal_the_loss_of_the_model(self):
        model = small_dfn().eval()
        windows = torch.randint(64, (3, 20))
        batches = ({"input_ids": rows} for rows in windows.split(2))
        losses, targets = long_lm.held_out_losses(model, batches)
        assert losses.shape == (3, 19) and torch.equal(targets, windows[:, 1:])
        with torch.no_grad():
            expected = model(input_ids=windows, labels=windows).loss.item()
        assert losses.mean().item() == pytest.approx(expected, rel=1e-5)
        assert long_lm.bits_per_byte(losses, torch.full((3, 19), 2)) == pytest.approx(expected / math.log(4), rel=1e-5)

    def test_the_last_documents_are_held_out(self, tmp_path):
        texts = {f"{number}.txt": chr(97 + number) * size for number, size in enumerate((800, 150, 30, 30))}
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        train, held_out = long_lm.token_documents(str(tmp_path), "byte")
        assert [len(document) for document in train] == [800, 150]
        assert [len(document) for document in held_out] == [30, 30]

    def test_one_document_and_unknown_tokenizers_are_rejected(self, tmp_path):
        (tmp_path / "one.txt").write_text("alone")
        with pytest.raises(ValueError, match="has one document"):
            long_lm.token_documents(str(tmp_path), "byte")
        with pytest.raises(ValueError, match="tokenizer is 'words': choose one of bpe, byte"):
            long_lm.token_documents("corpus", "words")

    def test_the_best_rate_of_the_short_runs_is_used(self, tmp_path, monkeypatch):
        result = long_lm.LongLMResult(1, 2.0, 1.0, [2.0], [1.0], None, 1, 1.0, 1.0, 1.0, "m")
        losses = {1e-3: 3.0, 2e-3: 1.0, 4e-3: 2.0}
        monkeypatch.setattr(
            long_lm,
            "measure_long_lm",
            lambda settings, report: replace(result, loss=losses[settings.learning_rate]),
        )
        path = tmp_path / "long-lm.csv"
        ((run, _),) = long_lm.run_long_lm(
            long_lm.LongLMSettings(steps=9),
            models=["llama"],
            seeds=[0],
            learning_rates=list(losses),
            search_steps=3,
            path=path,
        )
        assert (run.learning_rate, run.steps, run.model) == (2e-3, 9, "llama")
        rows = ResultsFile(path, long_lm.LongLMSettings, long_lm.LongLMResult).rows()
        assert [settings.steps for settings, _ in rows] == [3, 3, 3, 9]
