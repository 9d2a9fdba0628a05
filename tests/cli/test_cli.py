import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, pipeline
from typer.testing import CliRunner

from dfn_hf.assets import corpus
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.cli import demo
from dfn_hf.cli.app import app
from dfn_hf.data import lm_blocks as blocks
from tests.support.marks import first_quickly

SMALL = ["--tokenizer", "byte", "--block-size", "48", "--batch-size", "4", "--steps", "4", "--save-every", "2"]
TINY = [
    *("--set", "hidden_size=16", "--set", "num_hidden_layers=2", "--set", "num_attention_heads=2"),
    *("--set", "intermediate_size=24"),
]


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def fails(*arguments):
    """The one line that a mistake is answered with, after the progress bars of what went well before."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    said = [line for line in result.stderr.splitlines() if line and not line.startswith("Map")]
    assert len(said) == 1
    assert said[0].startswith("Error: ")
    return said[0]


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
    result = run("train", folder, "--data", text / "gotham.txt", *SMALL, *TINY)
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


def test_info_tells_size_state_and_provenance(model, text):
    result = run("info", model)
    assert result.exit_code == 0, result.output
    parameters = AutoModelForCausalLM.from_pretrained(model).num_parameters()
    assert f"{parameters:,}" in result.stdout
    assert "bytes per token" in result.stdout
    assert f"Trained on {text / 'gotham.txt'}" in result.stdout


def test_info_state_of_a_llama_is_its_keys_and_values(text, tmp_path):
    result = run("train", tmp_path / "llama", "--data", text / "gotham.txt", "--model", "llama", *SMALL, *TINY)
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
        *("train", tmp_path / "tuned", "--from", model, "--lora", "--lora-rank", 2),
        *("--data", text / "gotham.jsonl", "--text-field", "body", "--streaming", "--validation-blocks", 8),
        *("--block-size", 48, "--batch-size", 4, "--steps", 4, "--save-every", 2),
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "tuned" / "adapter" / "adapter_model.safetensors").is_file()
    assert run("generate", tmp_path / "tuned", "--max-new-tokens", 2).exit_code == 0


def test_unknown_option_is_a_usage_error(model):
    assert run("generate", model, "--bogus").exit_code == 2


COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)


@pytest.mark.parametrize("command", [[], ["bench"], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_of_every_command(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    if command and command != ["bench"]:
        assert "dfn-hf" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "MODEL", "--temperature", "-1"], "temperature must be at least 0"),
        (["generate", "MODEL", "--top-p", "0"], "top_p must be above 0"),
        (["generate", "MODEL", "--top-k", "-1"], "top_k must be at least 0"),
        (["generate", "MODEL", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["generate", "nowhere"], "'nowhere' is no folder and no Hub id"),
        (["info", "TEXT"], "holds no config.json"),
        (["evaluate", "MODEL", "--data", "TEXT/missing.txt"], "there is no file or folder"),
        (["evaluate", "MODEL", "--split", "dev"], "the corpus has no split 'dev'"),
        (["evaluate", "MODEL", "--context-length", "0"], "context_length must be at least 1"),
        (["train", "OUT", "--data", "TEXT/missing"], "there is no file or folder"),
        (["train", "OUT", "--data", "TEXT/gotham.jsonl"], "no text in the field 'text'"),
        (["train", "OUT", "--data", "EMPTY"], "holds no text"),
        (["train", "OUT", "--data", "TEXT/gotham.txt", "--block-size", "1"], "at least 2"),
        (["train", "OUT", "--steps", "0"], "max_steps must be at least 1"),
        (["train", "OUT", "--learning-rate", "0"], "learning_rate must be above 0"),
        (["train", "OUT", "--set", "hidden_size"], "not of the form FIELD=VALUE"),
        (["train", "OUT", "--set", "hidden=3"], "no field 'hidden'"),
        (["train", "OUT", "--set", "hidden_size=33"], "`hidden_size` (33) must be a multiple"),
        (["train", "OUT", "--set", 'hidden_size="wide"'], "hidden_size"),
        (["train", "OUT", "--size", "huge"], "size is 'huge'"),
        (["train", "OUT", "--lora"], "--lora needs --from"),
        (["train", "OUT", "--from", "MODEL", "--tokenizer", "byte"], "leave out --tokenizer"),
        (["train", "OUT", "--from", "MODEL", "--data", "TEXT", "--lora", "--lora-rank", "0"], "rank must be"),
        (["train", "OUT", "--validation-data", "TEXT"], "--validation-data needs --data"),
        (["train", "MODEL", "--data", "TEXT/gotham.txt", "--from", "MODEL"], "is not empty"),
        (["train", "MODEL", "--resume"], "holds a finished model"),
        (["train", "OUT", "--from", "MODEL", "--size", "large"], "leave out --size"),
        (["train", "OUT", "--from", "MODEL", "--model", "llama"], "leave out --model"),
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


def test_traceback_on_request():
    result = run("--traceback", "generate", "nowhere")
    assert isinstance(result.exception, ValueError)


PICTURES = {"dfn": ("loss_curves.png", "flow_map.png"), "flownetwork": ("loss_curves.png", "flow_matrix.png")}


@pytest.mark.parametrize("architecture", first_quickly(PICTURES))
def test_demo_trains_compares_reloads_and_draws(architecture, tmp_path, monkeypatch, capfd):
    documents = {split: corpus.load_corpus(split).select(range(1)) for split in ("train", "validation")}
    short = {split: rows.map(lambda row: {"text": row["text"][:6000]}) for split, rows in documents.items()}
    for module in (blocks, demo):
        monkeypatch.setattr(module, "load_corpus", short.get)
    play = short["validation"][0]["text"]
    monkeypatch.setattr(demo, "MAPPED", (play[:40], play[900:940]))
    monkeypatch.setattr(demo, "READER", None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(Path(demo.__file__).parents[1]), *sys.path])))

    demo.run_demo(tmp_path, architecture, steps=1)

    said = capfd.readouterr().out
    for words in ("perplexity", "bits/byte", "top-1", f"{architecture} ", "llama ", "To-morrow"):
        assert words in said
    for picture in PICTURES[architecture]:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for name in (architecture, "llama"):
        assert (tmp_path / name / "model.safetensors").is_file()


def test_demo_is_not_of_the_baseline(tmp_path):
    with pytest.raises(ValueError, match="dfn or flownetwork"):
        demo.run_demo(tmp_path, "llama")
    assert not any(tmp_path.iterdir())
