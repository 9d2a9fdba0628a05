"""Tables of an original's keys: what shape each has and where it goes.

A table is a literal: key → (shape, target). `{layer}` and the like in a key stand for a number counted from 0. A shape
is a word per dimension: `D` a size, `4D` a multiple, `C+D+1` a sum, `?` any. A target is the name of a weight,
`Chunks`, `Copies`, `Rows`, `Squeezed`, or `Dropped` with its reason. Where two lines give one key, the later holds.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

PLACEHOLDER = re.compile(r"\{(\w+)\}")
NUMBER = re.compile(r"\d+")
TERM = re.compile(r"(\d*)([A-Z]?)")


@dataclass(frozen=True)
class Dropped:
    """On purpose not in the result."""

    why: str


@dataclass(frozen=True)
class Chunks:
    """Several weights one below the other: equal chunks of the first dimension."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Copies:
    """Several weights that are all alike."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Every `step`-th entry of the first dimension, from 0 on."""

    step: int
    name: str


@dataclass(frozen=True)
class Squeezed:
    """Without the last dimension, which is 1."""

    name: str


Target = str | Chunks | Copies | Rows | Squeezed | Dropped
Table = Mapping[str, tuple[str, Target]]


@dataclass(frozen=True)
class Match:
    """Keys of a checkpoint as a table knows them.

    Attributes:
        targets: of each key, numbers filled in.
        sizes: of each letter, and how many there are of each placeholder.
    """

    targets: dict[str, Target]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Difference:
    """How a checkpoint's keys differ from a table's."""

    missing: list[str]
    unexpected: list[str]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected)


def target_names(target: Target) -> list[str]:
    """The weights that `target` fills."""
    if isinstance(target, Dropped):
        return []
    if isinstance(target, Chunks | Copies):
        return list(target.names)
    return [target if isinstance(target, str) else target.name]


def apply_target(target: Target, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """`tensor` as the weights that `target` names."""
    if isinstance(target, Chunks):
        return dict(zip(target.names, tensor.chunk(len(target.names)), strict=True))
    if isinstance(target, Rows):
        return {target.name: tensor[:: target.step]}
    if isinstance(target, Squeezed):
        return {target.name: tensor.squeeze(-1)}
    return dict.fromkeys(target_names(target), tensor)


def restore_target(target: Target, weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What `apply_target` was given, from the weights it filled; None where they don't hold all of it."""
    names = target_names(target)
    if not names or isinstance(target, Rows):
        return None
    if isinstance(target, Chunks):
        return torch.cat([weights[name] for name in names])
    first = weights[names[0]]
    return first.unsqueeze(-1) if isinstance(target, Squeezed) else first


def compare_keys(table: Table, keys: set[str]) -> tuple[dict[str, int], Difference]:
    """Counts of the table's placeholders in `keys`, and how the keys differ from what the table then asks for."""
    patterns: dict[str, list[re.Pattern[str]]] = {}
    for key in table:
        patterns.setdefault(without_numbers(key), []).append(key_pattern(key))
    counts = {name: 0 for key in table for name in PLACEHOLDER.findall(key)}
    unexpected = []
    for key in sorted(keys):
        candidates = patterns.get(without_numbers(key), ())
        match = next((found for pattern in candidates if (found := pattern.fullmatch(key))), None)
        # A number beyond the count of keys would ask for more keys than there are.
        if match is None or any(int(number) >= len(keys) for number in match.groups()):
            unexpected.append(key)
            continue
        for name, number in match.groupdict().items():
            counts[name] = max(counts[name], int(number) + 1)
    missing = [key for key in expand(table, counts) if key not in keys]
    return counts, Difference(missing, unexpected)


def without_numbers(key: str) -> str:
    """What a key and the table's key that it fits have in common."""
    return NUMBER.sub("0", PLACEHOLDER.sub("0", key))


@cache
def key_pattern(key: str) -> re.Pattern[str]:
    """A table's key as a regular expression, placeholders as groups."""
    literal, *rest = PLACEHOLDER.split(key)
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return re.compile(re.escape(literal) + "".join(rf"(?P<{name}>\d{{1,9}}){re.escape(text)}" for name, text in pairs))


def expand(table: Table, counts: Mapping[str, int]) -> dict[str, tuple[str, Target]]:
    """The table with a line for every number of its placeholders."""
    lines = {}
    for key, (shape, target) in table.items():
        names = PLACEHOLDER.findall(key)
        for numbers in itertools.product(*(range(max(counts[name], 1)) for name in names)):
            filled = dict(zip(names, map(str, numbers), strict=True))
            lines[key.format(**filled)] = shape, fill(target, filled)
    return lines


def fill(target: Target, numbers: Mapping[str, str]) -> Target:
    """`target` with numbers in the place of its placeholders."""
    return renamed(target, lambda name: name.format(**numbers))


def prefixed(table: Table, key_prefix: str, name_prefix: str) -> Table:
    """`table` with a prefix before its keys, and one before the weights that they go to."""
    return {
        key_prefix + key: (shape, renamed(target, lambda name: name_prefix + name))
        for key, (shape, target) in table.items()
    }


def renamed(target: Target, rename: Callable[[str], str]) -> Target:
    """`target` with other names of the weights it fills."""
    if isinstance(target, Dropped):
        return target
    if isinstance(target, str):
        return rename(target)
    if isinstance(target, Chunks | Copies):
        return replace(target, names=tuple(map(rename, target.names)))
    return replace(target, name=rename(target.name))


def match_shapes(lines: Mapping[str, tuple[str, Target]], tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Sizes of the letters; each is what most of the shapes that hold it alone say.

    Raises:
        ValueError: a shape that contradicts the others or holds nothing; the message names its key.
    """
    votes: dict[str, Counter[int]] = {}
    for key, (shape, _) in lines.items():
        words = shape.split()
        if len(words) == tensors[key].ndim:
            for word, size in zip(words, tensors[key].shape, strict=True):
                if word.isalpha():
                    votes.setdefault(word, Counter())[size] += 1
    sizes = {letter: counter.most_common(1)[0][0] for letter, counter in votes.items()}
    for key, (shape, _) in lines.items():
        expected = [None if word == "?" else evaluate(word, sizes) for word in shape.split()]
        found = tuple(tensors[key].shape)
        if 0 in found:
            raise ValueError(f"{key!r} has shape {found}: it holds nothing")
        if len(found) != len(expected) or any(e not in (None, f) for e, f in zip(expected, found, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            raise ValueError(f"{key!r} has shape {found}, but beside the other weights it must be ({wanted})")
    return sizes


def evaluate(word: str, sizes: Mapping[str, int]) -> int:
    """A size such as `C+4D+1`; −1 where a letter has none."""
    total = 0
    for factor, letter in (TERM.fullmatch(term).groups() for term in word.split("+")):  # type: ignore[union-attr]
        if letter and letter not in sizes:
            return -1
        total += int(factor or 1) * (sizes[letter] if letter else 1)
    return total
