"""`dfn-hf convert`: accepted files, errors, and written folders."""

import json
import os
import pickle
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dfn_hf.cli.app import app
from dfn_hf.conversion import writer as writing
from dfn_hf.conversion.checkpoint_file import read_checkpoint
from dfn_hf.conversion.detect import FORMATS
from dfn_hf.conversion.formats.dfn import DFN
from dfn_hf.conversion.key_table import compare_keys
from dfn_hf.conversion.report import read_report
from dfn_hf.hub.convert import convert
from tests.support.native_checkpoints import (
    SIZES,
    random_checkpoint,
    random_weights,
    save_checkpoint,
    save_those_in_docs,
)


@pytest.fixture(scope="module")
def weights():
    return random_weights(DFN.table, SIZES["dfn"], {"layer": 2})


@pytest.fixture
def checkpoint(weights, tmp_path):
    return save_checkpoint(tmp_path / "dfn.pt", weights)


def command(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def error_of(source, output, *options) -> str:
    """Run a conversion that must fail; return its error line, and check that it left nothing behind."""
    before = set(output.parent.iterdir())
    result = command(source, output, *options)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert set(output.parent.iterdir()) == before
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_command_writes_a_model_its_report_and_its_card(checkpoint, weights, tmp_path):
    result = command(checkpoint, tmp_path / "out", "--native", "--config-override", "num_entities=16")
    assert result.exit_code == 0
    report = read_report(tmp_path / "out")
    assert (
        f"{len(weights)} keys: {len(weights)} mapped to {len(weights)} weights, 0 dropped; 0 weights newly"
        in result.stdout
    )
    assert set(report.mapped) == set(weights)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'AutoModel.from_pretrained("out")' in card and "It is neither causal nor a language model." in card
    assert AutoModel.from_pretrained(tmp_path / "out").config.num_entities == 16


def test_report_counts_add_up(checkpoint, weights, tmp_path):
    report = convert(checkpoint, tmp_path / "out")
    assert report == read_report(tmp_path / "out")
    assert sorted([*report.mapped, *report.dropped]) == sorted(weights)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    filled = [name for names in report.mapped.values() for name in names]
    assert sorted([*filled, *report.new]) == sorted(saved)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_are_removed(weights, tmp_path, prefix):
    torch.save({prefix + key: tensor for key, tensor in weights.items()}, tmp_path / "wrapped.pt")
    report = convert(tmp_path / "wrapped.pt", tmp_path / "out")
    assert sorted([*report.mapped, *report.dropped]) == sorted(prefix + key for key in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_source_dtype_is_kept(weights, tmp_path, dtype):
    source = tmp_path / "dfn.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in weights.items()}, source)
    convert(source, tmp_path / "out")
    assert {
        tensor.dtype
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
        if "grid" not in name
    } == {dtype}
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == dtype


def test_files_of_old_torch_and_bare_weights_are_read(weights, tmp_path):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = read_checkpoint(tmp_path / "old.pth").tensors
    assert all(torch.equal(read[key], tensor) for key, tensor in weights.items())


def test_shards_equal_one_file(checkpoint, tmp_path, monkeypatch):
    convert(checkpoint, tmp_path / "one", native=True)
    monkeypatch.setattr(writing, "SHARD_BYTES", 4000)
    convert(checkpoint, tmp_path / "many", native=True)
    assert not (tmp_path / "many" / "model.safetensors").exists()
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    one, many = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(many[name], tensor) for name, tensor in one.items())


def test_new_weights_are_initialised_like_those_of_a_new_model(checkpoint, tmp_path):
    report = convert(checkpoint, tmp_path / "out")
    converted = AutoModel.from_pretrained(tmp_path / "out")
    fresh = type(converted)(converted.config).state_dict()
    for name in report.new:
        ours, theirs = converted.state_dict()[name], fresh[name]
        assert torch.isfinite(ours).all()
        if theirs.unique().numel() == 1 or not theirs.is_floating_point():
            assert torch.equal(ours, theirs)
        elif theirs.numel() > 100:
            assert abs(ours.std() / theirs.std() - 1) < 5 / theirs.numel() ** 0.5  # five standard deviations


def test_converted_folder_loads_without_this_package(checkpoint, tmp_path):
    for options in ({"native": True}, {}):
        folder = tmp_path / ("native" if options else "causal")
        convert(checkpoint, folder, **options)
        program = f"""
import sys
import zipfile
sys.modules["dfn_hf"] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
name, width = ("values", 10) if "Native" in type(model).__name__ else ("inputs_embeds", 12)
assert torch.isfinite(model(**{{name: torch.ones(1, 20, width)}})[0]).all()
"""
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


class Touch:
    """Object whose pickle creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old_format", [False, True])
def test_checkpoints_cannot_execute_code(weights, tmp_path, old_format):
    source = tmp_path / "evil.pt"
    content = {"model_state_dict": weights, "config": Touch(tmp_path / "touched")}
    torch.save(content, source, _use_new_zipfile_serialization=not old_format)
    message = error_of(source, tmp_path / "out")
    assert "posix.mkdir" in message and "could run code" in message
    source.write_bytes(pickle.dumps(Touch(tmp_path / "touched"), protocol=2))
    assert "could run code" in error_of(source, tmp_path / "out")
    assert not (tmp_path / "touched").exists()


def test_damaged_files_raise(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:-10], b"# Notes\n"):
        checkpoint.write_bytes(content)
        assert f"{checkpoint} is damaged or not a checkpoint" in error_of(checkpoint, tmp_path / "out")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(whole[:1000])
    assert "is damaged or not a checkpoint (Error while deserializing header" in error_of(broken, tmp_path / "out")
    assert "there is no file" in error_of(tmp_path / "none.pt", tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w.pop("dfn_layers.1.memory.memory"),
            "lacks 'dfn_layers.1.memory.memory' of the nearest format dfn",
        ),
        (
            lambda w: w.update({"extra.weight": torch.ones(2)}),
            "has the unexpected key 'extra.weight'; the nearest format is dfn",
        ),
        (lambda w: w.update({"dfn_layers.9999999999.memory.memory": torch.ones(2)}), "the nearest format is dfn"),
        (
            lambda w: w.update({"dfn_layers.0.field_mlp.mlp.0.weight": torch.ones(48, 12)}),
            "mlp.0.weight' has shape (48, 12), but the other weights require (48, 24)",
        ),
        (lambda w: w.update({"dfn_layers.0.memory.memory": torch.ones(5)}), "has shape (5,)"),
        (lambda w: w.update({"dfn_layers.0.memory.memory": torch.ones(5, 12).long()}), "save dense floats"),
        (lambda w: w.update({"dfn_layers.0.memory.memory": "text"}), "is a str, not a tensor"),
        (lambda w: [w.pop(key) for key in list(w)[3:]], "unknown checkpoint format (a key is"),
        (lambda w: w.clear(), "contains no weights"),
    ],
)
def test_wrong_keys_and_shapes_are_named(weights, tmp_path, change, message):
    weights = dict(weights)
    change(weights)
    assert message in error_of(save_checkpoint(tmp_path / "wrong.pt", weights), tmp_path / "out")


def test_settings_are_checked(checkpoint, tmp_path):
    assert "num_heads does not apply" in error_of(checkpoint, tmp_path / "out", "--num-heads", 4)
    override = "--config-override"
    assert "k is 'many': it must have type int" in error_of(checkpoint, tmp_path / "out", override, "k=many")
    assert "`k` (99) must be below `num_entities`" in error_of(
        checkpoint, tmp_path / "out", "--native", override, "k=99"
    )


@pytest.mark.parametrize(
    ("layout", "setting", "values"),
    [
        ("dfn", "k", [0, -1, 10**12]),
        ("dfn", "num_entities", [0, 10**12]),
        ("dfn", "alpha", [-1, float("nan"), float("inf"), 1e300, 10**400]),
        ("dfn", "sigma", [0, float("nan"), -1.0]),
        ("dfn", "beta", [-1, 2.0, float("nan")]),
        ("flownetwork-F1", "dense_limit", [-1, 10**12]),
        ("flownetwork-F4", "num_heads", [0, -8, 10**12, 2**70]),
        ("flownetwork-F4", "max_seq_len", [0, 10**12]),
        ("flownetwork-F4", "boundary_token_ids", [[-2], [10**12], [1.5], ["a"], [[1]], [True], [[[[]]]]]),
        ("liquid-L6", "dropout", [-0.1, 1, float("nan")]),
        ("liquid-L6", "compression_ratio", [0, 2, float("nan"), -1e300]),
        ("liquid-L6", "top_k", [0, -1, 10**12]),
        ("liquid-L6", "window_size", [0, 10**12]),
    ],
)
@pytest.mark.parametrize("native", [False, True])
def test_settings_out_of_range_are_refused(tmp_path, layout, setting, values, native):
    source = random_checkpoint(tmp_path / "a.pt", layout)
    stored = tmp_path / "stored.pt"
    for value in values:
        content = torch.load(source, weights_only=True)
        torch.save({**content, "config": {setting: value}}, stored)
        for path, settings in ((source, {setting: value}), (stored, {})):
            with pytest.raises(ValueError, match=f"{setting} is .*: it must be") as caught:
                convert(path, tmp_path / "out", native=native, settings=settings)
            assert len(str(caught.value)) < 300
    assert not (tmp_path / "out").exists()


def test_compressed_archives_are_refused(checkpoint, tmp_path):
    with zipfile.ZipFile(checkpoint) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, bytes(10**8) if name.endswith("data.pkl") else record)
    assert "bomb.pt is damaged or not a checkpoint (it is a compressed zip file)" in error_of(
        tmp_path / "bomb.pt", tmp_path / "out"
    )
    missing = tmp_path / "missing.pt"
    with zipfile.ZipFile(missing, "w") as archive:
        for name, record in records.items():
            if not name.endswith("/data/0"):
                archive.writestr(name, record)
    assert "missing.pt is damaged or not a checkpoint" in error_of(missing, tmp_path / "out")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(5, 12, device="meta"), "a tensor without data in the file"),
        (torch.ones(2**20, 2**20, device="meta"), "a tensor without data in the file"),
        (torch.ones(1).expand(2**40, 2**20), "is larger than its data in the file"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a tensor without data in the file"),
        (torch.ones(5, 12).to_sparse(), "save dense floats"),
    ],
)
def test_tensors_without_their_data_are_refused(weights, tmp_path, tensor, message):
    source = save_checkpoint(tmp_path / "a.pt", {**weights, "dfn_layers.0.memory.memory": tensor})
    assert message in error_of(source, tmp_path / "out")


def test_many_tensors_of_the_same_data_are_refused(weights, tmp_path):
    shared = torch.ones(500, 500)
    torch.save({f"layer.{number}": shared for number in range(9)}, tmp_path / "shared.pt")
    assert "save it again with tensors that share no data" in error_of(tmp_path / "shared.pt", tmp_path / "out")


@pytest.mark.parametrize("number", ["01", "٠", "9" * 30])
def test_numbers_of_layers_have_one_spelling(weights, tmp_path, number):
    key = f"dfn_layers.{number}.memory.memory"
    source = save_checkpoint(tmp_path / "a.pt", {**weights, key: torch.ones(5, 12)})
    assert f"the unexpected key '{key}'" in error_of(source, tmp_path / "out")


def test_numbers_of_two_placeholders_do_not_multiply(tmp_path):
    table = next(one.table for one in FORMATS if one.name == "liquid-L6")
    keys = {key.format(encoder_layer=5000, decoder_layer=5000, expert=5000, lstm_layer=5000) for key in table}
    counts, difference = compare_keys(table, keys | {str(number) for number in range(6000)})
    assert max(counts.values()) == 5001 and len(difference) < 20_000


def test_advice_of_torch_to_run_code_is_not_passed_on(weights, tmp_path):
    source = tmp_path / "a.pt"
    for content in (
        pickle.dumps({"a": 1}, protocol=4),
        pickle.dumps([1], protocol=0),
        b"# Notes",
        b"\x80\x02cos\nx\n.",
    ):
        source.write_bytes(content)
        message = error_of(source, tmp_path / "out")
        assert "a.pt" in message and "weights_only" not in message and "trust" not in message
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), source)
    assert "a.pt is damaged or not a checkpoint" in error_of(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({3: 0}, "contains 3"),
        ({"ab": 0}, "contains 'ab'"),
        ({"\ud800": 0}, "contains '.ud800'"),
        ({"z": 2**70}, "gives 'z' the id 1180591620717411303424"),
        ({"z": True}, "gives 'z' the id True"),
        ({"z": float("nan")}, "gives 'z' the id nan"),
        ({"z": 0, "y": 0}, "two characters the same id"),
    ],
)
def test_bad_vocabularies_are_refused(tmp_path, entry, message):
    content = torch.load(random_checkpoint(tmp_path / "a.pt", "flownetwork-F5"), weights_only=True)
    torch.save({**content, "stoi": entry}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.pt", tmp_path / "out")


def test_damaged_reports_are_named(tmp_path):
    for content in ("", "[]", '{"a": 1}'):
        (tmp_path / "conversion_report.json").write_text(content)
        with pytest.raises(ValueError, match="conversion_report.json is damaged"):
            read_report(tmp_path)


def test_existing_output_is_kept(checkpoint, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    assert "exists already" in error_of(checkpoint, output)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_full_disk_leaves_no_output(weights, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "dfn.pt", weights)
    done = subprocess.run(
        [sys.executable, "-m", "dfn_hf.cli", "convert", checkpoint, tmp_path / "out"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16000, 16000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "No space left on device while" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dfn.pt"]


def test_commands_in_the_documentation_run(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "convert.md").read_text(encoding="utf-8")
    save_those_in_docs(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    commands = [line.split("#")[0].split()[2:] for line in lines if line.startswith("dfn-hf convert ")]
    assert len(commands) >= 5
    for arguments in commands:
        result = command(*arguments)
        assert result.exit_code == 0, result.output


def test_converted_language_model_continues_a_prompt(tmp_path):
    convert(random_checkpoint(tmp_path / "flow.pt", "flownetwork-F5"), tmp_path / "out")
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "out"), "--prompt", "abc", "--max-new-tokens", "5"])
    assert result.exit_code == 0 and result.stdout.startswith("abc")
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "out")])
    assert result.exit_code == 1 and "or give a prompt" in result.stderr


def test_native_model_is_described_but_does_not_generate(tmp_path):
    convert(random_checkpoint(tmp_path / "flow.pt", "flownetwork-F5"), tmp_path / "out", native=True)
    result = CliRunner().invoke(app, ["info", str(tmp_path / "out")])
    assert result.exit_code == 0 and "flownetwork_native" in result.stdout
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "out"), "--prompt", "abc"])
    assert result.exit_code == 1 and "is not a language model" in result.stderr


def test_llama_without_a_tokenizer_raises(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "llama")
    assert "holds no tokenizer" in error_of(tmp_path / "llama", tmp_path / "out", "--from", "llama")
    assert "is a folder" in error_of(tmp_path / "llama", tmp_path / "out")


def test_missing_report_raises(tmp_path):
    with pytest.raises(ValueError, match="contains no conversion_report.json"):
        read_report(tmp_path)


@pytest.mark.slow  # writes and reads four gigabytes
def test_two_gigabytes_convert_with_bounded_memory(tmp_path):
    sizes = {"D": 1152, "F": 64, "I": 64, "M": 8, "R": 50}
    weights = random_weights(DFN.table, sizes, {"layer": 31})
    checkpoint = save_checkpoint(tmp_path / "large.pt", weights)
    size = checkpoint.stat().st_size
    assert size > 2e9
    del weights
    for options in ({"native": True}, {}):
        program = f"""
from dfn_hf.benchmarks.harness.environment import peak_memory_mib
from dfn_hf.hub.convert import convert
convert({str(checkpoint)!r}, {str(tmp_path / "-".join(["out", *options]))!r}, **{options!r})
print(peak_memory_mib("cpu") * 2**20)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split()[-1]) < 1.3 * size


def test_report_file_is_json(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert content["layout"] == "dfn" and content["mapped"] and content["dropped"] and content["new"]
