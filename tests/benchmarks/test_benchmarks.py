import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from typer.main import get_command
from typer.testing import CliRunner

import dfn_hf.seq2seq_presets
from dfn_hf import LiquidConfig, LiquidForSeq2SeqLM
from dfn_hf.benchmarks.baselines.ablated_liquid import remove_frequency_attention
from dfn_hf.benchmarks.baselines.models import MODELS, ModelSize, build_model, count_parameters
from dfn_hf.benchmarks.cli import app, smoke
from dfn_hf.benchmarks.cli.smoke import TABLES, SmokeTable, leading_cells, run_smoke
from dfn_hf.benchmarks.datasets.byte_windows import ByteWindows, corpus_bytes
from dfn_hf.benchmarks.datasets.mqar import IGNORED, recall_accuracy, recall_batch, recall_batches
from dfn_hf.benchmarks.harness.environment import peak_memory_mib, run_isolated
from dfn_hf.benchmarks.harness.length_plots import log_log_slope
from dfn_hf.benchmarks.harness.results import ResultsFile, markdown_table, mean_with_error
from dfn_hf.benchmarks.harness.training_loop import fit
from dfn_hf.benchmarks.quality import byte_lm, translation
from dfn_hf.benchmarks.recall import associative_recall as recall
from dfn_hf.benchmarks.speed import seq2seq_speed
from dfn_hf.benchmarks.speed import throughput as speed
from dfn_hf.benchmarks.speed.scaling import (
    ScalingResult,
    ScalingSettings,
    scaling_table,
)
from dfn_hf.modeling.modules.row_layout import make_row_layout

TINY = ModelSize(vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256)


@dataclasses.dataclass(frozen=True)
class Settings:
    name: str
    rate: float


@dataclasses.dataclass(frozen=True)
class Result:
    steps: int | None
    loss: float
    machine: str


class TestResults:
    def test_a_finished_run_is_not_repeated(self, tmp_path):
        path, calls = tmp_path / "folder" / "runs.csv", []

        def measure(settings):
            calls.append(settings)
            return Result(steps=None, loss=float("nan"), machine="a, b")

        for _ in range(2):
            results = ResultsFile(path, Settings, Result)
            for rate in (1e-3, 3e-3):
                found = results.run(Settings("x, ±", rate), measure)
                assert found.steps is None and math.isnan(found.loss) and found.machine == "a, b"
        assert calls == [Settings("x, ±", 1e-3), Settings("x, ±", 3e-3)]

    def test_an_incomplete_row_is_measured_again(self, tmp_path):
        path = tmp_path / "runs.csv"
        results = ResultsFile(path, Settings, Result)
        for rate in (0.1, 0.2):
            results.run(Settings("x", rate), lambda settings: Result(1, 2.0, "m"))
        path.write_text(path.read_text()[:-10])
        assert [settings.rate for settings, _ in results.rows()] == [0.1]
        results.run(Settings("x", 0.2), lambda settings: Result(1, 3.0, "m"))
        assert [(settings.rate, found.loss) for settings, found in results.rows()] == [(0.1, 2.0), (0.2, 3.0)]

    def test_the_csv_of_another_benchmark_is_rejected_and_kept(self, tmp_path):
        path = tmp_path / "runs.csv"
        path.write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match="has the columns .*choose another --results file"):
            ResultsFile(path, Settings, Result)
        assert path.read_text() == "a,b\n1,2\n"

    def test_mean_with_standard_error(self):
        assert mean_with_error([1.0]) == "1.000"
        assert mean_with_error([1.0, 3.0], digits=1) == "2.0 ± 1.0"
        assert mean_with_error([1.0, None]) == "–"

    def test_table(self):
        assert markdown_table(("a", "bb"), [("ccc", "d")]) == "| a   | bb |\n|-----|----|\n| ccc | d  |"


class TestRecallTask:
    @pytest.mark.parametrize(("length", "num_pairs"), [(64, 8), (512, 60), (2048, 120), (16, 4)])
    def test_only_the_pair_gives_the_answer(self, length, num_pairs):
        batch = recall_batch(
            torch.Generator().manual_seed(0), batch_size=3, length=length, num_pairs=num_pairs, vocab_size=256
        )
        assert batch["input_ids"].shape == batch["labels"].shape == (3, length)
        for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            pairs = dict(zip(tokens[0 : 2 * num_pairs : 2], tokens[1 : 2 * num_pairs : 2], strict=True))
            answered = [column for column, label in enumerate(labels) if label != IGNORED]
            assert [pairs[tokens[column - 1]] for column in answered] == [labels[column] for column in answered]
            assert sorted(tokens[column - 1] for column in answered) == sorted(pairs)
            assert len(set(pairs.values())) == num_pairs
            for key in pairs:
                assert tokens.count(key) == 2

    def test_batches_depend_on_the_seed_alone(self):
        task = {"batch_size": 2, "length": 32, "num_pairs": 4, "vocab_size": 64}
        first, again, other = (next(recall_batches(seed, **task))["input_ids"] for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)

    def test_a_perfect_solver_has_accuracy_1(self):
        class Solver:
            device = torch.device("cpu")

            def __call__(self, input_ids, use_cache):
                logits = torch.zeros(*input_ids.shape, 256)
                for row, tokens in enumerate(input_ids.tolist()):
                    for column, token in enumerate(tokens[:-1]):
                        logits[row, column, tokens[tokens.index(token) + 1]] = 1.0
                return type("Outputs", (), {"logits": logits})

        task = {"batch_size": 4, "length": 64, "num_pairs": 8, "vocab_size": 256}
        assert recall_accuracy(Solver(), seed=0, num_batches=2, **task) == 1.0

    @pytest.mark.parametrize(("changes", "field"), [({"length": 31}, "length"), ({"num_pairs": 129}, "num_pairs")])
    def test_impossible_tasks_are_rejected(self, changes, field):
        task = {"batch_size": 1, "length": 32, "num_pairs": 8, "vocab_size": 256, **changes}
        with pytest.raises(ValueError, match=f"^{field} is {changes[field]}"):
            recall_batch(torch.Generator(), **task)


class TestByteText:
    def test_every_window_lies_within_one_document(self):
        texts = ["abcdefgh", "xy", "0123456", "é€"]
        windows = ByteWindows(texts, 5)
        documents = [text.encode() for text in texts]
        expected = [document[at : at + 5] for document in documents for at in range(len(document) - 4)]
        rows = np.concatenate([batch["input_ids"].numpy() for batch in windows.evenly_spaced_batches(len(windows), 4)])
        found = [bytes(row) for row in rows.astype(np.uint8)]
        assert found == expected

    def test_random_batches_depend_on_the_seed_alone(self):
        windows = ByteWindows(["".join(map(chr, range(32, 127)))], 8)
        first, again, other = (next(windows.random_batches(4, seed))["input_ids"] for seed in (1, 1, 2))
        assert first.shape == (4, 8) and torch.equal(first, again) and not torch.equal(first, other)

    def test_too_short_texts_are_rejected(self):
        with pytest.raises(ValueError, match="no document has 5 bytes"):
            ByteWindows(["abcd"], 5)

    def test_corpus_bytes(self):
        assert corpus_bytes(100_000).shape == (1, 100_000)
        with pytest.raises(ValueError, match="length is 1,000,000,000"):
            corpus_bytes(10**9)


class TestModels:
    @pytest.mark.parametrize("hidden_size", [64, 128])
    def test_parameter_counts_are_equal_within_two_percent(self, hidden_size):
        size = dataclasses.replace(TINY, hidden_size=hidden_size, intermediate_size=5 * hidden_size)
        dfn, *llamas = (count_parameters(build_model(name, size)) for name in MODELS)
        for llama in llamas:
            assert abs(llama / dfn - 1) < 0.02

    def test_unknown_names_and_impossible_sizes_are_rejected(self):
        with pytest.raises(ValueError, match="choose one of dfn, flownetwork, .*llama, llama-conv"):
            build_model("lstm", TINY)
        with pytest.raises(ValueError, match="raise intermediate_size"):
            build_model("llama", dataclasses.replace(TINY, intermediate_size=1, hidden_size=128))

    def test_convolution_starts_near_the_identity_and_is_causal(self):
        torch.manual_seed(0)
        model = build_model("llama-conv", TINY).eval()
        weight = model.model.layers[0].self_attn.conv.weight
        assert torch.all(weight[..., -1] == 1) and 0.2 < weight[..., :-1].std() < 0.4
        tokens = torch.randint(256, (1, 12))
        changed = tokens.clone()
        changed[0, 7] = (tokens[0, 7] + 1) % 256
        before, after = (model(ids, use_cache=False).logits for ids in (tokens, changed))
        assert torch.equal(before[:, :7], after[:, :7])
        assert not torch.allclose(before[:, 10], after[:, 10])

    @pytest.mark.parametrize("name", MODELS)
    def test_every_parameter_learns(self, name):
        torch.manual_seed(0)
        model = build_model(name, TINY)
        before = {key: parameter.clone() for key, parameter in model.named_parameters()}
        batches = recall_batches(0, batch_size=2, length=128, num_pairs=8, vocab_size=256)
        evaluated = []
        trained = fit(model, batches, steps=5, learning_rate=1e-2, evaluate_every=2, evaluate=evaluated.append)
        assert evaluated == [2, 4, 5]
        assert trained.seconds > 0 and trained.largest_gradient_norm > 0
        assert [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])] == []

    def test_divergence_stops_the_training(self):
        model = build_model("llama", TINY)
        batches = recall_batches(0, batch_size=2, length=32, num_pairs=4, vocab_size=256)
        model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
        evaluated = []
        trained = fit(model, batches, steps=5, learning_rate=1e-2, evaluate=evaluated.append)
        assert trained.largest_gradient_norm == math.inf and evaluated == [5]
        assert all(parameter.isfinite().all() for parameter in model.parameters())


class TestMachine:
    def test_a_fresh_process_has_a_separate_peak_and_passes_errors_on(self):
        ballast = torch.ones(2**27)
        assert run_isolated(peak_memory_mib, "cpu") < peak_memory_mib("cpu") - ballast.nbytes / 2**21
        with pytest.raises(ValueError, match="invalid literal"):
            run_isolated(int, "x")

    def test_slopes(self):
        assert log_log_slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
        assert log_log_slope([1], [3.0]) is None
        assert log_log_slope([1, 2], [0.0, 3.0]) is None


def test_scaling_table_has_slopes_and_time_per_token_and_head():
    results = [
        (ScalingSettings(length=n), ScalingResult(1, n / 1000, n / 2000, 500.0, 500.0 + n, "m")) for n in (1000, 2000)
    ]
    table = scaling_table(results)
    assert "| 1,000  | 1.00  | 125.00 " in table and "| 62.50 " in table
    assert "dfn: log-log slope of time 1.000, of memory beyond idle 1.000" in table


def run_cli(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


SMALLEST = {table.command.split()[0]: table.command for table in TABLES}


LONGER = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("ablations", "scaling", "million-tokens", "retrieval")
]


@pytest.mark.parametrize("name", ["recall", "lm", "long-lm", "reversal", "search", *LONGER])
def test_every_benchmark_prints_its_table_and_resumes(name, tmp_path, monkeypatch):
    arguments = SMALLEST[name].split()
    if name == "ablations":
        arguments += ["--variant", "FlowNorm rms"]
    path = tmp_path / "results.csv"
    first = run_cli(*arguments, "--results", path)
    assert "|--" in first and "machine: " in first
    rows = path.read_text()

    def forbid(*_, **__):
        raise AssertionError("a finished run was measured again")

    monkeypatch.setattr(ResultsFile, "_append", forbid)
    assert run_cli(*arguments, "--results", path) == first
    assert path.read_text() == rows


class TestSmoke:
    def test_every_command_has_a_table(self):
        commands = {command.name for command in app.registered_commands if command.name} | {"docs"}
        assert set(SMALLEST) | {"docs"} == commands and len(TABLES) == len(SMALLEST)

    def test_a_missing_row_is_reported(self):
        table = SmokeTable(SMALLEST["million-tokens"], [("one pass",), ("two passes",), ("chunks of 500",)])
        reports = []
        assert run_smoke(get_command(app), [table], reports.append) == [f"bench {table.command}: no row two passes"]
        assert reports[0].startswith("million-tokens: 2 of 3 rows")

    def test_the_command_fails_if_a_row_is_missing(self, monkeypatch):
        monkeypatch.setattr(smoke, "run_smoke", lambda group, report: ["bench lm: no row dfn"])
        result = CliRunner().invoke(app, ["--smoke"])
        assert result.exit_code == 1 and "no row dfn" in result.stderr
        monkeypatch.setattr(smoke, "run_smoke", lambda group, report: [])
        assert CliRunner().invoke(app, ["--smoke"]).exit_code == 0

    def test_leading_cells(self):
        assert leading_cells("x\n| a | b |\n|---|---|\n| 1 | 2 |\n", 1) == {("a",), ("---",), ("1",)}


def test_a_second_run_extends_the_csv(tmp_path):
    path = tmp_path / "lm.csv"
    smallest = SMALLEST["lm"].split()
    run_cli(*smallest, "--model", "llama", "--results", path)
    before = path.read_text()
    table = run_cli(*smallest, "--model", "llama", "--model", "llama-conv", "--results", path)
    assert path.read_text().startswith(before)
    assert "| llama " in table and "| llama-conv " in table


def test_models_train_on_the_same_batches(monkeypatch):
    seen = {}

    def record(model, batches, **_):
        seen[type(model).__name__] = [batch["input_ids"] for batch in itertools.islice(batches, 3)]
        raise StopIteration

    monkeypatch.setattr(byte_lm, "fit", record)
    settings = byte_lm.ByteLMSettings(hidden_size=32, intermediate_size=256, num_hidden_layers=1)
    for name in MODELS:
        with pytest.raises(StopIteration):
            byte_lm.measure_byte_lm(dataclasses.replace(settings, model=name))
    first, *others = seen.values()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_without_far_neighbours_the_configuration_is_restored(monkeypatch):
    model = type("Model", (), {"config": type("Config", (), {"num_neighbors": 16})})
    seen = []
    monkeypatch.setattr(recall, "long_recall", lambda model, settings: seen.append(model.config.num_neighbors) or 0.5)
    assert recall._long_recall_without_far(model, recall.RecallSettings()) == 0.5
    assert seen == [0] and model.config.num_neighbors == 16


@pytest.mark.slow
def test_translation_is_measured_beside_a_t5_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(dfn_hf.seq2seq_presets, "SIZES", {"tiny": {"hidden_size": 16, "num_hidden_layers": 1}})
    models = ["liquid", "no frequency attention", "no LSTM", "t5"]
    arguments = ["translation", *(word for model in models for word in ("--model", model)), "--max-steps", "2"]
    arguments += ["--search-steps", "1", "--learning-rate", "1e-3", "--batch-size", "4", "--pairs", "8"]
    arguments += ["--results", str(tmp_path / "translation.csv")]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    table = [line for line in first.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == models
    assert "chrF" in table[0]
    unscored = CliRunner().invoke(app, [*arguments, "--no-scores"])
    assert unscored.exit_code == 0 and "chrF" not in unscored.stdout
    every_rate = [*arguments, "--no-scores", "--learning-rate", "2e-3"]
    every_rate[every_rate.index("--search-steps") + 1] = "0"
    shown = CliRunner().invoke(app, every_rate)
    assert shown.exit_code == 0, shown.output
    cells = [line.split("|") for line in shown.stdout.splitlines() if line.startswith("|")]
    lines = [(line[1].strip(), line[3].strip()) for line in cells[2:]]
    assert lines == [(model, rate) for model in models for rate in ("0.001", "0.002")]
    monkeypatch.setattr(translation, "measure_translation", lambda *_: pytest.fail("a finished run was repeated"))
    assert CliRunner().invoke(app, arguments).stdout == first.stdout


@pytest.mark.parametrize(
    ("command", "models", "workloads"),
    [
        ("speed", ["flownetwork", "llama"], ["forward", "training", "decoding"]),
        pytest.param(
            "seq2seq-speed",
            ["liquid", "liquid-no-lstm", "t5"],
            ["encoder", "decoder", "joint", "training", "decoding"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_speed_has_every_line_and_does_not_measure_twice(command, models, workloads, tmp_path, monkeypatch):
    arguments = [command, "--length", "64", "--length", "128", "--repeats", "1"]
    arguments += ["--results", str(tmp_path / "speed.csv")]
    for module in (speed, seq2seq_speed):
        monkeypatch.setattr(module, "run_isolated", lambda measure, settings: measure(settings))
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    table = [[cell.strip() for cell in line.split("|")[1:3]] for line in first.stdout.splitlines() if line[:1] == "|"]
    assert table[2:] == [[workload, length] for workload in workloads for length in ("64", "128")]
    assert all(
        f"log-log slope of {workload}, {model}, 64 to 128:" in first.stdout
        for workload in workloads
        for model in models
    )
    for module in (speed, seq2seq_speed):
        monkeypatch.setattr(module, "run_isolated", lambda *_: pytest.fail("a finished run was repeated"))
    assert CliRunner().invoke(app, arguments).stdout == first.stdout


def test_without_frequency_attention_frames_stay_as_they_are():
    torch.manual_seed(0)
    config = LiquidConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, frame_length=8, min_compression_ratio=1)
    model = LiquidForSeq2SeqLM(config).double().eval()
    remove_frequency_attention(model)
    for embedding in (model.model.encoder.embedding, model.model.decoder.embedding):
        assert not [name for name, _ in embedding.named_parameters() if "q_proj" in name]
    embedding = model.model.encoder.embedding
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    c = plain_convolutions(embedding, x)
    found, _ = embedding(x, make_row_layout(2, 21, x.device))
    expected = embedding.proj_norm(embedding.proj(c + embedding.frequency_attention.project(c)))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def plain_convolutions(embedding, x):
    for conv in (embedding.conv1, embedding.conv2):
        x = torch.nn.functional.conv1d(x.transpose(1, 2), conv.weight, conv.bias, padding="same").transpose(1, 2)
        x = torch.nn.functional.gelu(x)
    return embedding.layer_norm(x)


def test_translation_batches_depend_on_the_seed_alone():
    pairs = Dataset.from_list([{"input_ids": [number], "labels": [number]} for number in range(10)])

    def numbers(seed):
        batches = translation.random_batches(pairs, 3, seed, lambda rows: [row["input_ids"][0] for row in rows])
        return list(itertools.islice(batches, 4))

    assert numbers(0) == numbers(0) != numbers(1)
    assert len({number for batch in numbers(0)[:3] for number in batch}) == 9
