"""Tables of an original's keys with their shapes and targets.

A table is a literal: key → (shape, target). A placeholder such as `{layer}` in a key stands for a number that is
counted from 0. A shape has one word per dimension: `D` is a size, `4D` a multiple, `C+D+1` a sum, `?` any size. A
target is the name of a weight, `Chunks`, `Copies`, `EveryNth`, `Squeezed`, or `Dropped` with its reason. If two lines
give the same key, the later one applies.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

PLACEHOLDER = re.compile(r"\{(\w+)\}")
NUMBER = re.compile(r"[0-9]+")
INDEX = "(?:0|[1-9][0-9]{0,8})"
TERM = re.compile(r"(\d*)([A-Z]?)")


@dataclass(frozen=True)
class Dropped:
    """The weight is deliberately not converted."""

    reason: str


@dataclass(frozen=True)
class Chunks:
    """Equal chunks of the first dimension become several weights."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Copies:
    """Several weights receive the same values."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class EveryNth:
    """Every `step`-th entry of the first dimension, starting at 0, becomes the weight."""

    step: int
    name: str


@dataclass(frozen=True)
class Squeezed:
    """The weight without its last dimension, which has size 1."""

    name: str


Target = str | Chunks | Copies | EveryNth | Squeezed | Dropped
Table = Mapping[str, tuple[str, Target]]


@dataclass(frozen=True)
class Match:
    """Checkpoint keys matched to a table.

    Attributes:
        targets: target of each key, with the placeholders filled in.
        sizes: value of each letter, and count of each placeholder.
    """

    targets: dict[str, Target]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Difference:
    """Keys that a checkpoint lacks, and keys that the table lacks."""

    missing: list[str]
    unexpected: list[str]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected)


def target_names(target: Target) -> list[str]:
    """Return the names of the weights that `target` fills."""
    if isinstance(target, Dropped):
        return []
    if isinstance(target, Chunks | Copies):
        return list(target.names)
    return [target if isinstance(target, str) else target.name]


def apply_target(target: Target, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the weights that `tensor` becomes, by name."""
    if isinstance(target, Chunks):
        return dict(zip(target.names, tensor.chunk(len(target.names)), strict=True))
    if isinstance(target, EveryNth):
        return {target.name: tensor[:: target.step]}
    if isinstance(target, Squeezed):
        return {target.name: tensor.squeeze(-1)}
    return dict.fromkeys(target_names(target), tensor)


def restore_target(target: Target, weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Invert `apply_target`; return None if the weights do not hold all values."""
    names = target_names(target)
    if not names or isinstance(target, EveryNth):
        return None
    if isinstance(target, Chunks):
        return torch.cat([weights[name] for name in names])
    first = weights[names[0]]
    return first.unsqueeze(-1) if isinstance(target, Squeezed) else first


def compare_keys(table: Table, keys: set[str]) -> tuple[dict[str, int], Difference]:
    """Count the placeholders of the table in `keys`, and compare the keys with the expanded table."""
    patterns: dict[str, list[re.Pattern[str]]] = {}
    for key in table:
        patterns.setdefault(without_indices(key), []).append(key_pattern(key))
    counts = {name: 0 for key in table for name in PLACEHOLDER.findall(key)}
    unexpected = []
    for key in sorted(keys):
        candidates = patterns.get(without_indices(key), ())
        match = next((found for pattern in candidates if (found := pattern.fullmatch(key))), None)
        # Such a number would require more keys than the checkpoint has; expanding the table could exhaust the memory.
        if match is None or any(int(number) >= len(keys) for number in match.groups()):
            unexpected.append(key)
            continue
        for name, number in match.groupdict().items():
            counts[name] = max(counts[name], int(number) + 1)
    absent = (key for key, _ in expand_lazily(table, counts) if key not in keys)
    # The product of two large counts can be huge, so the number of listed keys is limited.
    missing = list(dict.fromkeys(itertools.islice(absent, len(keys) + 1)))
    return counts, Difference(missing, unexpected)


def without_indices(key: str) -> str:
    """Replace numbers and placeholders by 0, so that a key and its table key become equal."""
    return NUMBER.sub("0", PLACEHOLDER.sub("0", key))


@cache
def key_pattern(key: str) -> re.Pattern[str]:
    """Return a table key as a regular expression, with placeholders as groups."""
    literal, *rest = PLACEHOLDER.split(key)
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return re.compile(re.escape(literal) + "".join(rf"(?P<{name}>{INDEX}){re.escape(text)}" for name, text in pairs))


def expand(table: Table, counts: Mapping[str, int]) -> dict[str, tuple[str, Target]]:
    """Return the table with one line for every number of its placeholders."""
    return dict(expand_lazily(table, counts))


def expand_lazily(table: Table, counts: Mapping[str, int]) -> Iterator[tuple[str, tuple[str, Target]]]:
    """Yield the lines of `expand`; of two lines with the same key the later one applies."""
    for key, (shape, target) in table.items():
        names = PLACEHOLDER.findall(key)
        for numbers in itertools.product(*(range(max(counts[name], 1)) for name in names)):
            filled = dict(zip(names, map(str, numbers), strict=True))
            yield key.format(**filled), (shape, fill_placeholders(target, filled))


def fill_placeholders(target: Target, numbers: Mapping[str, str]) -> Target:
    """Replace the placeholders of `target` by numbers."""
    return rename_target(target, lambda name: name.format(**numbers))


def prefixed(table: Table, key_prefix: str, name_prefix: str) -> Table:
    """Return `table` with prefixes added to its keys and to the names of its targets."""
    return {
        key_prefix + key: (shape, rename_target(target, lambda name: name_prefix + name))
        for key, (shape, target) in table.items()
    }


def rename_target(target: Target, rename: Callable[[str], str]) -> Target:
    """Rename the weights that `target` fills."""
    if isinstance(target, Dropped):
        return target
    if isinstance(target, str):
        return rename(target)
    if isinstance(target, Chunks | Copies):
        return replace(target, names=tuple(map(rename, target.names)))
    return replace(target, name=rename(target.name))


def match_shapes(lines: Mapping[str, tuple[str, Target]], tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Infer the sizes of the letters; each has the most frequent value among the shapes in which it occurs alone.

    Raises:
        ValueError: a shape contradicts the others or is empty; the message names its key.
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
            raise ValueError(f"{key!r} has shape {found}, which is empty: save the original's state_dict again")
        if len(found) != len(expected) or any(e not in (None, f) for e, f in zip(expected, found, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            raise ValueError(f"{key!r} has shape {found}, but the other weights require ({wanted})")
    return sizes


def evaluate(word: str, sizes: Mapping[str, int]) -> int:
    """Evaluate a size such as `C+4D+1`; return −1 if a letter is unknown."""
    total = 0
    for factor, letter in (TERM.fullmatch(term).groups() for term in word.split("+")):  # type: ignore[union-attr]
        if letter and letter not in sizes:
            return -1
        total += int(factor or 1) * (sizes[letter] if letter else 1)
    return total
