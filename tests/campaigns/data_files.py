"""Random damaged and hostile data files, for the loaders of text, pairs, fields and recordings.

Each attempt writes a few files into an empty folder and reads them. It raises AssertionError unless the loader returns
what the files hold, or refuses them in one sentence that names the file. A file that is damaged in compressed form
must not be read as other text.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import socket
import wave
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.cli.errors import is_user_error
from dfn_hf.data.audio import read_recording, spectrum_field
from dfn_hf.data.fields import array_field
from dfn_hf.data.lm_blocks import text_blocks
from dfn_hf.data.pairs import load_pairs, read_pairs
from dfn_hf.data.text import load_text, read_documents, text_files
from dfn_hf.messages import message_of
from dfn_hf.training.field import FieldCrops, load_arrays
from dfn_hf.training.recipes import side_views
from tests.campaigns.mutations import hostile_value, mutate_bytes, mutate_json, mutate_json_text

MAX_MESSAGE = 2000
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
WORDS = ("to be", "or not to be", "naïve", "日本", "😀", "that is\tthe question", " ", "\u2028", "\ufeff", "\x1c")


def allow_user_errors(folder: Path, read: Callable[[], Any]) -> Any:
    """Return what `read` returns, or None if it refuses the data in one sentence that names a file of `folder`."""
    try:
        return read()
    except Exception as error:
        message = message_of(error)
        assert is_user_error(error) and message, f"{type(error).__name__}: {error}"
        assert str(folder) in str(error), f"names no file: {message}"
        assert len(message) < MAX_MESSAGE, f"a message of {len(message)} characters: {message[:300]}"
        assert "Error" not in message.split("(")[0], f"names a class: {message}"
        return None


def words(random: random.Random) -> str:
    """A short text of many scripts."""
    return " ".join(random.choice(WORDS) for _ in range(random.randint(1, 30)))


def attempt_damaged_text(folder: Path, random: random.Random) -> None:
    """Damage a text file, before or after it is compressed, and read it whole and as a stream."""
    text = "\n".join(words(random) for _ in range(random.randint(1, 40)))
    suffix = random.choice(list(COMPRESS))
    plain = text.encode(random.choice(("utf-8",) * 6 + ("utf-16", "utf-16-le", "utf-8-sig", "utf-32")))
    inside = random.random() < 0.4
    if inside:
        plain = mutate_bytes(plain, random)
    content = COMPRESS[suffix](plain)
    if not inside:
        content = mutate_bytes(content, random)
    (folder / f"a{random.choice(('.txt', '.md', '.TXT', ''))}{suffix}").write_bytes(content)
    read = documents_of(folder, random)
    if read is not None and suffix and not inside:
        text = io.TextIOWrapper(io.BytesIO(plain), encoding="utf-8-sig", errors="replace").read()
        assert text in "".join(read), f"reads other text than was compressed: {read!r:.300}"


def attempt_json_lines(folder: Path, random: random.Random) -> None:
    """Write JSON Lines with one or more hostile lines, and read them as text, as a stream and as pairs."""
    lines = []
    for _ in range(random.randint(1, 20)):
        record = {"text": words(random), "source": words(random), "target": words(random), "n": 3}
        line = json.dumps(record, ensure_ascii=random.random() < 0.5).encode()
        if random.random() < 0.15:
            line = random.choice((mutate_json, mutate_json_text, mutate_bytes))(line, random)
        lines.append(line)
    suffix = random.choice(list(COMPRESS))
    content = COMPRESS[suffix](random.choice((b"\n", b"\r\n", b"\n\n")).join(lines))
    if random.random() < 0.2:
        content = mutate_bytes(content, random)
    path = folder / f"a{random.choice(('.jsonl', '.ndjson', '.JSONL'))}{suffix}"
    path.write_bytes(content)
    documents_of(path, random)
    allow_user_errors(folder, lambda: list(read_pairs(path, "source", "target")))


def documents_of(path: Path, random: random.Random) -> list[str] | None:
    """The documents at `path`: all are valid Unicode and not blank."""

    def read() -> list[str]:
        return [document["text"] for document in read_documents(text_files(path), "text")]

    documents = allow_user_errors(path, read)
    for text in documents or ():
        assert text.strip(), repr(text[:100])
        text.encode()
    if random.random() < 0.03:
        stored = allow_user_errors(path, lambda: load_text(path)["text"][:])
        streamed = allow_user_errors(path, lambda: [row["text"] for row in load_text(path, streaming=True)])
        assert stored == streamed == (documents or None), "a stream differs from stored documents"
    return documents


@cache
def byte_tokenizer() -> Any:
    """The bundled tokenizer of bytes."""
    return load_tokenizer("byte")


def attempt_blocks(folder: Path, random: random.Random) -> None:
    """Pack short and damaged texts into blocks; every split has a block, or the data are refused before training."""
    for number in range(random.randint(1, 3)):
        content = words(random).encode() * random.choice((0, 1, 1, 5, 40))
        (folder / f"{number}.txt").write_bytes(mutate_bytes(content, random) if random.random() < 0.2 else content)
    data = str(random.choice((folder, folder / "0.txt")))
    validation = str(folder / "0.txt") if random.random() < 0.3 else None
    streaming, block_size = random.random() < 0.5, random.choice((2, 8, 64))
    blocks = allow_user_errors(
        folder, lambda: text_blocks(byte_tokenizer(), block_size, data, validation, streaming=streaming)
    )
    for split in blocks or ():
        read = allow_user_errors(folder, lambda split=split: list(split))
        assert read is None or read, "a split has no block"
        for block in read or ():
            assert len(block["input_ids"]) == block_size and 0 <= min(block["input_ids"])


def attempt_odd_folder(folder: Path, random: random.Random) -> None:
    """Read a folder with links, loops, pipes, sockets, hidden and empty files and folders."""
    place = folder
    for _ in range(random.randint(1, 8)):
        name = random.choice(("a.txt", "b.jsonl", "c", ".hidden", "d.md.gz", "e.png", "f.npy", "x" * 200, "é.txt"))
        path = place / name
        if os.path.lexists(path):
            continue
        change = random.choice(("file", "file", "folder", "link", "loop", "broken", "pipe", "socket", "bytes"))
        if change == "file":
            path.write_text(random.choice(("", "text", '{"text": "x"}')))
        elif change == "folder":
            path.mkdir()
            place = path
        elif change in ("link", "loop", "broken"):
            path.symlink_to({"link": random.choice((folder, place)), "loop": path, "broken": folder / "none"}[change])
        elif change == "pipe":
            os.mkfifo(path)
        elif change == "socket" and len(str(path)) < 100:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.bind(str(path))
        else:
            with open(os.fsencode(place) + b"/\xff.txt", "w") as file:
                file.write("text")
    documents_of(folder, random)
    allow_user_errors(folder, lambda: list(read_pairs(folder, "source", "target")))
    allow_user_errors(folder, lambda: load_arrays(folder))


def attempt_pairs(folder: Path, random: random.Random) -> None:
    """Load pairs with fields of wrong types, blank, missing or nested."""
    lines = []
    for _ in range(random.randint(1, 6)):
        record: dict[str, Any] = {"source": words(random), "target": words(random)}
        if random.random() < 0.2:
            record[random.choice(("source", "target", "translation"))] = hostile_value(random)
        if random.random() < 0.1:
            record.pop("target")
        lines.append(json.dumps(record if random.random() < 0.7 else {"translation": record}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines))
    pairs = allow_user_errors(folder, lambda: load_pairs(path))
    for pair in pairs or ():
        assert pair["source"].strip() and pair["target"].strip()


@cache
def field_file(kind: str) -> bytes:
    """A valid file of this kind."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, pixels[..., 0].astype(np.float32) / 255)
    elif kind == "wav":
        with wave.open(buffer, "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(pixels.tobytes())
    elif kind == "png16":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(buffer, "png")
    else:
        Image.fromarray(pixels).save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind))
    return buffer.getvalue()


KINDS = ("npy", "npy", "wav", "png", "png16", "jpg", "tif", "bmp", "webp")


def attempt_damaged_field(folder: Path, random: random.Random) -> None:
    """Damage an image, an array or a sound, and read it as a field, as a crop and as a view of a pair."""
    kind = random.choice(KINDS)
    content = field_file(kind)
    for _ in range(random.choice((1, 1, 1, 3))):
        content = mutate_bytes(content, random)
    suffix = kind.removesuffix("16") if random.random() < 0.95 else random.choice(KINDS).removesuffix("16")
    path = folder / f"a.{suffix}"
    path.write_bytes(content)
    check_field(folder, path, random)
    if suffix == "wav":
        recording = allow_user_errors(folder, lambda: read_recording(path))
        if recording is not None and recording[1] < 10**6:
            try:
                field = spectrum_field(*recording)
            except ValueError:
                return
            assert torch.isfinite(field["values"]).all()


def attempt_odd_array(folder: Path, random: random.Random) -> None:
    """Save an array of any dtype and shape, or only a header that declares one, and read it as a field."""
    path = folder / "a.npy"
    if random.random() < 0.5:
        dtype = random.choice("? i1 u1 <i2 >u2 i4 i8 u8 f2 >f4 f8 g F D S3 U2 V4 M8[s] m8[s] O".split())
        shape = tuple(random.choice((0, 1, 2, 3, 7)) for _ in range(random.randint(0, 6)))
        array = np.full(shape, 1).astype(dtype) if dtype != "V4" else np.zeros(shape, dtype)
        if np.issubdtype(array.dtype, np.inexact) and array.size and random.random() < 0.4:
            array.flat[0] = random.choice((np.nan, np.inf, -np.inf, 1e4, -11, 0.5))
        np.save(path, array)
    else:
        header = {
            "descr": random.choice(("<f4", "|u1", "|O", ">c16", "<f4" * 9, hostile_value(random))),
            "fortran_order": random.choice((True, False, hostile_value(random))),
            "shape": random.choice(
                ((10**12,), (10**6, 10**6), (-1,), (2**63,), (2, -3), (True, 3), ((3,),), hostile_value(random))
            ),
        }
        text = (repr(header) if random.random() < 0.9 else random.choice(("(" * 9000, "9" * 9000, "{}"))).encode(
            "utf-8", "surrogatepass"
        )
        length = min(len(text), 65535)
        path.write_bytes(
            b"\x93NUMPY" + bytes([random.choice((1, 1, 1, 2, 3, 9)), 0]) + length.to_bytes(2, "little") + text
        )
    check_field(folder, path, random)


def check_field(folder: Path, path: Path, random: random.Random) -> None:
    """Read a field file and check that its values are finite."""
    arrays = allow_user_errors(folder, lambda: load_arrays(random.choice((path, folder))))
    views = allow_user_errors(folder, lambda: side_views([path.name], folder, None, 8))
    assert (arrays is None) == (views is None), "a pair reads other files than a field"
    if arrays is None:
        return
    (array,) = arrays
    assert torch.isfinite(array_field(array, array.ndim - 1)["values"]).all()
    crop = FieldCrops(arrays, 16, 1)[0]
    assert 1 <= len(crop["values"]) <= 16


ATTEMPTS: Iterable[Callable[[Path, random.Random], None]] = (
    attempt_damaged_text,
    attempt_json_lines,
    attempt_blocks,
    attempt_odd_folder,
    attempt_pairs,
    attempt_damaged_field,
    attempt_odd_array,
)
