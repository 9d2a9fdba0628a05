"""Marks for parametrized tests: `make test` runs few of several similar values."""

from collections.abc import Iterable

import pytest


def first_quickly(values: Iterable, count: int = 1) -> list:
    """Return the first `count` values unchanged and the others marked slow."""
    values = list(values)
    return [*values[:count], *(pytest.param(value, marks=pytest.mark.slow) for value in values[count:])]
