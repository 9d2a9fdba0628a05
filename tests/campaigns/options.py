"""Random options for every command.

Each attempt runs a command in this process with hostile values for one to three of its options. It raises
AssertionError unless the command works, or prints an error of one line and exits with code 1 or 2.
"""

import json
import os
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
from typer.main import get_command
from typer.testing import CliRunner

from dfn_hf.cli import app
from dfn_hf.hub.convert import convert_llama
from tests.campaigns.model_folders import valid_folder
from tests.support.native_checkpoints import random_checkpoint

TRAINING = ["--max-steps", "1", "--batch-size", "2"]
MODEL = ["--config-override", "hidden_size=16", "--config-override", "num_hidden_layers=1"]
# Arguments with which each command succeeds within seconds.
COMMANDS = {
    "train lm": ["out", "--data", "a.txt", "--block-size", "16", "--tokenizer", "byte", *TRAINING, *MODEL],
    "train seq2seq": ["out", "--data", "a.jsonl", "--init-from", "liquid", *TRAINING],
    "train field": ["out", "--data", "a.npy", "--num-samples", "16", *TRAINING, *MODEL],
    "train contrastive": ["out", "--data", "a.jsonl", "--tokenizer", "byte", *TRAINING, *MODEL],
    "distill": ["out", "--student", "start", "--teacher", "llama", "--data", "a.txt", "--block-size", "16", *TRAINING],
    "generate": ["dfn", "--max-new-tokens", "2"],
    "evaluate": ["dfn", "--data", "a.txt", "--context-length", "16"],
    "translate": ["liquid", "a", "--max-new-tokens", "2", "--num-beams", "1"],
    "convert": ["original.pt", "out"],
    "plot": ["dfn", "out.png", "--text", "To be, or not to be"],
    "info": ["dfn"],
    "push": ["dfn", "me/model"],
}
INTEGERS = ("0", "-1", "1", "2", "3", "7", "1e3", "1.5", "nan", "", "a", "0x10", str(2**63), str(2**70), "9" * 400)
FLOATS = ("0", "-1", "1", "2", "0.5", "1e-300", "1e300", "1e999", "nan", "inf", "-inf", "", "a", "9" * 400)
TEXTS = (
    "", " ", "a", "a.txt", "a.jsonl", "a.npy", "dfn", "liquid", "llama", "nothing", "../x", "/dev/null", "/dev/zero",
    "n" * 300, "a/" * 3000, "owner/name", "owner/name/x", "http://x", "\udcff", "-", "~", "*", "{}", "text", "source",
)  # fmt: skip
VALUES = ("", "0", "-1", "1", "3", "null", "true", "[]", "{}", "a", "NaN", "Infinity", "1e400", "9" * 400, "[" * 2000)
SLOW = {"--size"}  # a valid value makes a large model
MAX_LINE = 2000


@cache
def prepared() -> Path:
    """A folder with everything that the commands read; it stays until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="dfn-hf-fuzz-"))
    for family in ("dfn", "liquid", "llama"):
        shutil.copytree(valid_folder(family), folder / family)
    convert_llama(folder / "llama", folder / "start", settings={"local_window": 8})
    random_checkpoint(folder / "original.pt", "dfn")
    (folder / "a.txt").write_text("To be, or not to be, that is the question.\n" * 20)
    pairs = [{"source": f"a {number}", "target": f"b {number}", "text": "c"} for number in range(60)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    np.save(folder / "a.npy", np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    return folder


def attempt_options(folder: Path, random: random.Random) -> None:
    """Run a command with hostile values for some of its options."""
    place = folder / "place"
    shutil.copytree(prepared(), place)
    name = random.choice(list(COMMANDS))
    command = command_named(name)
    arguments = list(COMMANDS[name])
    options = [option for option in command.params if isinstance(option, click.Option) and option.name != "help"]
    for option in random.sample(options, min(len(options), random.choice((1, 1, 2, 3)))):
        arguments += hostile_option(option, random)
    if random.random() < 0.1:
        arguments[0] = random.choice((*TEXTS, "/", ".", ".."))
    before = contents(place)
    home = os.getcwd()
    os.chdir(place)
    try:
        result = CliRunner().invoke(app, [*name.split(), *arguments])
    finally:
        os.chdir(home)
    shown = f"dfn-hf {name} {' '.join(map(repr, arguments))}"
    failure = result.exception
    assert failure is None or isinstance(failure, SystemExit), f"{shown}: {type(failure).__name__}: {failure}"
    assert result.exit_code in (0, 1, 2), f"{shown}: exit code {result.exit_code}"
    if result.exit_code == 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert errors and len(errors[-1]) < MAX_LINE, f"{shown}: says {result.stderr[-300:]}"
    after = contents(place)
    changed = [path for path in before if after.get(path) != before[path]]
    assert not changed, f"{shown}: changed {changed}"


@cache
def command_named(name: str) -> Any:
    """The click command with this name."""
    command: Any = get_command(app)
    for part in name.split():
        command = command.commands[part]
    return command


def hostile_option(option: click.Option, random: random.Random) -> list[str]:
    """The option with a value that may be valid, of the wrong type or out of range."""
    name = random.choice(option.opts)
    if option.is_flag:
        return [random.choice([*option.opts, *option.secondary_opts])]
    if name == "--config-override":
        field = random.choice(("hidden_size", "position_dim", "num_neighbors", "is_causal", "dtype", "nothing", ""))
        return [name, f"{field}={random.choice(VALUES)}", *([name, "="] if random.random() < 0.1 else [])]
    if isinstance(option.type, click.Choice):
        values = TEXTS if name in SLOW else (*option.type.choices, "", "nothing")
    elif isinstance(option.type, click.types.IntParamType):
        values = INTEGERS
    elif isinstance(option.type, click.types.FloatParamType):
        values = FLOATS
    else:
        values = TEXTS
    return [name, random.choice(values)]


def contents(folder: Path) -> dict[Path, bytes]:
    """The files that no command may change, by path."""
    return {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and folder / "out" not in path.parents
    }


ATTEMPTS = (attempt_options,)
