"""Box trees of short rows: with half of the seeds, DFN's box tree takes blocks of 16 entities instead of 128."""

import pytest

from tests.support.tree_sizes import set_sizes_and_c


@pytest.fixture(autouse=True)
def small_trees(request, monkeypatch):
    if request.node.callspec.params.get("seed", 0) % 2:
        set_sizes_and_c(monkeypatch, BLOCK=16, RECENT=4)
