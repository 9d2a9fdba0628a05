"""Benchmarks of DFN, models of other families and torch's attention over the length."""

import dataclasses
import sys

import pytest
import torch
from typer.testing import CliRunner

from dfn_hf.benchmarks.baselines.models import ModelSize, build_model, count_parameters
from dfn_hf.benchmarks.baselines.peer_models import build_peer
from dfn_hf.benchmarks.cli import app
from dfn_hf.benchmarks.cli.smoke import TABLES
from dfn_hf.benchmarks.harness import interleaving
from dfn_hf.benchmarks.harness.environment import without_isolation
from dfn_hf.benchmarks.harness.interleaving import Timing, expected_seconds, run_over_lengths
from dfn_hf.benchmarks.harness.length_plots import break_even, lengths_table
from dfn_hf.benchmarks.harness.results import ResultsFile
from dfn_hf.benchmarks.speed import peers, single_head
from dfn_hf.benchmarks.speed.paper_lengths import LENGTHS, REPORTED
from dfn_hf.benchmarks.speed.peers import PeerSettings, peer_runs
from dfn_hf.benchmarks.speed.single_head import COMPILED, EXACT, SDPA, TORCH, SingleHeadSettings

FAMILIES = ("lfm2", "mamba2", "reformer")
SIZE = ModelSize(vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256)


@dataclasses.dataclass(frozen=True)
class Settings:
    label: str
    length: int
    workload: str = "forward"
    repeats: int = 3

    @property
    def tokens(self):
        return self.length


def timed_as(seconds):
    """Return a `prepare` whose calls take `seconds(label, length)`, and the list of the labels called."""
    order = []

    def prepare(run):
        def turn():
            order.append(run.label)
            value = seconds(run.label, run.length)
            return Timing(value if isinstance(value, float) else next(value), 100.0, "m")

        return turn

    return prepare, order


class TestPeers:
    @pytest.mark.parametrize("name", FAMILIES)
    @pytest.mark.parametrize("hidden_size", [64, 128])
    @pytest.mark.parametrize("length", [1024, 65536])
    def test_parameter_counts_are_equal_within_two_percent(self, name, hidden_size, length):
        size = dataclasses.replace(SIZE, hidden_size=hidden_size, intermediate_size=4 * hidden_size)
        wanted = count_parameters(build_model("dfn", size))
        assert abs(count_parameters(build_peer(name, size, length=length)) / wanted - 1) < 0.02

    @pytest.mark.parametrize("name", FAMILIES)
    def test_no_token_attends_to_a_later_one(self, name):
        torch.manual_seed(0)
        model = build_peer(name, SIZE, length=256).train()
        embeds = model.get_input_embeddings()(torch.randint(256, (1, 256))).detach().requires_grad_()
        model(inputs_embeds=embeds, use_cache=False).logits[:, :150].square().sum().backward()
        assert embeds.grad[:, 150:].abs().max() == 0 < embeds.grad[:, :150].abs().amax(dim=-1).min()

    @pytest.mark.parametrize(("name", "changes"), [("lfm2", False), ("mamba2", False), ("reformer", True)])
    def test_only_reformer_predictions_depend_on_a_later_token(self, name, changes):
        torch.manual_seed(0)
        model = build_peer(name, SIZE, length=512).eval()
        tokens = torch.randint(256, (1, 512))
        changed = tokens.clone()
        changed[0, -1] = (tokens[0, -1] + 1) % 256
        with torch.no_grad():
            torch.manual_seed(1)
            before = model(tokens, use_cache=False).logits[:, :-1]
            torch.manual_seed(1)
            after = model(changed, use_cache=False).logits[:, :-1]
        assert bool((before - after).abs().max() > 1e-4) == changes

    @pytest.mark.parametrize("length", [1, 64, 100, 192, 1000])
    def test_a_reformer_takes_rows_of_every_length(self, length):
        with torch.no_grad():
            model = build_peer("reformer", SIZE, length=length).eval()
            logits = model(torch.randint(1, 256, (1, length)), use_cache=False).logits
        assert logits.shape == (1, length, 256) and logits.isfinite().all()

    @pytest.mark.parametrize("name", ["dfn", "llama", "lfm2", "mamba2"])
    def test_cached_steps_equal_a_full_pass(self, name):
        torch.manual_seed(0)
        model = build_peer(name, SIZE, length=64).eval()
        tokens = torch.randint(256, (1, 64))
        with torch.no_grad():
            state = None
            for chunk in (tokens[:, :60], *tokens[:, 60:63].split(1, dim=1)):
                state = peers._read(model, model, chunk, state)
            names = {"cache_params", "past_key_values"} & set(model.forward.__annotations__)
            step = model(tokens[:, 63:], use_cache=True, **dict.fromkeys(names, state)).logits[:, -1]
            whole = model(tokens, use_cache=False).logits[:, -1]
        assert torch.allclose(step, whole, rtol=0, atol=1e-4)

    def test_missing_packages_and_unknown_names_are_rejected(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "fla", None)
        monkeypatch.setitem(sys.modules, "fla.models", None)
        with pytest.raises(ValueError, match="pip install flash-linear-attention"):
            build_peer("gla", SIZE, length=64)
        with pytest.raises(ValueError, match="choose one of dfn, .*lfm2, mamba2, reformer, gla"):
            build_peer("rwkv", SIZE, length=64)
        for changed, field in (({"workloads": ["sleep"]}, "workload"), ({"caches": ["paged"]}, "cache")):
            options = {"models": ["dfn"], "workloads": ["forward"], "lengths": [8], "training_lengths": [8], **changed}
            with pytest.raises(ValueError, match=f"^{field} is "):
                peer_runs(PeerSettings(), **options)

    def test_runs_contain_only_supported_workloads(self):
        runs = peer_runs(
            PeerSettings(),
            models=["dfn", "reformer"],
            workloads=peers.WORKLOADS,
            lengths=[128, 64],
            training_lengths=[32],
            caches=["dynamic", "static"],
        )
        short = [(run.workload, run.label) for run in runs if run.length == 64]
        assert [run.length for run in runs if run.workload == "training"] == [32, 32]
        assert short == [
            ("forward", "dfn"),
            ("forward", "reformer"),
            ("prefill", "dfn"),
            ("decoding", "dfn"),
            ("decoding", "dfn, static cache"),
        ]

    def test_a_static_cache_uses_a_compiled_step(self, monkeypatch):
        compiled = []

        def as_it_is(model, config):
            compiled.append(model)
            return model

        monkeypatch.setattr("transformers.PreTrainedModel.get_compiled_call", as_it_is)
        settings = PeerSettings(
            model="llama",
            workload="decoding",
            cache="static",
            length=40,
            hidden_size=64,
            num_hidden_layers=1,
            repeats=1,
        )
        turn = peers.prepare_peer(settings)
        for _ in range(1 + settings.repeats):  # the capacity of the cache
            assert turn().seconds > 0
        assert len(compiled) == 1


@pytest.mark.parametrize("name", ["float99", "int8", "nn"])
def test_an_unknown_dtype_is_rejected(name):
    for prepare, settings in (
        (peers.prepare_peer, PeerSettings(dtype=name, length=8, hidden_size=16, num_hidden_layers=1)),
        (single_head.prepare_single_head, SingleHeadSettings(operation=single_head.TORCH, dtype=name, length=8)),
    ):
        with pytest.raises(ValueError, match=f"^dtype is '{name}': choose"):
            prepare(settings)


class TestRoundRobin:
    def test_runs_alternate_and_the_median_after_a_warm_up_is_returned(self, tmp_path):
        values = {"a": iter([9.0, 3.0, 1.0, 2.0]), "b": iter([8.0, 6.0, 7.0, 5.0])}
        prepare, order = timed_as(lambda label, length: values[label])
        results = ResultsFile(tmp_path / "runs.csv", Settings, Timing)
        with without_isolation():
            found = run_over_lengths([Settings("a", 10), Settings("b", 10)], results, prepare, 100)
        assert order == ["a", "b"] * 4
        assert [(run.label, timing.seconds) for run, timing in found] == [("a", 2.0), ("b", 6.0)]

    def test_lengths_alternate_if_interleaved(self, tmp_path):
        prepare, order = timed_as(lambda label, length: float(length))
        results = ResultsFile(tmp_path / "runs.csv", Settings, Timing)
        runs = [Settings(label, length) for length in (100, 200) for label in ("a", "b")]
        with without_isolation():
            found = run_over_lengths(runs, results, prepare, 0.0, interleave_lengths=True)
        assert order == ["a", "b", "a", "b"] * 4
        assert [timing.seconds for _, timing in found] == [100, 100, 200, 200]

    def test_too_long_runs_are_skipped_and_finished_ones_not_repeated(self, tmp_path):
        prepare, order = timed_as(lambda label, length: (length / 100) ** (2 if label == "slow" else 1))
        results = ResultsFile(tmp_path / "runs.csv", Settings, Timing)
        runs = [Settings(label, length) for length in (100, 200, 400, 800) for label in ("fast", "slow")]
        with without_isolation():
            found = run_over_lengths(runs, results, prepare, 17)
            assert [run.length for run, _ in found if run.label == "slow"] == [100, 200, 400]
            assert [run.length for run, _ in found if run.label == "fast"] == [100, 200, 400, 800]
            taken = len(order)
            assert run_over_lengths(runs, results, prepare, 17) == found and len(order) == taken

    def test_expected_seconds(self):
        run = Settings("a", 400)

        def past(length, seconds, label="a"):
            return Settings(label, length), Timing(seconds, 0.0, "m")

        assert expected_seconds([past(100, 1.0, "b")], run) == 0
        assert expected_seconds([past(100, 1.0)], run) == pytest.approx(4.0)
        assert expected_seconds([past(50, 9.0), past(100, 1.0), past(200, 8.0)], run) == pytest.approx(64.0)

    def test_the_previous_run_is_freed_before_the_next_is_prepared(self, monkeypatch):
        monkeypatch.setattr(interleaving, "_prepared", {})
        held = []

        def prepare(run):
            held.append(len(interleaving._prepared))
            return lambda: run

        assert [interleaving._timed_call(prepare, run) for run in ("a", "a", "b")] == ["a", "a", "b"]
        assert held == [0, 0]


class TestLengths:
    def test_break_even_is_interpolated(self):
        lengths = [100, 200, 400]
        assert break_even(lengths, [4.0, 8.0, 16.0], [1.0, 4.0, 16.0 * 4]) == pytest.approx(200 * 2 ** (1 / 3))
        assert break_even(lengths, [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]) == 0
        assert break_even(lengths, [2.0, 2.0, 2.0], [3.0, 3.0, 1.0]) is None

    def test_table(self):
        times = {("a", 100): 1.0, ("a", 200): 2.0, ("a", 400): 4.0, ("b", 100): 0.5, ("b", 200): 4.0}
        table = lengths_table(
            [(Settings(label, length), Timing(seconds, length, "m")) for (label, length), seconds in times.items()]
        )
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"]
        assert cells[2:] == [
            ["forward", "100", "10,000", "5,000", "0.50", "100", "100"],
            ["forward", "200", "10,000", "20,000", "2.00", "200", "200"],
            ["forward", "400", "10,000", "–", "–", "400", "–"],
        ]
        assert "forward, a: log-log slope 1.00 from 100 to 400 tokens" in table
        assert "forward: a is faster than b above 141 tokens" in table


class TestSingleHead:
    @pytest.mark.parametrize(
        ("length", "names"), [(300, (COMPILED["cpu"], EXACT, TORCH)), (1500, (COMPILED["cpu"], TORCH))]
    )
    def test_operations_on_the_same_neighbours_agree(self, length, names):
        found = []
        for name in names:
            settings = SingleHeadSettings(operation=name, length=length, heads=2, width=8)
            operate, inputs = single_head._flow_attention(settings, torch.Generator().manual_seed(0))
            for tensor in inputs:
                tensor.requires_grad_()
            with single_head.torch_operations_only() if name == TORCH else torch.enable_grad():
                y = operate()
                y.square().sum().backward()
            found.append([y, *(tensor.grad for tensor in inputs)])
        for native, *others in zip(*found, strict=True):
            assert native.abs().max() > 0
            assert all(torch.allclose(native, other, rtol=1e-4, atol=1e-4) for other in others)

    def test_torch_operations_only_restores_the_environment(self, monkeypatch):
        for before in (None, "0", "1"):
            monkeypatch.delenv(single_head.SWITCH, raising=False)
            if before is not None:
                monkeypatch.setenv(single_head.SWITCH, before)
            with single_head.torch_operations_only():
                assert single_head.os.environ[single_head.SWITCH] == "0"
            assert single_head.os.environ.get(single_head.SWITCH) == before

    @pytest.mark.parametrize("name", [COMPILED["cpu"], SDPA])  # in the others the search dominates
    def test_backward_takes_longer_than_forward(self, name):
        settings = SingleHeadSettings(operation=name, length=512)
        times = {}
        for workload in single_head.WORKLOADS:
            turn = single_head.prepare_single_head(dataclasses.replace(settings, workload=workload))
            turn()
            times[workload] = min(turn().seconds for _ in range(5))
        assert times["forward and backward"] > 1.2 * times["forward"] > 0

    def test_unavailable_operations_are_rejected(self, monkeypatch):
        with pytest.raises(ValueError, match="^operation is 'flow attention .Triton.'"):
            single_head.prepare_single_head(SingleHeadSettings(operation=COMPILED["cuda"]))
        with pytest.raises(ValueError, match="^workload is 'backward'"):
            single_head.prepare_single_head(SingleHeadSettings(workload="backward"))
        monkeypatch.setenv(single_head.SWITCH, "0")
        with pytest.raises(ValueError, match="needs a C compiler"):
            single_head.prepare_single_head(SingleHeadSettings())


def test_the_lengths_of_the_paper_are_measured():
    assert set(REPORTED) < set(LENGTHS)


@pytest.mark.parametrize("name", ["peers", "single-head", "paper-lengths"])
def test_a_second_call_measures_nothing(name, tmp_path, monkeypatch):
    arguments = next(table.command for table in TABLES if table.command.split()[0] == name).split()
    arguments += ["--model", "dfn", "--model", "llama"] if name == "peers" else []
    arguments += ["--results", str(tmp_path / "results.csv")]
    with without_isolation():
        first = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert first.exit_code == 0 and "machine: " in first.stdout
        assert name == "paper-lengths" or (tmp_path / "results.png").stat().st_size > 1000
        monkeypatch.setattr(ResultsFile, "_append", lambda *_: pytest.fail("a finished run was measured again"))
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).stdout == first.stdout
