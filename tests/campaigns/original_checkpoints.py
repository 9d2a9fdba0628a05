"""Random damaged and hostile checkpoints of the originals, for `dfn_hf.hub.convert.convert`.

Each attempt converts one file. It raises AssertionError unless the file is converted completely or refused by one
sentence that names the file, a key or a setting; a file that is refused leaves nothing behind.
"""

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from dfn_hf.cli.errors import is_user_error
from dfn_hf.conversion.detect import FORMATS
from dfn_hf.hub.convert import convert
from dfn_hf.messages import message_of
from tests.campaigns.mutations import hostile_value, mutate_bytes, mutate_safetensors
from tests.support.native_checkpoints import random_weights

SIZE = 16  # value of every size letter of a table
MAX_MESSAGE = 2000
HUGE = 10**12


class Sizes(dict):
    """The same size for every letter."""

    def __contains__(self, letter: object) -> bool:
        return True

    def __missing__(self, letter: str) -> int:
        return SIZE


class Counts(dict):
    """A count of two for every placeholder."""

    def __missing__(self, name: str) -> int:
        return 2


class Call:
    """Object whose pickle calls a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@cache
def weights_of(number: int) -> dict[str, torch.Tensor]:
    """Complete weights of the format with this number."""
    return random_weights(FORMATS[number].table, Sizes(), Counts())


@cache
def file_of(number: int, kind: str) -> bytes:
    """A valid checkpoint of the format with this number: `zip`, `old` (before torch 1.6) or `safetensors`."""
    if kind == "safetensors":
        return save({key: tensor.contiguous() for key, tensor in weights_of(number).items()})
    content = {
        "model_state_dict": weights_of(number),
        "config": dict(FORMATS[number].settings),
        "stoi": {"a": 0, "b": 1},
    }
    return torch_bytes(content, zipped=kind == "zip")


def torch_bytes(content: Any, *, zipped: bool = True) -> bytes:
    """`content` as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def attempt_damaged_file(folder: Path, random: random.Random) -> None:
    """Damage the bytes of a valid file, or the bytes of one record of a zip file."""
    number, kind = random.randrange(len(FORMATS)), random.choice(("zip", "zip", "old", "safetensors"))
    content = file_of(number, kind)
    if kind == "zip" and random.random() < 0.7:
        content = change_records(content, random)
    elif kind == "safetensors" and random.random() < 0.7:
        content = mutate_safetensors(content, random)
    else:
        content = mutate_bytes(content, random)
    suffix = ".safetensors" if (kind == "safetensors") != (random.random() < 0.05) else ".pt"
    check_conversion(folder, f"model{suffix}", content, {}, random)


def change_records(content: bytes, random: random.Random) -> bytes:
    """Write a zip file again with records that are damaged, missing, doubled, renamed or compressed."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    names = source.namelist()
    pickled = next(name for name in names if name.endswith("data.pkl"))
    chosen = pickled if random.random() < 0.6 else random.choice(names)
    change = random.choice(("damage", "damage", "damage", "drop", "rename", "bomb", "compress", "empty"))
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            record, compression = source.read(name), zipfile.ZIP_STORED
            if name == chosen:
                if change == "drop":
                    continue
                if change == "damage":
                    record = mutate_bytes(record, random)
                elif change == "rename":
                    name = random.choice(("../../escape", "/etc/passwd", "data.pkl", name + "x"))
                elif change == "bomb":
                    record, compression = bytes(2**24), zipfile.ZIP_DEFLATED
                elif change == "compress":
                    compression = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
                else:
                    record = b""
            archive.writestr(name, record, compression)
    return target.getvalue()


def attempt_hostile_pickle(folder: Path, random: random.Random) -> None:
    """Save a pickle that calls functions: those that torch allows with hostile arguments, and others."""
    canary = folder / "canary"
    storage = torch.UntypedStorage(8)
    calls = (
        Call(os.mkdir, str(canary)),
        Call(os.system, f"mkdir {canary}"),
        Call(eval, f"__import__('os').mkdir({str(canary)!r})"),
        Call(bytearray, HUGE),
        Call(torch.Tensor, 2**28),
        Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (HUGE, 2), (2, 1), False),
        Call(torch._utils._rebuild_tensor_v2, storage, 0, (2**40,), (0,), False, {}),
        Call(torch._utils._rebuild_tensor_v2, storage, 2**40, (2,), (1,), False, {}),
        Call(torch._utils._rebuild_tensor_v2, storage, 0, (-1,), (1,), False, {}),
        Call(torch._utils._rebuild_parameter, None, None, None),
    )
    weights: dict[Any, Any] = dict(weights_of(random.randrange(len(FORMATS))))
    call = random.choice(calls)
    weights[random.choice(list(weights))] = call
    content = random.choice((call, weights, {"model_state_dict": weights}, {"state_dict": weights, "config": call}))
    try:
        saved = (
            pickle.dumps(content, protocol=random.choice((0, 2, 4)))
            if random.random() < 0.3
            else torch_bytes(content, zipped=random.random() < 0.7)
        )
    except (RuntimeError, TypeError, AttributeError, pickle.PicklingError):  # storages are not pickled everywhere
        return
    check_conversion(folder, "model.pt", saved, {}, random)
    assert not canary.exists(), f"the file executed {call.call}"


def attempt_odd_content(folder: Path, random: random.Random) -> None:
    """Save a complete file with unusual tensors, keys, settings or vocabulary."""
    number = random.randrange(len(FORMATS))
    weights: dict[Any, Any] = dict(weights_of(number))
    content: dict[str, Any] = {
        "model_state_dict": weights,
        "config": dict(FORMATS[number].settings),
        "stoi": {chr(97 + place): place for place in range(10)},
    }
    change = random.choice(("tensor", "tensor", "key", "settings", "settings", "vocabulary", "many", "shared"))
    if change == "tensor":
        weights[random.choice(list(weights))] = odd_tensor(random)
    elif change == "key":
        weights[odd_key(weights, random)] = torch.ones(SIZE, SIZE)
    elif change == "settings":
        name = random.choice([*FORMATS[number].settings, *FORMATS[number].stored_names.values(), "new"])
        content["config"][name] = hostile_setting(random)
    elif change == "vocabulary":
        content["stoi"][random.choice(("c", "", "ab", 3, None, "\ud800", "\0", b"c", 1.5))] = random.choice(
            (10, 0, -1, HUGE, 2**70, True, 1.0, "1", None, [], float("nan"))
        )
    elif change == "many":
        for place in random.sample(range(10**4), 200):
            weights[random.choice(list(weights)).replace("0", str(place)).replace("1", str(place))] = torch.ones(1)
    else:
        large = torch.ones(SIZE, SIZE)
        weights.update({key: large for key in weights if random.random() < 0.5})
    if random.random() < 0.1:
        content = weights
    check_conversion(folder, "model.pt", torch_bytes(content, zipped=random.random() < 0.8), {}, random)


def odd_tensor(random: random.Random) -> Any:
    """A tensor, or another value, that no original saves."""
    return random.choice(
        (
            lambda: torch.ones(random.choice((1, 3, 16, 64)), random.choice((1, 2, 16, 48))),
            lambda: torch.ones(3),
            lambda: torch.tensor(1.0),
            lambda: torch.ones(2).expand(2**40, 2),
            lambda: torch.ones(1).expand(SIZE, SIZE),
            lambda: torch.empty(0),
            lambda: torch.empty(SIZE, 0),
            lambda: torch.ones(SIZE, SIZE, device="meta"),
            lambda: torch.ones(2**20, 2**20, device="meta"),
            lambda: torch.ones(SIZE, dtype=torch.int64),
            lambda: torch.ones(SIZE, dtype=torch.complex64),
            lambda: torch.ones(SIZE, dtype=torch.bool),
            lambda: torch.ones(SIZE, SIZE).to_sparse(),
            lambda: torch.ones(SIZE, SIZE).to_sparse_csr(),
            lambda: torch.quantize_per_tensor(torch.ones(SIZE), 0.1, 0, torch.qint8),
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            lambda: torch.ones(SIZE, SIZE, dtype=torch.float8_e4m3fn),
            lambda: torch.full((SIZE, SIZE), float("nan")),
            lambda: torch.ones(SIZE, SIZE).t(),
            lambda: torch.ones(40, 40)[::2, ::2],
            lambda: torch.nn.Parameter(torch.ones(SIZE)),
            lambda: hostile_value(random),
        )
    )()


def odd_key(weights: dict[Any, Any], random: random.Random) -> Any:
    """A key that no original has."""
    known = random.choice(list(weights))
    return random.choice(
        (
            "", "new.key", 3, None, ("a", "b"), "x" * 10**5, "\ud800", "\0", known + ".", known.upper(),
            "module." + known,
            known.replace("0", "01"), known.replace("0", "٠"), known.replace("0", "9" * 20), known.replace("0", "500"),
            known.replace("1", "-1"),
        )
    )  # fmt: skip


def hostile_setting(random: random.Random) -> Any:
    """A value for an argument of an original constructor."""
    nested: list[Any] = []
    for _ in range(40):
        nested = [nested, nested]
    return random.choice(
        (HUGE, -HUGE, 2**63, 1, 0, -1, 2, 7, 10**6, nested, [nested], [HUGE], [-1], [1.5], ["a"], [3])
    )


def attempt_settings(folder: Path, random: random.Random) -> None:
    """Convert a valid file with one or two hostile settings of the user."""
    number = random.randrange(len(FORMATS))
    names = [*FORMATS[number].settings, "hidden_size", ""]
    settings = {
        random.choice(names): random.choice((hostile_setting, hostile_value))(random)
        for _ in range(random.choice((1, 1, 2)))
    }
    check_conversion(folder, "model.pt", file_of(number, "zip"), settings, random)


def check_conversion(folder: Path, name: str, content: bytes, settings: dict[str, Any], random: random.Random) -> None:
    """Convert `content`, saved under `name` in an empty folder, and check the result or the error."""
    source, output = folder / name, folder / "out"
    source.write_bytes(content)
    try:
        report = convert(source, output, native=random.random() < 0.4, settings=settings)
    except Exception as error:
        message = message_of(error)
        assert is_user_error(error) and message, f"{type(error).__name__}: {error}"
        assert len(message) < MAX_MESSAGE, f"a message of {len(message)} characters: {message[:300]}"
        assert "weights_only" not in message and "trust_remote_code" not in message, message
        assert source.read_bytes() == content
    else:
        saved = json.loads((output / "conversion_report.json").read_text())
        assert saved["layout"] == report.layout
        json.loads((output / "config.json").read_text(), parse_constant=refuse_constant)
        shutil.rmtree(output)
    source.unlink()
    left = [path.name for path in folder.iterdir()]
    assert not left, f"left behind: {left}"


def refuse_constant(name: str) -> None:
    """Raise AssertionError for NaN and Infinity, which JSON does not have."""
    raise AssertionError(f"config.json contains {name}")


ATTEMPTS: tuple[Callable[[Path, random.Random], None], ...] = (
    attempt_damaged_file,
    attempt_hostile_pickle,
    attempt_odd_content,
    attempt_settings,
)
