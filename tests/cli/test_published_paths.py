"""Tests that no uploaded file of a model that a command wrote contains the host name or a local path."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.cli.app import app
from dfn_hf.hub.upload_files import read_model_folder
from tests.support.native_checkpoints import random_checkpoint

HOST = "private-host-7391"
SHORT = ["--max-steps", "1", "--batch-size", "2"]
TINY = [
    f"--config-override={field}"
    for field in ("hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=24")
]
TEXT = ["--data", "ALICE/poems", "--block-size", "32"]
PAIRS = ["--data", "ALICE/pairs.jsonl"]
# The commands that write a model, by its name; later ones use the models of earlier ones.
COMMANDS = {
    "lm": ["train", "lm", "ALICE/lm", *TEXT, "--tokenizer", "ALICE/tokenizer", *TINY, *SHORT],
    "lora": ["train", "lm", "ALICE/lora", *TEXT, "--init-from", "ALICE/lm", "--lora", *SHORT],
    "seq2seq": ["train", "seq2seq", "ALICE/seq2seq", *PAIRS, "--tokenizer", "byte", *TINY, *SHORT],
    "field": ["train", "field", "ALICE/field", "--data", "ALICE/field.npy", "--num-samples", "64", *TINY, *SHORT],
    "contrastive": ["train", "contrastive", "ALICE/contrastive", *PAIRS, "--tokenizer", "byte", *TINY, *SHORT],
    "llama": ["train", "lm", "ALICE/llama", *TEXT, "--tokenizer", "byte", "--model", "llama", *SHORT],
    "start": ["convert", "--from", "llama", "ALICE/llama", "ALICE/start"],
    "distilled": ["distill", "ALICE/distilled", "--student", "ALICE/start", "--teacher", "ALICE/llama", *TEXT, *SHORT],
    "dfn": ["convert", "ALICE/dfn.pt", "ALICE/dfn"],
    "dfn-native": ["convert", "ALICE/dfn.pt", "ALICE/dfn-native", "--native"],
    "flownetwork": ["convert", "ALICE/flow.pt", "ALICE/flownetwork"],
    "liquid": ["convert", "ALICE/liquid.pt", "ALICE/liquid"],
}
PROVENANCE = {
    "lm": "Trained on poems, in blocks of 32 tokens, from scratch.",
    "lora": "Trained on poems, in blocks of 32 tokens, from lm with LoRA of rank 16.",
    "seq2seq": "Trained on pairs.jsonl, in pairs of at most 256 tokens per side, from scratch.",
    "field": "Trained on field.npy, in crops of 64 samples, from scratch.",
    "contrastive": "Trained on pairs.jsonl, from scratch.",
    "start": "Converted from `llama` (layout llama).",
    "distilled": "Distilled from llama on poems, in blocks of 32 tokens, starting from start.",
    "dfn": "Converted from `dfn.pt`",
}


@pytest.fixture(scope="module")
def alice(tmp_path_factory):
    """A private folder with data, and with the models of all commands."""
    folder = tmp_path_factory.mktemp("home") / "alice"
    (folder / "poems").mkdir(parents=True)
    (folder / "poems" / "ode.txt").write_text("Thou still unravish'd bride of quietness.\n" * 100)
    pairs = [json.dumps({"source": f"{n} and one", "target": f"{n} y uno"}) + "\n" for n in range(60)]
    (folder / "pairs.jsonl").write_text("".join(pairs))
    np.save(folder / "field.npy", np.random.default_rng(0).random((16, 16), dtype=np.float32))
    for file, layout in {"dfn": "dfn", "flow": "flownetwork-F5", "liquid": "liquid-L6"}.items():
        random_checkpoint(folder / f"{file}.pt", layout)
    load_tokenizer("byte").save_pretrained(folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: HOST)
        for name, command in COMMANDS.items():
            arguments = [word.replace("ALICE", str(folder)) for word in command]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (name, result.output, result.exception)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_no_uploaded_file_names_this_machine(alice, name):
    files = read_model_folder(alice / name)
    print(name, sorted(files.uploaded), "left:", files.left)
    assert files.cleaned == [], "the files are written without paths"
    for path, file in files.uploaded.items():
        content = Path(file).read_bytes()
        for word in (str(alice), "alice", HOST):
            assert word.encode() not in content and word not in path, (path, word)
    assert PROVENANCE.get(name, "") in (alice / name / "README.md").read_text()


def test_logs_stay_here_and_their_names_hold_no_host_name(alice):
    logs = list((alice / "lm" / "runs").rglob("*tfevents*"))
    assert logs and str(alice).encode() in logs[0].read_bytes(), "TensorBoard writes the path of the output folder"
    assert not [path for path in alice.rglob("*") if HOST in path.name]
    assert "runs/" in read_model_folder(alice / "lm").left


def test_hub_ids_and_bundled_names_stay_whole(alice):
    output = alice / "tuned"
    words = ["train", "lm", str(output), "--init-from", "dfn-tiny", "--lora", "--data", str(alice / "poems")]
    result = CliRunner().invoke(app, [*words, "--block-size", "32", *SHORT])
    assert result.exit_code == 0, result.output
    assert "from dfn-tiny with LoRA of rank 16." in (output / "README.md").read_text()
    adapter = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "dfn-tiny"
    assert "base_model: dfn-tiny\n" in (output / "adapter" / "README.md").read_text()
