"""Tests which checkpoint a run resumes from, and which files of the output folder a run deletes."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.presets import new_causal_lm
from dfn_hf.storage.locks import folder_lock
from dfn_hf.storage.manifest import MANIFEST
from dfn_hf.training import run as run_module
from dfn_hf.training.checkpoints import begin_save, newest_complete_checkpoint
from dfn_hf.training.settings import TrainingSettings
from dfn_hf.training.trainer import train_model

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SETTINGS = TrainingSettings(max_steps=6, batch_size=2, save_steps=2, learning_rate=1e-2)


CHECKPOINT_FILES = [
    "model.safetensors", "config.json", "generation_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "training_args.bin", "tokenizer.json", "run.json",
]  # fmt: skip


class Fail(TrainerCallback):
    """Fails after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("power cut")


class Count(TrainerCallback):
    """Records the steps of a run."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def train(folder, *, callbacks=(), settings=SETTINGS, data_seed=0, **options):
    tokenizer = load_tokenizer("byte")
    ids = torch.randint(256, (16, 32), generator=torch.Generator().manual_seed(data_seed))
    blocks = [{"input_ids": row, "labels": row, "segment_ids": torch.zeros_like(row)} for row in ids]
    model = new_causal_lm(tokenizer, seed=1, **TINY)
    return train_model(
        model, tokenizer, blocks[4:], blocks[:4], folder, settings, progress=False, callbacks=callbacks, **options
    )  # fmt: skip


def interrupted(folder, step=5, **options):
    """Train until a failure after `step`; return the folder of the checkpoints."""
    with pytest.raises(RuntimeError, match="power cut"):
        train(folder, callbacks=[Fail(step)], **options)
    return folder / "checkpoints"


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    return train(folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with checkpoint-2 and checkpoint-4."""
    return interrupted(tmp_path_factory.mktemp("stopped") / "model").parent


def damage(path, kind, seed=0):
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return
    if kind == "flipped":
        content[random.Random(seed).randrange(len(content))] ^= 1 << random.Random(seed).randrange(8)
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "flipped": content}[kind])


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "flipped"])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_is_not_complete(stopped, tmp_path, name, kind):
    shutil.copytree(stopped, tmp_path / "model")
    checkpoints = tmp_path / "model" / "checkpoints"
    assert newest_complete_checkpoint(checkpoints)[0].name == "checkpoint-4"
    damage(checkpoints / "checkpoint-4" / name, kind)
    last, faults = newest_complete_checkpoint(checkpoints)
    assert last.name == "checkpoint-2"
    assert faults == {"checkpoint-4": f"{name} is {'missing' if kind == 'missing' else 'damaged'}"}


@pytest.mark.parametrize("kind", ["missing", "empty", "cut"])
def test_a_checkpoint_without_a_valid_manifest_is_not_complete(stopped, tmp_path, kind):
    shutil.copytree(stopped, tmp_path / "model")
    checkpoints = tmp_path / "model" / "checkpoints"
    damage(checkpoints / "checkpoint-4" / MANIFEST, kind)
    last, faults = newest_complete_checkpoint(checkpoints)
    assert last.name == "checkpoint-2"
    expected = "its save was interrupted" if kind == "missing" else f"{MANIFEST} is damaged"
    assert faults == {"checkpoint-4": expected}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(stopped, whole, tmp_path, caplog, name):
    shutil.copytree(stopped, tmp_path / "model")
    damage(tmp_path / "model" / "checkpoints" / "checkpoint-4" / name, "cut")
    count = Count()
    resumed = train(tmp_path / "model", resume=True, callbacks=[count])
    assert count.steps == [3, 4, 5, 6]
    assert f"checkpoint-4 is not complete ({name} is damaged): it is kept as checkpoint-4.damaged" in caplog.text
    assert (tmp_path / "model" / "checkpoints" / "checkpoint-4.damaged" / name).exists()
    assert "Resuming from" in caplog.text and "checkpoint-2" in caplog.text
    assert weights(resumed.folder) == weights(whole.folder)
    assert resumed.validation_loss == whole.validation_loss


def test_a_damaged_best_checkpoint_is_not_loaded(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "model")
    checkpoints = tmp_path / "model" / "checkpoints"
    state = json.loads((checkpoints / "checkpoint-4" / "trainer_state.json").read_text())
    other = {2: "checkpoint-2", 4: "checkpoint-4"}[state["best_global_step"]]
    damage(checkpoints / other / "model.safetensors", "cut")
    result = train(tmp_path / "model", resume=True)
    AutoModelForCausalLM.from_pretrained(result.folder)
    losses = {entry["step"]: entry["eval_loss"] for entry in result.history if "eval_loss" in entry}
    assert result.validation_loss in losses.values()


def test_no_complete_checkpoint_is_an_error(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "model")
    for number in (2, 4):
        damage(tmp_path / "model" / "checkpoints" / f"checkpoint-{number}" / "optimizer.pt", "cut")
    with pytest.raises(ValueError, match="no checkpoint in .* is complete: checkpoint-4 .optimizer.pt is damaged"):
        train(tmp_path / "model", resume=True)
    assert (tmp_path / "model" / "checkpoints" / "checkpoint-4" / "optimizer.pt").exists()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_a_run_without_a_valid_record_resumes(stopped, whole, tmp_path, content):
    shutil.copytree(stopped, tmp_path / "model")
    record = tmp_path / "model" / "checkpoints" / "run.json"
    record.unlink() if content is None else record.write_text(content)
    assert weights(train(tmp_path / "model", resume=True).folder) == weights(whole.folder)


def test_a_moved_run_resumes(stopped, whole, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path / "elsewhere" / "renamed")
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = train(Path("renamed"), resume=True)
    assert weights(resumed.folder) == weights(whole.folder)


def test_other_training_data_are_refused(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "model")
    with pytest.raises(ValueError, match="had training_data = '12 examples, .*resume with the same options and data"):
        train(tmp_path / "model", resume=True, data_seed=1)


def test_resume_continues_a_run_that_replaces_a_model(whole, tmp_path):
    folder = tmp_path / "model"
    train(folder, settings=replace(SETTINGS, max_steps=2))
    old = weights(folder)
    interrupted(folder, overwrite=True)
    assert weights(folder) == old
    count = Count()
    train(folder, resume=True, callbacks=[count])
    assert count.steps == [5, 6]
    assert weights(folder) == weights(whole.folder) != old
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and not (folder / "checkpoints").exists()


def test_resume_after_the_last_step_trains_no_further(whole, tmp_path, monkeypatch):
    folder = tmp_path / "model"

    def fail(*arguments, **options):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(run_module, "copy_logs", fail)
        train(folder)
    assert newest_complete_checkpoint(folder / "checkpoints")[0].name == "checkpoint-6"
    count = Count()
    resumed = train(folder, resume=True, callbacks=[count])
    assert count.steps == []
    assert weights(folder) == weights(whole.folder)
    assert resumed.validation_loss == whole.validation_loss
    assert resumed.initial_loss == whole.initial_loss


def test_a_finished_model_is_not_resumed(whole):
    with pytest.raises(ValueError, match="holds a finished model: choose another folder, or add --overwrite instead"):
        train(whole.folder, resume=True)


def test_files_of_others_in_the_checkpoints_stay(whole, tmp_path):
    folder = tmp_path / "model"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best.pt").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match=r"best\.pt"):
            train(folder, **options)
    assert (folder / "checkpoints" / "best.pt").read_text() == "mine"
    assert [path.name for path in folder.rglob("*")] == ["checkpoints", "best.pt"]


def test_files_that_appear_in_a_run_stay(whole, tmp_path):
    folder = tmp_path / "model"
    checkpoints = interrupted(folder)
    foreign = [folder / "train.log", checkpoints / "notes.txt", checkpoints / "checkpoint-2" / "notes.txt"]
    for path in foreign:
        path.write_text("mine")
    with pytest.raises(ValueError, match="was not written by a training run|which dfn-hf did not write"):
        train(folder, overwrite=True)
    resumed = train(folder, resume=True)
    assert weights(resumed.folder) == weights(whole.folder)
    assert [path.read_text() for path in foreign] == ["mine"] * 3


@pytest.mark.parametrize("name", ["small.txt", ".ssh/id", "runs/events.out.tfevents.1", "deep/model.safetensors"])
def test_overwrite_refuses_to_delete_files_of_others(whole, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(whole.folder, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    count = Count()
    with pytest.raises(ValueError, match=f"holds {name}, which dfn-hf did not write or which changed since"):
        train(folder, overwrite=True, callbacks=[count])
    assert count.steps == [] and (folder / name).read_text() == "mine"


def test_overwrite_refuses_a_changed_card(whole, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(whole.folder, folder)
    (folder / "README.md").write_text("My words.")
    with pytest.raises(ValueError, match=r"holds README.md, which .* changed since"):
        train(folder, overwrite=True)


def test_a_damaged_checkpoint_is_kept_when_a_model_is_replaced(whole, tmp_path):
    folder = tmp_path / "model"
    train(folder, settings=replace(SETTINGS, max_steps=2))
    damage(interrupted(folder, overwrite=True) / "checkpoint-4" / "optimizer.pt", "cut")
    train(folder, resume=True)
    assert weights(folder) == weights(whole.folder)
    assert (folder / "checkpoints" / "checkpoint-4.damaged" / "optimizer.pt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["mynotes.txt", "deep/notes.txt"])
def test_notes_in_an_interrupted_save_stay(stopped, whole, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(stopped, folder)
    partial = folder / "checkpoints" / "checkpoint-6"
    begin_save(partial)
    for path in (partial / "model.safetensors", partial / ".tmpAbc", partial / name):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    train(folder, resume=True)
    assert weights(folder) == weights(whole.folder)
    assert [path.read_text() for path in folder.rglob(name.rpartition("/")[2])] == ["mine"]
    assert not list(folder.rglob(".tmpAbc"))


def test_a_save_that_has_just_begun_is_removed(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "model")
    partial = tmp_path / "model" / "checkpoints" / "checkpoint-6"
    partial.mkdir()
    (partial / ".dfn-hf-.dfn-hf-saving.new").touch()
    train(tmp_path / "model", resume=True)
    assert not (tmp_path / "model" / "checkpoints").exists()


def test_an_interrupted_save_is_not_in_the_way(stopped, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(stopped, folder)
    begin_save(folder / "checkpoints" / "checkpoint-6")
    (folder / "checkpoints" / "checkpoint-6" / ".tmpAbc").write_text("half a file")
    train(folder, overwrite=True)
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("name", ["my-best", "checkpoint-4-backup", "deep/checkpoint-4"])
def test_copies_of_a_checkpoint_stay(stopped, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(stopped, folder)
    copy = folder / "checkpoints" / name
    shutil.copytree(folder / "checkpoints" / "checkpoint-4", copy)
    with pytest.raises(ValueError, match="was not written by a training run"):
        train(folder, overwrite=True)
    train(folder, resume=True)
    assert (copy / "optimizer.pt").exists() and (copy / MANIFEST).exists()


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/checkpoint-2"])
def test_links_are_not_followed(stopped, tmp_path, name):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    shutil.copytree(stopped, folder)
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    if name == "checkpoints":
        with pytest.raises(ValueError, match="checkpoints is a link, which is not followed"):
            train(folder, resume=True)
    else:
        train(folder, resume=True)
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before
    assert (folder / name).is_symlink()


def test_files_have_the_permissions_of_new_files(whole, tmp_path):
    (tmp_path / "new").touch()
    modes = {
        path.stat().st_mode for path in whole.folder.rglob("*") if path.is_file() and not path.name.startswith(".")
    }
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_two_runs_do_not_share_a_folder(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "model")
    with folder_lock(tmp_path / "model" / "checkpoints"):
        with pytest.raises(ValueError, match="another process is training in .*model: wait until it has ended"):
            train(tmp_path / "model", resume=True)


KILLED_IN_TWO = """
    import os, signal, sys
    from pathlib import Path
    from transformers import TrainerCallback
    from tests.training.test_checkpoints import train

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    folder, action = Path(sys.argv[1]), sys.argv[2]
    train(folder, resume=action == "resume", callbacks=[Kill()] if action == "kill" else [])
"""


def test_two_processes_resume_after_a_kill(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("\n".join(line[4:] for line in KILLED_IN_TWO.splitlines()))

    def launch(name, action):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", script, tmp_path / name, action]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    assert launch("whole", "train").returncode == 0
    assert launch("broken", "kill").returncode != 0
    assert {path.name for path in (tmp_path / "broken" / "checkpoints").glob("checkpoint-*")} >= {"checkpoint-4"}
    assert (tmp_path / "broken" / "checkpoints" / "checkpoint-4" / "rng_state_1.pth").exists()
    resumed = launch("broken", "resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "checkpoint-4" in resumed.stderr
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
