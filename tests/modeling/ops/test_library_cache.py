"""Compiled libraries on the disk: a damaged one is never loaded, and no state of the folder ends the process."""

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dfn_hf.modeling.ops.kernels import c_compiler, library_cache
from dfn_hf.modeling.ops.kernels.c_compiler import compiled_library
from dfn_hf.modeling.ops.kernels.library_cache import check_ownership, library_folder, library_name, load_library

SOURCE = "int answer(void) { return %d; }"
OTHER_USER = 12345


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled_library.cache_clear()
    c_compiler.logger.warning_once.cache_clear()
    yield tmp_path / "cache" / "dfn_hf" / "kernels"
    compiled_library.cache_clear()


def answer(number: int) -> int | None:
    """Load or compile a library as a new process would; return what its function returns."""
    compiled_library.cache_clear()
    library = compiled_library(SOURCE % number, functions=("answer",))
    return None if library is None else library.answer()


def exchange(path: Path, content: bytes) -> None:
    """Replace a file by a new one: this process has the old one mapped."""
    path.unlink()
    path.write_bytes(content)


def cut(path, content):
    exchange(path, content[: len(content) // 2])


def empty(path, content):
    exchange(path, b"")


def flip(path, content):
    exchange(path, content[:200] + bytes([content[200] ^ 4]) + content[201:])


def lengthen(path, content):
    exchange(path, content + b"\0")


def exchange_for_another(path, content):
    assert answer(2) == 2
    other = next(other for other in path.parent.iterdir() if other != path)
    exchange(path, other.read_bytes())


def link_to_nothing(path, content):
    path.unlink()
    path.symlink_to("nothing")


def pipe(path, content):
    path.unlink()
    os.mkfifo(path)


def name_without_hash(path, content):
    path.rename(path.with_name(path.name.split("-")[0] + "---.so"))


DAMAGES = (cut, empty, flip, lengthen, exchange_for_another, link_to_nothing, pipe, name_without_hash)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_library_is_compiled_again(folder, damage, caplog):
    assert answer(1) == 1
    (path,) = folder.iterdir()
    content = path.read_bytes()
    damage(path, content)
    caplog.clear()
    assert answer(1) == 1 and "is compiled again" in caplog.text and str(folder) in caplog.text
    assert path.is_file() and path.read_bytes() == content
    assert not [left for left in folder.iterdir() if left.name.startswith("build-") or "---" in left.name]
    caplog.clear()
    assert answer(1) == 1 and caplog.text == ""


def test_a_library_without_the_functions_is_compiled_again(folder):
    assert answer(1) == answer(2) - 1 == 1
    first, second = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    compiled_library("int other;")
    (empty_one,) = set(folder.iterdir()) - {first, second}
    key = first.name.split("-")[0]
    false_name = folder / library_name(key, empty_one.read_bytes())
    first.unlink()
    empty_one.rename(false_name)
    assert answer(1) == 1 and not false_name.exists() and first.exists()


def test_a_folder_in_the_way_of_a_library(folder, caplog):
    assert answer(1) == 1
    (path,) = folder.iterdir()
    path.unlink()
    path.mkdir()
    caplog.clear()
    assert answer(1) == 1 and f"delete {path}" in caplog.text


def test_libraries_of_other_versions_stay(folder):
    assert answer(1) == 1
    (path,) = folder.iterdir()
    others = [path.with_name(name) for name in (path.name.split("-")[0] + ".so", "0" * 32 + "-5-00.so", "notes.txt")]
    for other in others:
        other.write_bytes(b"short")
    assert answer(1) == 1 and answer(2) == 2
    assert all(other.read_bytes() == b"short" for other in others)


def test_builds_at_once_end_in_one_library(folder):
    build = compiled_library.__wrapped__  # the cache of a process does not come between
    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            libraries = list(pool.map(lambda _: build(SOURCE % 1, functions=("answer",)), range(16)))
        assert [library.answer() for library in libraries] == [1] * 16
        (path,) = folder.iterdir()
        exchange(path, b"damaged")


def test_folders_of_killed_compilations_are_deleted(folder):
    library_folder()
    old = [folder / name for name in ("build-1", "tmp1", "mine")]
    for path in (*old, folder / "build-2"):
        path.mkdir()
        (path / "code.c").touch()
    for path in old:
        os.utime(path, times=(time.time() - 2 * library_cache.BUILD_SECONDS,) * 2)
    assert answer(1) == 1
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"build-2", "tmp1", "mine"}


def refuse_to_write(monkeypatch, folder):
    def mkdtemp(*options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a random name")

    monkeypatch.setattr(library_cache.tempfile, "mkdtemp", mkdtemp)


def fill_the_disk(monkeypatch, folder):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(library_cache.os, "fsync", fsync)


def fill_the_disk_of_the_compiler(monkeypatch, folder):
    write_compiler(monkeypatch, folder, 'echo "error writing to ./cc$$.s: No space left on device" >&2; exit 1')


def put_a_file_in_the_way(monkeypatch, folder):
    folder.parent.parent.mkdir()
    folder.parent.touch()


def open_to_others(monkeypatch, folder):
    library_folder()
    folder.parent.chmod(0o777)


def forbid_execution(monkeypatch, folder):
    flags = library_cache.os.ST_NOEXEC
    monkeypatch.setattr(library_cache.os, "statvfs", lambda path: type("Status", (), {"f_flag": flags}))


def write_compiler(monkeypatch, folder, command):
    script = folder.parents[2] / "cc"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\n{command}\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))


def compiler(command):
    return lambda monkeypatch, folder: write_compiler(monkeypatch, folder, command)


OBSTACLES = {
    "read-only folder": (refuse_to_write, "cannot be written to (Read-only file system): set XDG_CACHE_HOME"),
    "full disk": (fill_the_disk, "cannot be written to (No space left on device): set XDG_CACHE_HOME"),
    "full disk in the compiler": (fill_the_disk_of_the_compiler, "cc failed: No space left on device. Set CC"),
    "file in the way": (put_a_file_in_the_way, "cannot be created (File exists"),
    "open parent": (open_to_others, "run `chmod go-w "),
    "noexec": (forbid_execution, "mounted with noexec: set XDG_CACHE_HOME"),
    "compiler without output": (compiler("exit 0"), "wrote an incomplete library: set CC"),
    "compiler that cuts": (compiler('gcc "$@" && truncate -s 8192 library.so'), "The compiler wrote an"),
    "compiler that writes text": (compiler("echo text > library.so"), "wrote an unusable library (library.so"),
    "compiler that loses functions": (
        compiler('echo "int nothing;" > code.c && gcc "$@"'),
        "wrote an unusable library (library.so lacks one of the functions",
    ),
    "compiler that is killed": (compiler("kill -9 $$"), "cc failed: exit status -9. Set CC"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_an_obstacle_gives_one_warning_with_its_remedy(folder, obstacle, monkeypatch, caplog):
    if obstacle == "noexec" and not hasattr(os, "ST_NOEXEC"):
        return  # not known on macOS
    make, text = OBSTACLES[obstacle]
    make(monkeypatch, folder)
    assert answer(1) is None and answer(2) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING" and text in record.message
    assert record.message.startswith("Torch operations run instead of C, which are slower. ")
    assert not folder.is_dir() or list(folder.iterdir()) == []


def give_to_another_user(monkeypatch, changed):
    lstat = Path.lstat

    def changed_lstat(path):
        status = lstat(path)
        return os.stat_result([*status[:4], OTHER_USER, *status[5:]]) if path == changed else status

    monkeypatch.setattr(Path, "lstat", changed_lstat)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_folder_or_parent_of_another_user_is_refused(folder, level, monkeypatch):
    library_folder()
    changed = (folder, *folder.parents)[level]
    give_to_another_user(monkeypatch, changed)
    with pytest.raises(
        PermissionError, match=f"{changed} belongs to another user .number {OTHER_USER}.*XDG_CACHE_HOME"
    ):
        library_folder()


@pytest.mark.parametrize(
    ("level", "mode", "is_refused"),
    [(0, 0o755, False), (0, 0o770, True), (0, 0o1777, True), (1, 0o775, False), (1, 0o777, True), (1, 0o1777, False)],
)
def test_a_folder_that_others_can_change_is_refused(folder, level, mode, is_refused):
    library_folder()
    changed = (folder, *folder.parents)[level]
    changed.chmod(mode)
    if not is_refused:
        assert library_folder() == folder
        return
    with pytest.raises(
        PermissionError, match=f"write to {changed}: run `chmod go-w {changed}`, or set XDG_CACHE_HOME"
    ):
        library_folder()


def test_links_are_followed_and_checked(folder, monkeypatch, tmp_path):
    shared, target = tmp_path / "shared", tmp_path / "shared" / "target"
    target.mkdir(parents=True)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tmp_path / "second")
    (tmp_path / "second").symlink_to("shared/target")
    assert library_folder() == folder and answer(1) == 1
    shared.chmod(0o777)
    with pytest.raises(PermissionError, match=f"Other users can write to {shared}:"):
        check_ownership(folder)
    shared.chmod(0o755)
    target.chmod(0o770)
    with pytest.raises(PermissionError, match=f"Other users can write to {target}:"):
        check_ownership(folder)
    target.chmod(0o700)
    for link in (folder, tmp_path / "second"):
        with monkeypatch.context() as patch, pytest.raises(PermissionError, match=f"{link} belongs to another user"):
            give_to_another_user(patch, link)
            check_ownership(folder)


def test_new_folders_are_private_under_any_umask(folder):
    earlier = os.umask(0)
    try:
        assert answer(1) == 1
    finally:
        os.umask(earlier)
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.parents[:2])} == {0o700}


@pytest.fixture
def carried(folder, tmp_path, monkeypatch):
    """A library of `SOURCE % 1` beside the module, as a wheel carries it, and no compiler."""
    assert answer(1) == 1
    (built,) = folder.iterdir()
    key = f"libanswer-{c_compiler.hashlib.sha256((SOURCE % 1).encode()).hexdigest()[:16]}"
    path = built.rename(tmp_path / library_name(key, built.read_bytes()))
    monkeypatch.setattr(c_compiler, "__file__", str(tmp_path / "c_compiler.py"))
    monkeypatch.setattr(c_compiler.shutil, "which", lambda name: None)
    compiled_library.cache_clear()
    return path


def test_a_carried_library_is_loaded_for_its_source_only(carried):
    assert compiled_library(SOURCE % 1, functions=("answer",), carried="libanswer").answer() == 1
    assert compiled_library(SOURCE % 2, functions=("answer",), carried="libanswer") is None
    assert compiled_library(SOURCE % 1, functions=("answer",)) is None


@pytest.mark.parametrize("damage", [cut, empty, flip])
def test_a_damaged_carried_library_is_not_loaded(carried, damage, caplog):
    damage(carried, carried.read_bytes())
    assert compiled_library(SOURCE % 1, functions=("answer",), carried="libanswer") is None
    (record,) = caplog.records
    assert f"{carried} is damaged" in record.message and "Reinstall dfn-hf." in record.message
    assert carried.exists()


# Damages a library of several pages and loads it, again and again, in a process that a wrong load would end.
CAMPAIGN = """
import random
from dfn_hf.modeling.ops.kernels.c_compiler import compiled_library
from dfn_hf.modeling.ops.kernels.library_cache import library_folder
source = "const int table[8192] = {5, 6, 7}; int answer(int i) { return table[i]; }"
dice = random.Random(0)
for attempt in range(61):
    compiled_library.cache_clear()
    library = compiled_library(source, functions=("answer",))
    assert [library.answer(i) for i in (0, 2, 8191)] == [5, 7, 0], attempt
    (path,) = library_folder().iterdir()
    content = bytearray(path.read_bytes())
    assert len(content) > 32768
    if dice.random() < 0.5:
        del content[dice.randrange(len(content)):]
    else:
        for _ in range(dice.choice([1, 10, 1000])):
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.unlink()
    path.write_bytes(content)
print("finished")
"""


def test_no_damage_ends_a_process(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", CAMPAIGN]
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "finished\n", result.stderr
    assert result.stderr.count("is damaged") == 60


def test_a_library_is_not_read_if_its_size_differs(tmp_path):
    path = tmp_path / f"key-10-{'0' * 32}.so"
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(OSError, match="is damaged: its content differs from the size and hash in its name"):
        load_library(path, ())
