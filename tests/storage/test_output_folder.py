"""Tests that an output folder holds its old content or its new content, and that leftovers are recovered."""

import os
import shutil

import pytest

from dfn_hf.storage import exchange as exchange_module
from dfn_hf.storage.exchange import ASIDE, exchange
from dfn_hf.storage.folder_checks import check_replaceable, check_writable
from dfn_hf.storage.locks import folder_lock
from dfn_hf.storage.manifest import MANIFEST, changed_file, unknown_files, write_manifest
from dfn_hf.storage.output_folder import UNFINISHED, atomic_output_dir, prepare_new_folder, recover_output_folder


def write(folder, text, *, replace=False):
    with atomic_output_dir(folder, replace=replace) as written:
        (written / "config.json").write_text(text)
        (written / "model.safetensors").write_text(text)


@pytest.fixture
def model(tmp_path):
    write(tmp_path / "out" / "model", "old")
    return tmp_path / "out" / "model"


def assert_whole(folder, text):
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", MANIFEST}
    assert (folder / "config.json").read_text() == (folder / "model.safetensors").read_text() == text
    assert changed_file(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_new_folder_and_a_replaced_one_are_whole(model):
    assert_whole(model, "old")
    write(model, "new", replace=True)
    assert_whole(model, "new")


def test_the_exchange_in_two_steps_is_the_same(model, monkeypatch):
    monkeypatch.setattr(exchange_module, "exchange_at_once", lambda first, second: False)
    write(model, "new", replace=True)
    assert_whole(model, "new")


def test_this_system_exchanges_at_once(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange_module.exchange_at_once(*(os.fsencode(tmp_path / name) for name in ("first", "second")))
    assert (tmp_path / "first" / "second").exists() and (tmp_path / "second" / "first").exists()
    exchange(tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "first" / "first").exists()


@pytest.mark.parametrize("replace", [False, True])
def test_a_failure_changes_nothing(model, tmp_path, replace):
    folder = model if replace else tmp_path / "out" / "other"
    with pytest.raises(RuntimeError), atomic_output_dir(folder, replace=replace) as written:
        (written / "config.json").write_text("new")
        raise RuntimeError
    assert_whole(model, "old")


def test_foreign_files_that_appear_meanwhile_stay(model):
    with pytest.raises(ValueError, match="holds notes.txt, which dfn-hf did not write"):
        with atomic_output_dir(model, replace=True) as written:
            (written / "config.json").write_text("new")
            (model / "notes.txt").write_text("mine")
    assert (model / "notes.txt").read_text() == "mine"
    (model / "notes.txt").unlink()
    assert_whole(model, "old")


def test_a_file_in_the_way_stays(tmp_path):
    folder = tmp_path / "out" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="config.json has a name that the new model needs: move it"):
        write(folder, "new")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_text() == "mine"


def test_an_interrupted_move_is_finished(tmp_path):
    folder = tmp_path / "out" / "model"
    staging = folder / ".dfn-hf-staging-0"
    staging.mkdir(parents=True)
    (staging / UNFINISHED).touch()
    (staging / "config.json").write_text("new")
    (staging / "model.safetensors").write_text("new")
    write_manifest(staging)
    (staging / "model.safetensors").rename(folder / "model.safetensors")
    recover_output_folder(folder)
    assert_whole(folder, "new")


@pytest.mark.parametrize("beside", [False, True])
def test_an_incomplete_folder_is_deleted(model, beside):
    staging = model.with_name(".model.dfn-hf-staging-0") if beside else model / ".dfn-hf-staging-0"
    staging.mkdir()
    (staging / UNFINISHED).touch()
    (staging / "model.safetensors").write_text("ne")
    recover_output_folder(model)
    assert_whole(model, "old")


@pytest.mark.parametrize("exchanged", [False, True])
def test_an_interrupted_replacement_is_cleaned(model, exchanged):
    staging = model.with_name(".model.dfn-hf-staging-0")
    shutil.copytree(model, staging)
    (staging / UNFINISHED).touch()
    if exchanged:
        exchange(staging, model)
    recover_output_folder(model)
    assert_whole(model, "old")


def test_an_interrupted_exchange_in_two_steps_is_finished(model):
    staging = model.with_name(".model.dfn-hf-staging-0")
    write(staging, "new")
    (staging / UNFINISHED).touch()
    model.rename(f"{staging}{ASIDE}")
    recover_output_folder(model)
    assert_whole(model, "new")


def test_foreign_files_in_an_old_folder_stay(model):
    staging = model.with_name(".model.dfn-hf-staging-0")
    shutil.copytree(model, staging)
    (staging / "notes.txt").write_text("mine")
    recover_output_folder(model)
    assert [path.name for path in staging.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["model.dfn-hf-staging-0", ".model-2.dfn-hf-staging-0", ".models"])
def test_folders_of_other_names_stay(model, name):
    other = model.with_name(name)
    other.mkdir()
    (other / UNFINISHED).touch()
    recover_output_folder(model)
    assert (other / UNFINISHED).exists()


def test_a_folder_that_is_written_by_another_process_is_refused(model):
    staging = model.with_name(".model.dfn-hf-staging-0")
    staging.mkdir()
    with folder_lock(staging), pytest.raises(ValueError, match="another process is writing to .*model"):
        recover_output_folder(model)
    assert staging.exists()


def test_an_existing_folder_is_not_new(model, tmp_path):
    with pytest.raises(ValueError, match="exists already: choose a new folder, or remove it"):
        prepare_new_folder(model)
    prepare_new_folder(tmp_path / "deep" / "new")
    assert not (tmp_path / "deep").exists()


def test_paths_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    for path, message in {
        tmp_path / "file" / "model": "file is a file: give a folder",
        tmp_path / "lost" / "model": "lost is a broken link: give a folder",
        tmp_path / ("n" * 256): "is longer than 255 bytes: shorten it",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_writable(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be written: choose another output folder"):
        check_writable(tmp_path / "deep" / "model")


def test_folders_that_cannot_be_replaced_are_named(model, tmp_path, monkeypatch):
    check_replaceable(model)
    long = tmp_path / ("n" * 240)
    long.mkdir()
    with pytest.raises(ValueError, match="too long to replace"):
        check_replaceable(long)
    monkeypatch.chdir(model)
    with pytest.raises(ValueError, match="holds the current folder"):
        check_replaceable(model)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is a mount point"):
        with monkeypatch.context() as patch:
            patch.setattr(os.path, "ismount", lambda path: True)
            check_replaceable(model)


def test_a_link_to_a_folder_is_checked_like_the_folder(model, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "key").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    with pytest.raises(ValueError, match="link holds key"):
        check_replaceable(tmp_path / "link")
    link = tmp_path / "to_model"
    link.symlink_to(model)
    write(link, "new", replace=True)
    assert link.is_symlink() and unknown_files(model) == []
    assert_whole(model, "new")
