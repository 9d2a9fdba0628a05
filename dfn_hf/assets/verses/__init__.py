"""Loads the bundled English-Spanish verse pairs. README.md names their sources."""

import bz2
import json
from pathlib import Path

from datasets import Dataset

SPLITS = ("train", "validation", "test")


def load_verses(split: str) -> Dataset:
    """Load one split of the verses of the World English Bible, paired with those of the Reina-Valera (1909).

    Each book belongs to exactly one split. Books that retell each other are in the train split.

    Args:
        split: "train" (56 books), "validation" (5 books) or "test" (5 books).

    Returns:
        An in-memory dataset with the string columns `source` (English), `target` (Spanish) and `verse` ("Ruth 1:1").

    Raises:
        ValueError: `split` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"the verses have no split {split!r}: choose one of {', '.join(SPLITS)}")
    with bz2.open(Path(__file__).parent / f"{split}.jsonl.bz2", "rt", encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])
