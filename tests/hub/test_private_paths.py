"""Tests that local paths are recognised and shortened."""

from pathlib import Path

import pytest

from dfn_hf.hub.private_paths import find_private_path, public_name, without_paths


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/alice/secret/poems", "poems"),
        ("/home/alice/secret/poems/", "poems"),
        ("../secret/poems.jsonl", "poems.jsonl"),
        ("./poems", "poems"),
        ("deep/er/poems", "poems"),
        ("C:\\Users\\alice\\model", "model"),
        ("dfn-tiny", "dfn-tiny"),
        ("owner/name", "owner/name"),
        ("the verses of the World English Bible", "the verses of the World English Bible"),
        ("", ""),
    ],
)
def test_local_paths_lose_their_folders(source, name):
    assert public_name(source) == name


def test_existing_files_are_local_whatever_they_look_like(tmp_path, monkeypatch):
    (tmp_path / "alice" / "poems").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "alice")
    monkeypatch.chdir(tmp_path / "alice")
    assert public_name("..") == tmp_path.name and public_name(".") == "alice"
    monkeypatch.chdir(tmp_path)
    assert public_name("alice/poems") == "poems"
    assert public_name(Path("link")) == "link"  # the target of a link stays private


def test_fields_of_json_lose_their_folders():
    value = {
        "_name_or_path": "/home/alice/model",
        "base_model_name_or_path": "owner/name",
        "parts": [{"special_tokens_map_file": "/home/alice/.cache/map.json", "name_or_path": None}],
        "bos_token": "/home/alice/token",
    }
    assert without_paths(value) == {
        "_name_or_path": "model",
        "base_model_name_or_path": "owner/name",
        "parts": [{"special_tokens_map_file": "map.json", "name_or_path": None}],
        "bos_token": "/home/alice/token",
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Trained on HOME/secret/poems, in blocks.", "HOME/secret/poems"),
        ('"path": "HOME/x"', "HOME/x"),
        ("(see PARENT/notes.md)", "PARENT/notes.md"),
        ("HOME is a folder, and /usr/bin/python a program; https://hub/owner/name", None),
    ],
)
def test_paths_in_the_home_folder_and_beside_the_model_are_found(text, found, tmp_path, monkeypatch):
    home = tmp_path / "home" / "alice"
    monkeypatch.setenv("HOME", str(home))
    folder = tmp_path / "models" / "mine"

    def filled(text):
        return text.replace("HOME", str(home)).replace("PARENT", str(folder.parent))

    assert find_private_path(filled(text), folder) == (None if found is None else filled(found))


def test_folders_that_are_not_private_are_no_finding(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert find_private_path("/tmp/anything and /usr/bin/python", Path("/tmp/model")) is None
