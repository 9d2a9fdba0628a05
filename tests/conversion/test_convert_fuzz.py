"""Ten thousand damaged or hostile checkpoint files: each converts or raises a user error; none executes code."""

import random

import pytest

from tests.campaigns.original_checkpoints import ATTEMPTS

FILES = 10_000


@pytest.mark.slow  # ten thousand files
def test_damaged_and_hostile_files_raise_user_errors(tmp_path):
    for number in range(FILES):
        generator = random.Random(number)
        generator.choice(ATTEMPTS)(tmp_path, generator)
