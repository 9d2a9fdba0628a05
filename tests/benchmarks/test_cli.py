"""The command line of the benchmarks."""

import builtins
import subprocess
import sys
from pathlib import Path

from dfn_hf.benchmarks.cli.app import COMMANDS
from dfn_hf.benchmarks.cli.options import results_path

IMPORT = """
import sys
sys.modules["dfn_hf_cli"] = sys  # the command line, in which the package does not import torch
import dfn_hf.benchmarks.cli
heavy = {"torch", "transformers", "numpy", "datasets", "matplotlib", "peft", "sacrebleu"} & set(sys.modules)
sys.exit(", ".join(sorted(heavy)) or 0)
"""


def test_importing_the_commands_imports_nothing_heavy():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_commands_shadow_no_builtins():
    assert not [function.__name__ for function in COMMANDS.values() if hasattr(builtins, function.__name__)]


def test_the_default_results_are_in_benchmarks_if_the_folder_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert results_path(None, "lm.csv") == Path("benchmarks-results", "lm.csv")
    Path("benchmarks", "results").mkdir(parents=True)
    assert results_path(None, "lm.csv") == Path("benchmarks", "results", "lm.csv")
    assert results_path(Path("x.csv"), "lm.csv") == Path("x.csv")
