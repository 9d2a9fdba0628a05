"""Kills training, conversion, distillation and push, and checks the files that they leave.

Each attempt runs one command in a fork of this process and kills it with SIGKILL, before one of its file operations
or requests, or at a random moment. After the kill, the output folder must hold the old model or the new one, complete.
The command is then repeated. It must succeed with the same result as an undisturbed run, leave no temporary files, and
change no other file.

    python -m tests.campaigns.kill --kills 100      # random operations and random moments
    python -m tests.campaigns.kill --every          # before every operation
"""

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub import constants, get_session
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.hub.convert import convert, convert_llama
from dfn_hf.hub.push import push_folder
from dfn_hf.presets import new_causal_lm
from dfn_hf.storage.manifest import unknown_files
from dfn_hf.training.distillation import DistillationSettings, distill_model
from dfn_hf.training.settings import TrainingSettings
from dfn_hf.training.trainer import train_model
from tests.support.hub_server import TOKEN, Hub, serve_hub
from tests.support.native_checkpoints import random_checkpoint

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SETTINGS = {"max_steps": 4, "batch_size": 2, "save_steps": 2, "learning_rate": 1e-2}
LIMIT_S = 120
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
FINISHED = re.compile("holds a finished model|exists already")
REPOSITORY = "tester/model"
HUB: list[Hub] = []  # the running server


@dataclass
class Workplace:
    """A folder for one attempt: `model` is the output, `precious.txt` and `model.txt` belong to someone else."""

    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "model"

    @property
    def foreign(self) -> list[Path]:
        return [self.folder / "precious.txt", self.folder / "model.txt"]


@dataclass
class Scenario:
    """A command that is killed.

    Attributes:
        start: prepares the workplace.
        act: runs the command; `again` is True after a kill.
        result: what the command must have made in the end, to compare.
        whole: raises AssertionError unless the output after a kill is whole.
    """

    start: Callable[[Workplace], None]
    act: Callable[[Workplace, bool], None]
    result: Callable[[Workplace], object]
    whole: Callable[[Workplace], None]


def blocks() -> list[dict[str, torch.Tensor]]:
    """Packed blocks of random bytes, the same in every process."""
    ids = torch.randint(256, (12, 32), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row, "segment_ids": torch.zeros_like(row)} for row in ids]


def train(place: Workplace, resume: bool, *, overwrite: bool = False) -> None:
    tokenizer = load_tokenizer("byte")
    model = new_causal_lm(tokenizer, seed=1, **TINY)
    data, settings = blocks(), TrainingSettings(**SETTINGS)
    options = {"resume": resume, "overwrite": overwrite, "progress": False}
    train_model(model, tokenizer, data[4:], data[:4], place.output, settings, **options)


def distill(place: Workplace, resume: bool) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(place.folder / name) for name in ("start", "teacher"))
    data, settings = blocks(), DistillationSettings(**SETTINGS)
    options = {"resume": resume, "progress": False}
    distill_model(student, teacher, load_tokenizer("byte"), data[4:], data[:4], place.output, settings, **options)


def convert_original(place: Workplace, again: bool) -> None:
    convert(place.folder / "original.pt", place.output)


def push(place: Workplace, again: bool) -> None:
    push_folder(place.output, REPOSITORY)


def start_new(place: Workplace) -> None:
    """No output folder."""


def start_with_a_model(place: Workplace) -> None:
    """An output folder with an older model."""
    train_model(
        new_causal_lm(load_tokenizer("byte"), seed=2, **TINY), load_tokenizer("byte"), blocks()[4:], blocks()[:4],
        place.output, TrainingSettings(**SETTINGS), progress=False,
    )  # fmt: skip


def start_with_a_teacher(place: Workplace) -> None:
    """A Llama and a DFN converted from it."""
    tokenizer = load_tokenizer("byte")
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=64, **TINY)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place.folder / "teacher")
    tokenizer.save_pretrained(place.folder / "teacher")
    convert_llama(place.folder / "teacher", place.folder / "start", settings={"local_window": 8})


def start_with_an_original(place: Workplace) -> None:
    """A checkpoint of an original."""
    random_checkpoint(place.folder / "original.pt", "dfn")


def weights(place: Workplace) -> bytes:
    """The weights in the output folder."""
    return (place.output / "model.safetensors").read_bytes()


def check_output(place: Workplace) -> None:
    """The output folder holds the old model or the new one, whole."""
    if (place.output / "config.json").exists():
        AutoModelForCausalLM.from_pretrained(place.output)


def check_old_or_new(place: Workplace) -> None:
    """There is a model at every moment."""
    assert (place.output / "config.json").exists(), "the old model is gone"
    check_output(place)


def remote_files() -> set[str]:
    """Names in the repository; none if there is no repository."""
    return set(HUB[0].files(REPOSITORY)) - {".gitattributes"} if REPOSITORY in HUB[0].repositories else set()


def check_remote(place: Workplace) -> None:
    """The repository is empty, or holds all files."""
    names = remote_files()
    assert not names or {"config.json", "model.safetensors", "README.md"} <= names, names


@contextmanager
def local_hub() -> Iterator[None]:
    """Serve a Hub on this machine for push, in this process and its forks."""
    with (
        serve_hub() as hub,
        patch.multiple(constants, ENDPOINT=hub.address, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True),
        patch.dict(os.environ, HF_TOKEN=TOKEN),
    ):
        HUB.append(hub)
        yield
        HUB.clear()


SCENARIOS = {
    "train": Scenario(start_new, train, weights, check_output),
    "replace": Scenario(
        start_with_a_model, lambda place, again: train(place, again, overwrite=True), weights, check_old_or_new
    ),
    "distill": Scenario(start_with_a_teacher, distill, weights, check_output),
    "convert": Scenario(start_with_an_original, convert_original, weights, check_output),
    "push": Scenario(start_with_a_model, push, lambda place: remote_files(), check_remote),
}


def kill_before_operation(number: int, folder: Path, counted: list[int]) -> None:
    """Kill this process before its operation `number`; 0 only counts the operations.

    An operation changes a file below `folder`, or is a request to the Hub.
    """
    below = os.fsencode(folder)

    def count() -> None:
        counted[0] += 1
        if counted[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
        path = arguments[0] if changes else None
        if isinstance(path, str | bytes | os.PathLike) and os.fsencode(path).startswith(below):
            count()

    def send(*arguments: Any, **options: Any) -> Any:
        count()
        return unpatched(*arguments, **options)

    client = type(get_session())
    unpatched, client.send = client.send, send
    sys.addaudithook(hook)


def in_a_fork(work: Callable[[], None], log: Path, *, killed_after: float | None = None) -> int:
    """Run `work` in a fork with its output in `log`; return its status, -9 after SIGKILL.

    Args:
        killed_after: seconds after which the fork is killed.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + (LIMIT_S if killed_after is None else killed_after)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if killed_after is None:
                raise AssertionError(f"no end after {LIMIT_S} s")
            return -signal.SIGKILL
        time.sleep(0.005)


class Campaign:
    """Kills one scenario at many places.

    Args:
        name: a key of `SCENARIOS`.
        folder: an empty folder for the attempts.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.scenario, self.folder = name, SCENARIOS[name], folder
        self.prepared = folder / "prepared"
        self.prepared.mkdir(parents=True)
        self.log = folder / "log.txt"
        place = Workplace(self.prepared)
        for path in place.foreign:
            path.write_text("mine")
        assert in_a_fork(lambda: self.scenario.start(place), self.log) == 0, self.log.read_text()
        place = self.new_place()
        started = time.monotonic()
        self.operations = self.count_operations(place)
        self.seconds = time.monotonic() - started
        self.expected = self.scenario.result(place)

    def new_place(self) -> Workplace:
        """Copy the prepared workplace."""
        place = Workplace(self.folder / "attempt")
        shutil.rmtree(place.folder, ignore_errors=True)
        shutil.copytree(self.prepared, place.folder, symlinks=True)
        HUB[0].repositories.pop(REPOSITORY, None)
        return place

    def count_operations(self, place: Workplace) -> int:
        """Run the command undisturbed and return the number of its operations."""
        counts = self.folder / "operations"

        def work() -> None:
            counted = [0]
            kill_before_operation(0, place.folder, counted)
            self.scenario.act(place, False)
            counts.write_text(str(counted[0]))

        assert in_a_fork(work, self.log) == 0, self.log.read_text()
        return int(counts.read_text())

    def attempt(self, operation: int | None, seconds: float = 0.0) -> bool:
        """Kill the command before an operation, or after `seconds`, and check what follows.

        Returns:
            Whether the command was killed, and had not ended before.
        """
        place = self.new_place()

        def work() -> None:
            if operation is not None:
                kill_before_operation(operation, place.folder, [0])
            self.scenario.act(place, False)

        status = in_a_fork(work, self.log, killed_after=seconds if operation is None else None)
        killed = status == -signal.SIGKILL
        assert killed or status == 0, self.log.read_text()
        self.scenario.whole(place)
        assert in_a_fork(lambda: self.repeat(place), self.log) == 0, self.log.read_text()
        assert self.scenario.result(place) == self.expected, "another result"
        assert all(path.read_text() == "mine" for path in place.foreign), "a file of others changed"
        extra = {path.name for path in place.folder.iterdir()} - {path.name for path in self.prepared.iterdir()}
        assert extra <= {"model"}, extra
        assert unknown_files(place.output) == [], unknown_files(place.output)
        hidden = [path.name for path in place.output.iterdir() if path.name.startswith(".dfn-hf-")]
        assert hidden == [".dfn-hf-manifest.json"] and not (place.output / "checkpoints").exists(), hidden
        return killed

    def repeat(self, place: Workplace) -> None:
        """Run the command again; it may say that the model is there, if it was killed after that."""
        try:
            self.scenario.act(place, True)
        except ValueError as error:
            if not FINISHED.search(str(error)):
                raise


def run(names: list[str], kills: int, *, every: bool, seed: int) -> int:
    """Run the campaign and print a line per scenario; return the number of failures."""
    failures, drawn = 0, random.Random(seed)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            campaign = Campaign(name, Path(folder, "campaign"))
            places: list[tuple[int | None, float]] = [(number, 0.0) for number in range(1, campaign.operations + 1)]
            if not every:
                share = -(-kills // len(names))
                places = drawn.sample(places, min(share // 2 + share % 2, len(places)))
                places += [(None, drawn.uniform(0, campaign.seconds)) for _ in range(share // 2)]
            killed, started = 0, time.monotonic()
            for operation, seconds in places:
                where = f"operation {operation}" if operation is not None else f"{seconds:.3f} s"
                try:
                    killed += campaign.attempt(operation, seconds)
                except Exception as error:
                    failures += 1
                    print(f"{name}: killed at {where}: {error}", flush=True)
            print(
                f"{name:<10}{len(places):>5} attempts, {killed} killed, of {campaign.operations} operations, "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="attempts in all")
    parser.add_argument("--every", action="store_true", help="kill before every operation instead")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with local_hub():
        failures = run(arguments.scenarios, arguments.kills, every=arguments.every, seed=arguments.seed)
    print(f"{failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
