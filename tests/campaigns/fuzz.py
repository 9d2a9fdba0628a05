"""Random damaged and hostile input for everything that reads files, options or requests.

The targets are the functions `ATTEMPTS` of the modules in `MODULES`. Hypothesis draws their random numbers, keeps
failing examples in `.hypothesis/`, and tries them first in the next run. An attempt fails if it ends in an error that
the user cannot fix, takes more than 30 seconds of processor time, needs more than 2 GiB of additional memory, or
changes another file.

    python -m tests.campaigns.fuzz --minutes 10
    python -m tests.campaigns.fuzz --attempts 100000 --targets options weights
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers.utils import logging

MODULES = ("data_files", "original_checkpoints", "model_folders", "options", "requests")
SECONDS = 30  # of processor time, so that other work on the machine does not count
WAITING_SECONDS = 300
BYTES = 2 * 2**30
ROUND = 100  # attempts between two checks of the clock
FOREIGN = "This file belongs to someone else."

Attempt = Callable[[Path, Random], None]


def targets() -> dict[str, Attempt]:
    """The attempts of all modules by name."""
    modules = [import_module(f"tests.campaigns.{name}") for name in MODULES]
    return {attempt.__name__.removeprefix("attempt_"): attempt for module in modules for attempt in module.ATTEMPTS}


def peak_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def checked(attempt: Attempt, folder: Path, random: Random) -> None:
    """Run an attempt in a new folder below `folder`, and check its limits.

    Raises:
        AssertionError: it takes too long or too much memory, or changes a file of others.
    """
    place = folder / "attempt"
    shutil.rmtree(place, ignore_errors=True)
    (place / "work").mkdir(parents=True)
    foreign = [place / "precious.txt", place / "work.txt"]
    for path in foreign:
        path.write_text(FOREIGN)

    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"no end after {SECONDS} s of processor time or {WAITING_SECONDS} s")

    before = peak_bytes()
    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGPROF, stop)
    signal.alarm(WAITING_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        attempt(place / "work", random)
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = peak_bytes() - before
    assert grown < BYTES, f"{grown / 2**30:.1f} GB of memory"
    assert all(path.read_text() == FOREIGN for path in foreign), "changed a file of others"
    assert {path.name for path in place.iterdir()} == {"work", "precious.txt", "work.txt"}, "wrote beside its folder"


@dataclass
class Outcome:
    """Result of a target: the number of attempts, the seconds, and the first failure."""

    attempts: int = 0
    seconds: float = 0.0
    failure: str | None = None


def repeat(attempt: Attempt, folder: Path, outcome: Outcome, seconds: float, most: int) -> None:
    """Repeat an attempt until `seconds` have passed, `most` attempts are done, or one fails."""

    @settings(
        max_examples=ROUND,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        phases=(Phase.reuse, Phase.generate),
    )
    @given(st.randoms(use_true_random=True))
    def check(random: Random) -> None:
        outcome.attempts += 1
        checked(attempt, folder, random)

    started = time.monotonic()
    while outcome.failure is None and outcome.attempts < most and time.monotonic() - started < seconds:
        try:
            check()
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", ()))
            outcome.failure = f"{type(error).__name__}: {error} {notes}"
        outcome.seconds = time.monotonic() - started


def in_a_fork(attempt: Attempt, seconds: float, most: int, kept: Path) -> Outcome:
    """Repeat an attempt in a fork, which may crash; keep the folder of a failed attempt in `kept`."""
    with tempfile.TemporaryDirectory(prefix="dfn-hf-fuzz-") as temporary:
        folder, report = Path(temporary), Path(temporary, "report.json")
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as silence:
                os.dup2(silence.fileno(), 1)
                os.dup2(silence.fileno(), 2)
            outcome = Outcome()
            repeat(attempt, folder, outcome, seconds, most)
            report.write_text(json.dumps(vars(outcome)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        outcome = Outcome(**json.loads(report.read_text())) if report.exists() else Outcome()
        if status != 0:
            outcome.failure = f"the process ended with status {os.waitstatus_to_exitcode(status)}"
        if outcome.failure is not None:
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder / "attempt", kept, symlinks=True, ignore_dangling_symlinks=True)
        return outcome


def run(names: list[str], seconds: float, attempts: int | None, kept: Path) -> bool:
    """Run the targets one after the other and print a line for each; return whether none failed."""
    print(f"{'target':<20}{'attempts':>10}{'seconds':>9}")
    total, passed, known = 0, True, targets()
    for name in names:
        most = sys.maxsize if attempts is None else -(-attempts // len(names))
        outcome = in_a_fork(known[name], seconds / len(names), most, kept / name)
        total += outcome.attempts
        passed &= outcome.failure is None
        print(f"{name:<20}{outcome.attempts:>10,}{outcome.seconds:>9.0f}  {outcome.failure or ''}", flush=True)
    print(f"{total:,} attempts{'' if passed else f'; the folders of failed ones are in {kept}'}")
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="time for all targets")
    parser.add_argument("--attempts", type=int, help="attempts of all targets; default: as many as the time allows")
    parser.add_argument("--targets", nargs="+", choices=list(targets()), default=list(targets()))
    parser.add_argument(
        "--kept", type=Path, default=Path("build/fuzz"), help="folder for the files of failed attempts"
    )
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    sys.exit(not run(arguments.targets, 60 * arguments.minutes, arguments.attempts, arguments.kept))


if __name__ == "__main__":
    main()
