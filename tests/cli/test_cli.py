import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline
from typer.testing import CliRunner

import dfn_hf
from dfn_hf import presets, seq2seq_presets
from dfn_hf.assets import corpus, verses
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.cli import demonstration, options, train
from dfn_hf.cli import text as text_commands
from dfn_hf.cli.app import LAZY_GROUPS, app
from dfn_hf.cli.errors import is_user_error
from dfn_hf.cli.quiet import IMPORT_NOTICES, silence_libraries
from dfn_hf.data import lm_blocks as blocks
from dfn_hf.messages import message_of
from tests.support.marks import first_quickly

ROOT = Path(__file__).parents[2]
SMALL = ["--tokenizer", "byte", "--block-size", "48", "--batch-size", "4", "--max-steps", "4", "--save-steps", "2"]
TINY = [
    f"--config-override={field}"
    for field in ("hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=24")
]


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def fails(*arguments):
    """The one line on stderr that reports a mistake."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line and not line.startswith("Map")]
    assert line.startswith("Error: ")
    return line


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    lines = [f"The {number} men of Gotham went to sea in a bowl.\n" for number in range(300)]
    (folder / "gotham.txt").write_text("".join(lines))
    (folder / "gotham.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def model(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    result = run("train", "lm", folder, "--data", text / "gotham.txt", *SMALL, *TINY)
    assert result.exit_code == 0, result.output
    return folder


def test_trained_folder_loads_in_transformers(model):
    said = pipeline("text-generation", model=str(model))("The", max_new_tokens=5, do_sample=False)
    assert said[0]["generated_text"].startswith("The")


def test_generate_is_repeatable_and_streams_the_prompt(model):
    arguments = ("generate", model, "--prompt", "The men", "--max-new-tokens", 8, "--seed", 3)
    first, second = run(*arguments), run(*arguments)
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout
    assert first.stdout.startswith("The men")


def test_generate_without_a_prompt_starts_a_document(model):
    result = run("generate", model, "--max-new-tokens", 4, "--temperature", 0)
    assert result.exit_code == 0, result.output


def test_evaluate_prints_every_metric(model, text):
    result = run("evaluate", model, "--data", text / "gotham.txt", "--context-length", 64, "--stride", 32)
    assert result.exit_code == 0, result.output
    for metric in ("loss", "perplexity", "bits per byte", "top-1 accuracy", "top-5 accuracy", "bytes, 1 documents"):
        assert metric in result.stdout


def test_info_tells_size_state_and_provenance(model):
    result = run("info", model)
    assert result.exit_code == 0, result.output
    parameters = AutoModelForCausalLM.from_pretrained(model).num_parameters()
    assert f"{parameters:,}" in result.stdout
    assert "bytes per token" in result.stdout
    assert "Trained on gotham.txt, " in result.stdout


def test_info_state_of_a_llama_is_its_keys_and_values(text, tmp_path):
    result = run("train", "lm", tmp_path / "llama", "--data", text / "gotham.txt", "--model", "llama", *SMALL, *TINY)
    assert result.exit_code == 0, result.output
    layers, keys_and_values, hidden_size, bytes_each = 2, 2, 16, 4
    assert (
        f"{layers * keys_and_values * hidden_size * bytes_each} bytes per token"
        in run("info", tmp_path / "llama").stdout
    )


def test_info_state_of_a_flownetwork_is_its_slots():
    layers, chunk, bytes_each = 4, 64, 4
    slots, router_context = 16 * 128, 16
    expected = layers * (slots + router_context) * bytes_each // chunk
    assert f"{expected} bytes per token" in run("info", "flownetwork-tiny").stdout


def test_fine_tunes_with_lora_on_a_stream(model, text, tmp_path):
    result = run(
        *("train", "lm", tmp_path / "tuned", "--init-from", model, "--lora", "--lora-rank", 2),
        *("--data", text / "gotham.jsonl", "--text-field", "body", "--streaming", "--validation-blocks", 8),
        *("--block-size", 48, "--batch-size", 4, "--max-steps", 4, "--save-steps", 2),
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "tuned" / "adapter" / "adapter_model.safetensors").is_file()
    assert run("generate", tmp_path / "tuned", "--max-new-tokens", 2).exit_code == 0


def test_unknown_option_is_a_usage_error(model):
    assert run("generate", model, "--bogus").exit_code == 2


COMMANDS = [[command.callback.__name__] for command in app.registered_commands]
COMMANDS += [["train", command.callback.__name__] for command in train.app.registered_commands]


@pytest.mark.parametrize("command", [[], ["train"], ["bench"], *COMMANDS], ids=" ".join)
def test_help_of_every_command(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    if command in COMMANDS:
        assert "dfn-hf" in result.stdout


def test_help_names_every_command_and_group():
    listed = run("--help").stdout
    assert all(name in listed for name in (*LAZY_GROUPS, *(command[0] for command in COMMANDS)))


def test_version():
    result = run("--version")
    assert result.exit_code == 0 and result.stdout.strip() == f"dfn-hf {dfn_hf.__version__}"


def choices(annotation):
    """The values of an option with fixed choices."""
    literal, *_ = get_args(get_args(annotation)[0])
    return get_args(literal)


def test_choices_are_those_of_the_presets():
    assert choices(options.CausalModel) == presets.ARCHITECTURES
    assert choices(options.Seq2SeqModel) == seq2seq_presets.ARCHITECTURES
    assert choices(options.Size) == tuple(presets.SIZES)
    assert choices(options.Seq2SeqSize) == tuple(seq2seq_presets.SIZES)
    assert get_args(text_commands.Split) == corpus.SPLITS == verses.SPLITS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "MODEL", "--top-p", "0"], "top_p must be above 0"),
        (["generate", "nowhere"], "'nowhere' is neither a folder nor a Hub id"),
        (["info", "TEXT"], "holds no config.json"),
        (["evaluate", "MODEL", "--data", "TEXT/missing.txt"], "there is no file or folder"),
        (["train", "lm", "OUT", "--data", "TEXT/missing"], "there is no file or folder"),
        (["train", "lm", "OUT", "--data", "TEXT/gotham.jsonl"], "has no field 'text'"),
        (["train", "lm", "OUT", "--data", "EMPTY"], "holds no text"),
        (["train", "lm", "OUT", "--learning-rate", "0"], "learning_rate must be above 0"),
        (["train", "lm", "OUT", "--learning-rate", "1e999"], "learning_rate must be a finite number"),
        (["train", "lm", "OUT", "--config-override", f"hidden_size={10**400}"], "`hidden_size` must be at most"),
        (["train", "lm", "OUT", "--config-override", "hidden_size=" + 5000 * "9"], "--config-override hidden_size"),
        (["train", "lm", "OUT", "--config-override", "hidden_size=" + 9**5 * "["], "--config-override hidden_size"),
        (["train", "lm", "OUT", "--warmup-ratio", "1"], "warmup_ratio must be at least 0 and below 1"),
        (["train", "lm", "OUT", "--config-override", "hidden_size"], "not of the form NAME=VALUE"),
        (["train", "lm", "OUT", "--config-override", "hidden=3"], "no field 'hidden'"),
        (["train", "lm", "OUT", "--config-override", "hidden_size=33"], "`hidden_size` (33) must be a multiple"),
        (["train", "lm", "OUT", "--config-override", 'hidden_size="wide"'], "hidden_size"),
        (["train", "lm", "OUT", "--config-override", "vocab_size=9"], "leave out --config-override vocab_size"),
        (["train", "lm", "OUT", "--lora"], "--lora needs --init-from"),
        (["train", "lm", "OUT", "--init-from", "MODEL", "--tokenizer", "byte"], "leave out --tokenizer"),
        (["train", "lm", "OUT", "--init-from", "MODEL", "--size", "large"], "leave out --size"),
        (["train", "lm", "OUT", "--init-from", "MODEL", "--model", "llama"], "leave out --model"),
        (["train", "lm", "OUT", "--init-from", "nowhere"], "'nowhere' is neither a folder nor a Hub id"),
        (["train", "lm", "OUT", "--validation-data", "TEXT"], "--validation-data needs --data"),
        (["train", "lm", "MODEL", "--data", "TEXT/gotham.txt", "--init-from", "MODEL"], "is not empty"),
        (["train", "lm", "MODEL", "--resume"], "holds a finished model"),
        (["distill", "OUT", "--student", "MODEL", "--teacher", "nowhere"], "'nowhere' is neither"),
        (["convert", "TEXT/missing.pt", "OUT"], "there is no file"),
        (["convert", "TEXT/gotham.txt", "MODEL"], "exists already"),
        (["plot", "MODEL", "OUT"], "is not a picture"),
        (["push", "TEXT", "me/model"], "holds no config.json"),
    ],
)
def test_mistakes_are_one_clear_line_and_write_nothing(model, text, tmp_path, arguments, words):
    (tmp_path / "empty.txt").write_text("")
    places = {"MODEL": model, "TEXT": text, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty.txt"}
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    before = sorted(model.iterdir())
    assert words in fails(*arguments)
    assert not (tmp_path / "out").exists()
    assert sorted(model.iterdir()) == before


def test_tokenizer_with_ids_outside_the_vocabulary_is_named(model, tmp_path):
    shutil.copytree(model, tmp_path / "mixed")
    load_tokenizer("bpe").save_pretrained(tmp_path / "mixed")
    for command in ("generate", "evaluate"):
        assert "4096 tokens but the model's vocab_size is 258" in fails(command, tmp_path / "mixed")


def test_cut_off_weights_are_named(model, tmp_path):
    shutil.copytree(model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails("generate", tmp_path / "cut")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "dfn-tiny", "--max-new-tokens", "0"],
        ["generate", "dfn-tiny", "--top-k", "-1"],
        ["evaluate", "dfn-tiny", "--split", "dev"],
        ["train", "lm", "OUT", "--max-steps", "0"],
        ["train", "lm", "OUT", "--block-size", "1"],
        ["train", "lm", "OUT", "--size", "huge"],
        ["train", "lm", "OUT", "--lora", "--lora-rank", "0"],
        ["train", "lm"],
    ],
)
def test_values_out_of_range_are_usage_errors(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments).exit_code == 2
    assert not any(tmp_path.iterdir())


HEAVY = ("torch", "transformers", "datasets", "matplotlib", "peft", "accelerate", "pandas", "sacrebleu")
LIGHT = [
    ["--help"],
    ["--version"],
    ["train", "lm", "--help"],
    ["bench", "--help"],
    ["generate", "dfn-tiny", "--bogus"],
    ["evaluate", "no-such-folder/"],
    ["info", "no-such-model"],
    ["train", "lm", "OUT", "--data", "missing.txt"],
    ["train", "lm", "OUT", "--init-from", "missing"],
    ["train", "lm", "OUT", "--learning-rate", "0"],
    ["train", "lm", "."],
    ["translate", "liquid-tiny", "--data", "missing.jsonl"],
    ["convert", "missing.pt", "OUT"],
    ["plot", "dfn-tiny", "picture.txt"],
]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_help_and_mistakes_import_nothing_heavy(arguments, tmp_path):
    (tmp_path / "file.txt").write_text("")
    code = f"""
import atexit, sys
atexit.register(lambda: print("imported:", *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr))
from dfn_hf_cli import main
sys.argv = ["dfn-hf", *{arguments}]
main()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1] == "imported:", ended.stderr
    assert ended.returncode in (0, 1, 2) and "Traceback" not in ended.stderr


def test_notices_of_optional_packages_are_dropped_and_warnings_kept(caplog):
    silence_libraries()
    for name, notice in IMPORT_NOTICES.items():
        logging.getLogger(name).warning(notice)
        logging.getLogger(name).warning("another warning")
    assert [record.getMessage() for record in caplog.records] == len(IMPORT_NOTICES) * ["another warning"]


def test_missing_weights_are_one_sentence_and_a_whole_model_is_silent(model, tmp_path):
    shutil.copytree(model, tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    save_file({key: tensor for key, tensor in weights.items() if key != name}, tmp_path / "cut" / "model.safetensors")
    for folder in (tmp_path / "cut", model):
        command = [sys.executable, "-c", "from dfn_hf_cli import main; main()", "generate", folder]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        arguments = [*map(str, command), "--max-new-tokens", "1"]
        ended = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        if folder == model:
            assert (ended.returncode, ended.stderr) == (0, "")
        else:
            assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1
            assert f"model.safetensors does not fit config.json: 1 weight is missing ({name})" in ended.stderr


def test_missing_extras_are_named():
    error = ModuleNotFoundError("No module named 'matplotlib.pyplot'", name="matplotlib.pyplot")
    assert is_user_error(error)
    assert message_of(error) == "matplotlib is not installed: run pip install 'dfn-hf[plot]'"
    assert not is_user_error(ModuleNotFoundError("No module named 'dfn'", name="dfn"))


def test_traceback_on_request():
    result = run("--traceback", "generate", "nowhere")
    assert isinstance(result.exception, ValueError)


PICTURES = {"dfn": ("loss_curves.png", "flow_map.png"), "flownetwork": ("loss_curves.png", "flow_matrix.png")}


@pytest.mark.parametrize("architecture", first_quickly(PICTURES))
def test_demo_trains_compares_reloads_and_draws(architecture, tmp_path, monkeypatch, capfd):
    documents = {split: corpus.load_corpus(split).select(range(1)) for split in ("train", "validation")}
    short = {split: rows.map(lambda row: {"text": row["text"][:6000]}) for split, rows in documents.items()}
    for module in (blocks, demonstration):
        monkeypatch.setattr(module, "load_corpus", short.get)
    play = short["validation"][0]["text"]
    monkeypatch.setattr(demonstration, "MAPPED", (play[:40], play[900:940]))
    monkeypatch.setattr(demonstration, "READER", None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))

    demonstration.run_demo(tmp_path, architecture, steps=1)

    said = capfd.readouterr().out
    for words in ("perplexity", "bits/byte", "top-1", f"{architecture} ", "llama ", "To-morrow"):
        assert words in said
    for picture in PICTURES[architecture]:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for name in (architecture, "llama"):
        assert (tmp_path / name / "model.safetensors").is_file()


def test_demo_is_not_of_the_baseline(tmp_path):
    with pytest.raises(ValueError, match="dfn or flownetwork"):
        demonstration.run_demo(tmp_path, "llama")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [10**400, 2**70, -(2**70), "nan", "1e999", "x"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((["train", "lm", "OUT"], option) for option in ("--max-steps", "--batch-size", "--seed", "--block-size")),
        *((["generate", "MODEL"], option) for option in ("--max-new-tokens", "--top-k", "--seed")),
        *((["evaluate", "MODEL"], option) for option in ("--context-length", "--stride", "--batch-size")),
        *((["translate", "MODEL", "text"], option) for option in ("--num-beams", "--max-new-tokens")),
    ],
)
def test_numbers_out_of_range_are_named(command, option, value):
    result = CliRunner().invoke(app, [*command, option, str(value)], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and option in result.stderr and "Traceback" not in result.stderr
