"""Tests finding and opening of data files: damaged, special, linked and unreadable ones raise one clear error."""

import bz2
import gzip
import lzma
import os
import socket
import sys

import pytest

import dfn_hf.data.files
from dfn_hf.data.files import explain_read_errors, find_files, open_text
from dfn_hf.data.text import load_text

COMPRESSORS = {".bz2": bz2.compress, ".gz": gzip.compress, ".xz": lzma.compress}
TEXT = "to be or not to be, that is the question\n" * 200


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def names(folder):
    return [file.relative_to(folder).as_posix() for file in find_files(folder, (".txt", ".jsonl"), "text")]


def test_files_are_found_by_suffix_in_any_case(tmp_path):
    for name in ("b.TXT", "a.txt.GZ", "c.py", ".hidden.txt", "z.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "folder.txt").mkdir()
    assert names(tmp_path) == ["a.txt.GZ", "b.TXT", "z.jsonl"]


def test_json_lines_are_recognized_with_a_suffix_in_any_case(tmp_path):
    (tmp_path / "a.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert load_text(tmp_path / "a.JSONL")["text"][:] == ["one", "two"]


def test_linked_folders_are_searched_once(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (root / "a.txt").touch()
    (elsewhere / "b.txt").touch()
    (root / "linked").symlink_to(elsewhere)
    (root / "twice").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (root / "self").symlink_to(root)
    assert names(root) == ["a.txt", "linked/b.txt"]


def test_broken_links_are_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "missing")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with pytest.raises(ValueError, match=r"a\.txt is a link to a file that does not exist: remove the link"):
        load_text(tmp_path)
    for path in (tmp_path / "loop.txt", ""):
        with pytest.raises(ValueError, match="there is no file or folder"):
            load_text(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_sockets_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path, tmp_path / "pipe.txt"):
        with pytest.raises(ValueError, match=r"pipe\.txt is a pipe: give a regular file"):
            load_text(path)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.bind(os.path.relpath(tmp_path / "socket.txt"))
        with pytest.raises(ValueError, match="is a socket: give a regular file"):
            load_text(tmp_path / "socket.txt")
    with pytest.raises(ValueError, match="/dev/zero is a device: give a regular file"):
        load_text("/dev/zero")


@pytest.mark.skipif(sys.platform != "linux", reason="a file that is regular and cannot be read is in /proc")
def test_unreadable_files_are_named():
    with pytest.raises(ValueError, match=r"/proc/self/mem cannot be read \(Input/output error\): check"):
        load_text("/proc/self/mem")


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot be read \(Permission denied\): check"):
        load_text(tmp_path)


def test_names_that_are_not_utf8_are_refused(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w") as file:
        file.write("text")
    with pytest.raises(ValueError, match="is not UTF-8: rename the file"):
        load_text(os.fsdecode(path))


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_truncated_and_damaged_compressed_files_are_named(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    content = COMPRESSORS[suffix](os.urandom(400).hex().encode())
    path.write_bytes(content)
    with open_text(path) as file:
        assert len(file.read()) == 800
    for damaged in (content[:-9], content[: len(content) // 2], content[:5], b"", bytes(99), b"plain text"):
        path.write_bytes(damaged)
        words = rf"a\.txt\{suffix} is (truncated or )?damaged \(.*compress or copy it again"
        with pytest.raises(ValueError, match=words):
            load_text(path)
    for place in range(20, len(content) - 20, 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        with pytest.raises(ValueError, match=rf"a\.txt\{suffix}"):
            load_text(path)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_all_streams_of_a_compressed_file_are_read(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    streams = [COMPRESSORS[suffix](os.urandom(length).hex().encode()) for length in (10, 10**5)]
    for separator in (b"", bytes(8)):
        path.write_bytes(separator.join([*streams, b""]))
        with open_text(path) as file:
            assert len(file.read()) == 2 * (10 + 10**5)
    for rest in (b"garbage", b"\xff" + streams[1][1:], streams[1][:-1]):
        path.write_bytes(streams[0] + rest)
        with pytest.raises(ValueError, match=rf"a\.txt\{suffix} is (truncated or )?damaged"):
            load_text(path)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_files_that_expand_without_bound_are_refused(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESSORS[suffix](b"a" * 10**6))
    assert len(load_text(path)[0]["text"]) == 10**6
    monkeypatch.setattr(dfn_hf.data.files, "FREE_BYTES", 1000)
    with pytest.raises(ValueError, match="expands to more than 200 times its size"):
        load_text(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16"), "is not UTF-8 text .*convert it to UTF-8"),
        (TEXT.encode("utf-16-le"), "contains NUL characters and is not plain text: convert it"),
        (b"\x7fELF\x02\x01\x01\x00", "contains NUL characters"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text"),
        (b"a" * 10 + b"\xed\xa0\x80", "is not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_binary_files_are_refused(tmp_path, content, message, streaming):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(tmp_path, streaming=streaming)


def test_byte_order_marks_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n', encoding="utf-8-sig")
    assert load_text(tmp_path)["text"][:] == ["one", "two"]


def test_files_that_vanish_during_a_stream_are_named(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    documents = iter(load_text(tmp_path, streaming=True))
    next(documents)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b\.txt cannot be read \(No such file or directory\): check"):
        list(documents)


def test_errors_of_readers_name_the_file(tmp_path):
    (tmp_path / "a.bin").touch()
    for error in (KeyError("x"), EOFError(), OSError("image file is truncated\nsecond line")):
        with pytest.raises(ValueError, match=r"a\.bin is damaged or not an image \(.+\): copy or save it again"):
            with explain_read_errors(tmp_path / "a.bin", "an image"):
                raise error
    with pytest.raises(ValueError, match=r"a\.bin does not fit in memory"):
        with explain_read_errors(tmp_path / "a.bin", "an image"):
            raise MemoryError
