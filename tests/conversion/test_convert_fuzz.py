"""Ten thousand damaged or hostile checkpoint files: each converts or raises a user error; none executes code."""

import io
import json
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import save

from dfn_hf.cli.errors import is_user_error
from dfn_hf.conversion.detect import FORMATS
from dfn_hf.hub.convert import convert
from tests.support.native_checkpoints import random_weights

FILES = 10_000
SIZES = 16  # value of every size letter of a table
SUFFIXES = (".pt", ".safetensors")


class Call:
    """Object whose pickle calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def good_files(draw: random.Random) -> list[tuple[str, bytes]]:
    """Return a checkpoint of every format, saved in every file type."""
    files = []
    for source_format in FORMATS:
        weights = random_weights(source_format.table, Sizes(), Counts())
        content = {"model_state_dict": weights, "config": dict(source_format.settings), "stoi": {"a": 0, "b": 1}}
        for old in (False, True):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=not old)
            files.append((".pt", buffer.getvalue()))
        files.append((".safetensors", save({key: tensor.contiguous() for key, tensor in weights.items()})))
    return files


class Sizes(dict):
    """The same size for every letter."""

    def __contains__(self, letter):
        return True

    def __missing__(self, letter):
        return SIZES


class Counts(dict):
    """A count of two for every placeholder."""

    def __missing__(self, name):
        return 2


def flip(draw, content):
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 4, 64])):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def cut(draw, content):
    return content[: draw.randrange(len(content))]


def insert(draw, content):
    place = draw.randrange(len(content))
    return content[:place] + draw.randbytes(draw.choice([1, 8, 1000])) + content[place:]


def noise(draw, content):
    return draw.randbytes(draw.randrange(2000))


def inside(draw, content):
    """Change bytes inside the records of a zip file and update the checksums; change the head of other files."""
    if not content.startswith(b"PK"):
        head = min(len(content), 4000)
        return flip(draw, content[:head]) + content[head:]
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            record = source.read(name)
            archive.writestr(name, flip(draw, record) if name.endswith("data.pkl") else record)
    return target.getvalue()


def hostile(canary):
    """Return a change that makes pickles create the folder `canary`."""

    def change(draw, content):
        call = Call(
            *draw.choice(
                [(os.mkdir, canary), (os.system, f"mkdir {canary}"), (eval, f"__import__('os').mkdir({canary!r})")]
            )
        )
        content = draw.choice([call, {"model_state_dict": {"weight": call}}, {"state_dict": {}, "config": call}])
        if draw.random() < 0.5:
            return pickle.dumps(content, protocol=draw.choice([0, 2, 4]))
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=draw.random() < 0.5)
        return buffer.getvalue()

    return change


def odd(draw, content):
    """Save a complete file with unusual content."""
    value = draw.choice(
        [
            torch.ones(3),
            torch.ones(2).expand(2**40, 2),
            torch.ones(2, dtype=torch.int64),
            torch.empty(0),
            torch.ones(2).to_sparse(),
            torch.tensor(float("nan")),
            [1, 2],
            "text",
            None,
            {"nested": torch.ones(2)},
        ]
    )
    source_format = draw.choice(FORMATS)
    weights = random_weights(source_format.table, Sizes(), Counts())
    weights[draw.choice([*weights, "new.key", "", "layers.99999999999999999999.weight"])] = value
    if draw.random() < 0.3:
        weights = value
    content = draw.choice([weights, {"model_state_dict": weights, "config": value, "stoi": {"ab": value, 3: "x"}}])
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.slow  # ten thousand files
def test_damaged_and_hostile_files_raise_user_errors(tmp_path):
    draw = random.Random(0)
    canary, output = tmp_path / "canary", tmp_path / "out"
    files = good_files(draw)
    changes = [flip, cut, insert, noise, inside, inside, hostile(str(canary)), odd]
    refused, converted, broken = 0, 0, []
    for number in range(FILES):
        suffix, content = draw.choice(files)
        change = draw.choice(changes)
        source = tmp_path / f"file{draw.choice(SUFFIXES) if draw.random() < 0.1 else suffix}"
        source.write_bytes(change(draw, content))
        try:
            report = convert(source, output, native=draw.random() < 0.2)
        except Exception as error:
            refused += 1
            if not is_user_error(error) or not str(error):
                broken.append((number, change.__name__, repr(error)))
            assert not output.exists()
        else:
            converted += 1
            assert json.loads((output / "conversion_report.json").read_text())["layout"] == report.layout
            shutil.rmtree(output)
        assert not canary.exists()
        source.unlink()
        assert not list(tmp_path.iterdir())
    assert not broken, broken[:10]
    assert refused > FILES / 2 and converted > FILES / 100
