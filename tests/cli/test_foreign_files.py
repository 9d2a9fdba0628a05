"""Tests that commands refuse to replace or delete files that they did not write, before they load anything."""

import pytest
from typer.testing import CliRunner

from dfn_hf.cli import app
from dfn_hf.cli.demonstration import run_demo


def refusal(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    return result.stderr


@pytest.mark.parametrize("command", ["lm", "seq2seq", "contrastive", "field"])
def test_training_data_in_the_output_folder_stay(tmp_path, command):
    folder = tmp_path / "poems"
    folder.mkdir()
    (folder / "poem.jsonl").write_text('{"text": "mine", "source": "a", "target": "b"}\n')
    for options in ([], ["--overwrite"], ["--resume"], ["--resume", "--overwrite"]):
        message = refusal("train", command, folder, "--data", folder, *options)
        assert "poem.jsonl" in message and message.startswith("Error: ")
    assert [path.name for path in folder.iterdir()] == ["poem.jsonl"]


def test_a_home_folder_behind_a_link_stays(tmp_path):
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    (tmp_path / "home" / ".ssh" / "id").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    assert "holds .ssh/id, which dfn-hf did not write" in refusal("train", "lm", tmp_path / "link", "--overwrite")
    assert (tmp_path / "home" / ".ssh" / "id").read_text() == "mine"


def test_the_current_folder_stays(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert "holds the current folder, which cannot be replaced" in refusal("train", "lm", ".", "--overwrite")
    assert "is not empty (it holds notes.txt): choose another folder\n" in refusal("train", "lm", ".")
    assert "exists already" in refusal("convert", __file__, ".")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["dfn/model.safetensors", "llama/notes.txt", "loss_curves.png", "flow_map.png"])
def test_a_demonstration_refuses_files_of_others(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=name.rpartition("/")[2]):
        run_demo(tmp_path, steps=1)
    assert (tmp_path / name).read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
