"""Tests that only unchanged recorded files count as written by this package."""

import os

import pytest

from dfn_hf.storage.manifest import (
    MANIFEST,
    changed_file,
    remove_known_files,
    unknown_files,
    write_manifest,
    write_text_atomically,
)


@pytest.fixture
def folder(tmp_path):
    """A folder with two recorded files."""
    folder = tmp_path / "model"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "adapter" / "weights").write_bytes(b"\0" * 1000)
    write_manifest(folder)
    return folder


def test_recorded_files_are_known_and_removed(folder):
    assert changed_file(folder) is None and unknown_files(folder) == []
    remove_known_files(folder)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["config.json", "adapter/weights"])
@pytest.mark.parametrize("change", ["same size", "cut", "gone"])
def test_a_change_is_found(folder, name, change):
    path = folder / name
    content = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(b"x" * len(content) if change == "same size" else content[:-1])
    assert changed_file(folder) == name
    if change != "gone":
        assert unknown_files(folder) == [path]
        remove_known_files(folder)
        assert [entry for entry in folder.rglob("*") if entry.is_file()] == [path]


@pytest.mark.parametrize("name", ["notes.txt", "adapter/notes.txt", "new/deep/notes.txt", ".env"])
def test_foreign_files_stay(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    assert unknown_files(folder) == [path]
    remove_known_files(folder)
    assert path.read_text() == "mine"
    assert [entry for entry in folder.rglob("*") if entry.is_file()] == [path]


def test_links_and_what_they_point_to_stay(folder, tmp_path):
    outside = tmp_path / "home"
    outside.mkdir()
    (outside / "key").write_text("mine")
    (folder / "home").symlink_to(outside)
    (folder / "key").symlink_to(outside / "key")
    (folder / "lost").symlink_to(tmp_path / "nothing")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(outside / "key")
    assert {path.name for path in unknown_files(folder)} == {"home", "key", "lost", "config.json"}
    remove_known_files(folder)
    assert (outside / "key").read_text() == "mine"
    assert {path.name for path in folder.iterdir()} == {"home", "key", "lost", "config.json"}


def test_empty_folders_are_removed(folder):
    (folder / "empty" / "deep").mkdir(parents=True)
    assert unknown_files(folder) == []
    remove_known_files(folder)
    assert not folder.exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"files": 3}', '{"files": {"config.json": 3}}', "[" * 10**5])
def test_a_damaged_manifest_proves_nothing(folder, content):
    (folder / MANIFEST).write_text(content)
    assert folder / "config.json" in unknown_files(folder)
    remove_known_files(folder)
    assert (folder / "config.json").exists()


def test_a_path_outside_the_folder_proves_nothing(folder, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (folder / MANIFEST).write_text('{"files": {"../precious": {"size": 4, "sha256": "0"}}}')
    remove_known_files(folder)
    assert (tmp_path / "precious").read_text() == "mine"


def test_text_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_text_atomically(path, "old")

    def fail(descriptor):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
