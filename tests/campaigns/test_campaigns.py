"""Short versions of the campaigns."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.campaigns.fuzz import checked, targets

ROOT = Path(__file__).parents[2]
SLOW_TARGETS = {"options": 12, "configuration": 30, "tokenizer": 30, "weights": 30}
ATTEMPTS = 60


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"tests.campaigns.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("name", targets())
def test_random_input_is_used_or_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for number in range(SLOW_TARGETS.get(name, ATTEMPTS)):
        checked(targets()[name], tmp_path, Random(f"{name} {number}"))


def test_commands_survive_kills():
    done = run("kill", "--kills", "10")
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("0 failures\n") and "replace" in done.stdout


def test_models_and_streams_are_measured():
    done = run("soak_models", "--models", "4", "--tokens", "300", "--names", "dfn-tiny")
    assert "4 models: " in done.stdout and "dfn-tiny: 299 tokens" in done.stdout, done.stderr
