"""Mutators of files for fuzz campaigns: pure functions of the content and a `random.Random`.

`mutate_bytes` damages any file: it truncates, empties, flips, overwrites, inserts, removes, repeats or swaps bytes.
`mutate_json` changes the parsed content of a JSON file: it replaces values by hostile ones, removes, renames, adds and
nests entries. `mutate_json_text` writes JSON that `json.dumps` does not: deep nesting, numbers with thousands of
digits, lone surrogates, a byte order mark, duplicate keys. `mutate_safetensors` changes the header of a safetensors
file and keeps the file's frame valid. The same seed gives the same mutation.
"""

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

# Values that no field of a configuration expects, or expects in another field.
HOSTILE_NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 2**15, 2**20, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 2**70, 10**12, 10**30,
    10**400, -(2**63), -(10**400), 0.0, -0.0, 0.5, 1.5, -1.5, 1e-300, 1e300, -1e300, float("inf"), float("-inf"),
    float("nan"),
)  # fmt: skip
HOSTILE_STRINGS = (
    "", " ", "0", "12", "true", "None", "nan", "a", "\x00", "\n", "\ud800", "é", "🂡" * 3, "../../etc/passwd",
    "/etc/passwd", "C:\\x", "{}", "[]", "x" * 10_000, "float16", "bfloat16", "torch.float64", "int8", "llama",
    "%s%n", "{0.__class__}", "{{ 1 }}", "__class__", "<unk>", "token", "adaptive",
)  # fmt: skip
HOSTILE_CONTAINERS: tuple[Any, ...] = (
    None, True, False, [], {}, [None], [[]], [1, 2], ["a"], {"a": 1}, {"": None}, [{}], {"0": "a"}, [0] * 1000,
)  # fmt: skip
HOSTILE = HOSTILE_NUMBERS + HOSTILE_STRINGS + HOSTILE_CONTAINERS
MAX_INSERTED = 64


def hostile_value(random: random.Random) -> Any:
    """Return a number, string, container or None that is unlikely to be valid."""
    return copy.deepcopy(random.choice(random.choice((HOSTILE_NUMBERS, HOSTILE_STRINGS, HOSTILE_CONTAINERS))))


def truncate(content: bytes, random: random.Random) -> bytes:
    """Keep a prefix; one time in four the file loses its last byte only."""
    if not content:
        return content
    return content[: -1 if random.random() < 0.25 else random.randrange(len(content))]


def empty(content: bytes, random: random.Random) -> bytes:
    """Return no bytes."""
    return b""


def flip_bits(content: bytes, random: random.Random) -> bytes:
    """Flip up to eight bits, half of the time within the first 256 bytes."""
    if not content:
        return content
    changed = bytearray(content)
    end = min(len(changed), 256) if random.random() < 0.5 else len(changed)
    for _ in range(random.randint(1, 8)):
        changed[random.randrange(end)] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwrite(content: bytes, random: random.Random) -> bytes:
    """Replace a span by zeros, by 0xff or by random bytes of the same length."""
    start, end = _span(content, random)
    filling = random.choice((b"\x00" * (end - start), b"\xff" * (end - start), random.randbytes(end - start)))
    return content[:start] + filling + content[end:]


def insert(content: bytes, random: random.Random) -> bytes:
    """Insert up to `MAX_INSERTED` random bytes, or bytes that are not UTF-8."""
    place = random.randint(0, len(content))
    inserted = random.choice(
        (random.randbytes(random.randint(1, MAX_INSERTED)), b"\xff\xfe", b"\x00", b"\xed\xa0\x80")
    )
    return content[:place] + inserted + content[place:]


def remove(content: bytes, random: random.Random) -> bytes:
    """Remove a span."""
    start, end = _span(content, random)
    return content[:start] + content[end:]


def repeat(content: bytes, random: random.Random) -> bytes:
    """Write a span twice."""
    start, end = _span(content, random)
    return content[:end] + content[start:end] + content[end:]


def swap(content: bytes, random: random.Random) -> bytes:
    """Exchange the parts before and after a byte."""
    place = random.randint(0, len(content))
    return content[place:] + content[:place]


def append(content: bytes, random: random.Random) -> bytes:
    """Append random bytes."""
    return content + random.randbytes(random.randint(1, MAX_INSERTED))


BYTE_MUTATORS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncate, empty, flip_bits, overwrite, insert, remove, repeat, swap, append,
)  # fmt: skip


def mutate_bytes(content: bytes, random: random.Random) -> bytes:
    """Apply one of `BYTE_MUTATORS`."""
    return random.choice(BYTE_MUTATORS)(content, random)


def mutate_json(content: bytes, random: random.Random) -> bytes:
    """Change one to three entries of a JSON file at any depth, or replace the whole content by a hostile value.

    Args:
        content: valid JSON.
    """
    value = json.loads(content)
    if random.random() < 0.03:
        value = hostile_value(random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        _mutate_entry(value, random)
    return json.dumps(value).encode()


def mutate_json_field(content: bytes, field: str, random: random.Random) -> bytes:
    """Set the top-level entry `field` of a JSON object to a hostile value, or remove it."""
    value = json.loads(content)
    if random.random() < 0.1:
        value.pop(field, None)
    else:
        value[field] = hostile_value(random)
    return json.dumps(value).encode()


def mutate_json_text(content: bytes, random: random.Random) -> bytes:
    """Write JSON that breaks parsers: nesting, numbers with many digits, surrogates, a byte order mark, duplicates."""
    body = content.strip()
    depth = random.choice((100, 1_000, 100_000))
    inner = body[1:-1] or b'"a": 1'
    return random.choice(
        (
            b"[" * depth + b"]" * depth,
            b'{"a":' * depth + b"1" + b"}" * depth,
            b'{"nested": ' + b"[" * depth + b"]" * depth + b", " + inner + b"}",
            b'{"number": ' + b"9" * random.choice((400, 4_301, 100_000)) + b", " + inner + b"}",
            b'{"number": 1e' + b"9" * 10 + b", " + inner + b"}",
            b'{"text": "\\ud800", ' + inner + b"}",
            b'{"\\udfff": 1, ' + inner + b"}",
            b"\xef\xbb\xbf" + body,
            body.decode(errors="replace").encode("utf-16"),
            b"{" + inner + b", " + inner + b"}",
            b"{" + inner + b",}",
            body + body,
            body.replace(b"true", b"True").replace(b"null", b"None"),
        )
    )


def mutate_safetensors(content: bytes, random: random.Random) -> bytes:
    """Change the header of a safetensors file: names, dtypes, shapes, offsets; the length prefix fits the new header.

    Args:
        content: a valid safetensors file.
    """
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header[name]
    change = random.randrange(7)
    if change == 0:
        header.pop(name)
    elif change == 1:
        header[name + random.choice(("x", ".0", "\x00", "é"))] = header.pop(name)
    elif change == 2:
        entry["dtype"] = random.choice(("F16", "BF16", "F64", "I32", "I8", "U8", "BOOL", "C64", "F8_E4M3", "X", 1))
    elif change == 3:
        entry["shape"] = random.choice(([], [0], [2**40], entry["shape"][::-1], [*entry["shape"], 1], [-1], "a", None))
    elif change == 4:
        entry["data_offsets"] = random.choice(([0, 0], [0, 2**62], [8, 4], [-1, 3], [], None))
    elif change == 5:
        _mutate_entry(header, random)
    else:
        header["__metadata__"] = random.choice((None, 1, [], {"format": "tf"}, {"format": 1}, {}))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _span(content: bytes, random: random.Random) -> tuple[int, int]:
    """Return start and end of a span that is short most of the time."""
    start = random.randint(0, len(content))
    length = random.choice((1, 2, 8, 64, len(content)))
    return start, min(len(content), start + random.randint(0, length))


def _mutate_entry(value: Any, random: random.Random) -> None:
    """Change an entry of a list or dictionary in place, at a random depth."""
    place = value
    while isinstance(place, dict | list) and place:
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = random.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and random.random() < 0.7:
            place = place[key]
            continue
        change = random.random()
        if change < 0.6:
            place[key] = hostile_value(random)
        elif change < 0.75:
            del place[key]
        elif change < 0.85:
            place[key] = [place[key]] if random.random() < 0.5 else {"a": place[key]}
        elif isinstance(place, dict):
            name = random.choice((*HOSTILE_STRINGS, str(key) + "s", str(key).upper()))
            place[name] = place.pop(key) if random.random() < 0.5 else hostile_value(random)
        else:
            place.insert(key, hostile_value(random))
        return
