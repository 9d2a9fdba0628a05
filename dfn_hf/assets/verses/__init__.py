"""The embedded English-Spanish verse pairs. README.md beside this file tells where they come from."""

import json
import lzma
from pathlib import Path

from datasets import Dataset

SPLITS = ("train", "validation", "test")


def load_verses(split: str) -> Dataset:
    """One split of the verses of the World English Bible with those of the Reina-Valera of 1909.

    The split is by book: no book stands in two splits, and none of validation or test retells another.

    Args:
        split: "train" (56 books), "validation" (5) or "test" (5).

    Returns:
        A dataset in memory with the string columns `source` (English), `target` (Spanish) and `verse` ("Ruth 1:1").

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"the verses have no split {split!r}; there are: {', '.join(SPLITS)}")
    with lzma.open(Path(__file__).parent / f"{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])
