"""What of a parametrized test `make test` runs: one value of those that differ little."""

from collections.abc import Iterable

import pytest


def first_quickly(values: Iterable, count: int = 1) -> list:
    """The first `count` values as they are, the others marked slow."""
    values = list(values)
    return [*values[:count], *(pytest.param(value, marks=pytest.mark.slow) for value in values[count:])]
