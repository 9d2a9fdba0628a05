"""Tests reading of damaged, cut and hostile images, arrays and sounds: each raises one error that names the file."""

import io
import pickle
import struct
import wave
import zlib

import numpy as np
import pytest
from PIL import Image

from dfn_hf.data.fields import read_image
from dfn_hf.training.field import load_arrays
from dfn_hf.training.recipes import side_views

KINDS = {"npy": "an array that numpy.save wrote", "wav": "a PCM WAV file"}


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_header(header: str) -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def wav(samples=50, channels=1, rate=8000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * samples * channels))
    return buffer.getvalue()


def picture(suffix: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header declares `width` × `height` pixels, without pixel data."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def refuse(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_arrays(path)
    assert path.name in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_cut_and_foreign_images_are_refused(tmp_path, suffix):
    content = picture(suffix)
    for damaged in (b"", content[:5], content[: len(content) // 2], b"text"):
        refuse(tmp_path / f"a.{suffix}", damaged, "is damaged or not a PNG, JPEG, WebP, TIFF or BMP image")


def test_images_with_too_many_pixels_are_refused(tmp_path):
    refuse(tmp_path / "a.png", png_of_size(2**20, 2**20), "decompression bomb")
    refuse(tmp_path / "a.png", png_of_size(2**13 + 1, 2**13), "8,193 x 8,192 pixels, too many for its size")
    refuse(tmp_path / "a.png", png_of_size(2**10, 2**10), "truncated")


def test_other_formats_of_pillow_are_refused(tmp_path):
    refuse(tmp_path / "a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify")


def test_pixels_of_32_bits_are_refused(tmp_path):
    for number, pixels in enumerate((np.full((3, 4), 0.5, np.float32), np.full((3, 4), 70000, np.int32))):
        Image.fromarray(pixels).save(tmp_path / f"{number}.tif")
        with pytest.raises(ValueError, match=rf"{number}\.tif has pixels of 32 bits"):
            read_image(tmp_path / f"{number}.tif")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", KINDS["npy"]),
        (npy(np.ones((9, 9)))[:-1], "the header declares 648 bytes of values, but the file holds 647"),
        (
            npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000)}"),
            "declares 8,000,000,000",
        ),
        (npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}") + bytes(8), r"its shape is \[-1\]"),
        (npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}"), KINDS["npy"]),
        (npy_header("[" * 5000), KINDS["npy"]),
        (npy_header("{'descr': '" + "(9," * 900 + "', 'fortran_order': False, 'shape': (1,)}"), KINDS["npy"]),
        (npy(np.array([{}, None], dtype=object)), "it holds Python objects"),
        (pickle.dumps(np.ones(3)), KINDS["npy"]),
        (b"PK\x03\x04" + bytes(40), KINDS["npy"]),
        (npy(np.ones((0, 3))), "holds no samples"),
        (npy(np.ones(3, dtype=complex)), "has dtype complex128"),
        (npy(np.ones(3, dtype=np.int64)), "has dtype int64"),
        (npy(np.array(["a"])), "has dtype <U1"),
        (npy(np.zeros(3, dtype=[("a", "f4"), ("b", "i4")])), "has dtype"),
        (npy(np.array(3.0)), "has 0 axes"),
        (npy(np.ones((1, 1, 1, 1, 1))), "has 5 axes"),
        (npy(np.array([1, np.nan])), "not finite"),
        (npy(np.array([1, -np.inf], dtype=">f2")), "not finite"),
        (npy(np.array([1e30])), "values up to 1e"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, content, message):
    refuse(tmp_path / "a.npy", content, message)


def test_arrays_of_all_byte_orders_are_read(tmp_path):
    for dtype in (">f4", "<f2", ">i2", "u1", "?", "f8"):
        for order in "CF":
            array = np.ones((3, 4), dtype=dtype, order=order)
            (tmp_path / "a.npy").write_bytes(npy(array))
            assert np.array_equal(load_arrays(tmp_path)[0][..., 0], array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", KINDS["wav"]),
        (wav()[:-3], "the header declares 50 frames, but the file holds 48"),
        (wav()[:30], KINDS["wav"]),
        (wav(samples=0), "holds no sample"),
        (wav(channels=2)[:-1], "the header declares 50 frames"),
        (
            wav()[:40] + b"\xff\xff\xff\x7f" + wav()[44:],
            "the header declares 1,073,741,823 frames, but the file holds 50",
        ),
        (wav()[:22] + b"\x00\x00" + wav()[24:], KINDS["wav"]),
        (wav()[:24] + bytes(4) + wav()[28:], "a sampling rate of 0 Hz"),
    ],
)
def test_bad_sounds_are_refused(tmp_path, content, message):
    refuse(tmp_path / "a.wav", content, message)


def test_bad_files_of_pairs_are_named(tmp_path):
    (tmp_path / "a.npy").mkdir()
    for text, message in {
        "none.npy": "none.npy does not exist",
        "a.npy": "a.npy is a folder",
        "\0.npy": "exist",
    }.items():
        with pytest.raises(ValueError, match=message):
            side_views([text], tmp_path, None, 8)


def test_other_files_are_refused_and_hidden_ones_skipped(tmp_path):
    refuse(tmp_path / "a.txt", b"text", "a.txt is not a field: give a file with one of the suffixes .png")
    (tmp_path / "._a.png").write_bytes(b"resource fork")
    (tmp_path / "b.npy").write_bytes(npy(np.ones(3)))
    assert len(load_arrays(tmp_path)) == 1
