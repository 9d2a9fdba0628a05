"""Loads the bundled corpus of English text in the public domain. README.md names its sources."""

import bz2
import json
from pathlib import Path

from datasets import Dataset

SPLITS = ("train", "validation", "test")


def load_corpus(split: str) -> Dataset:
    """Load one split of the bundled corpus: Shakespeare's plays and poems and the King James Bible, 9.2 MB in total.

    Each play, poem or book of the Bible is one document and belongs to exactly one split.

    Args:
        split: "train" (92 % of the text), "validation" (4 %) or "test" (4 %).

    Returns:
        An in-memory dataset with the string columns `text`, `title` and `source`, which is "shakespeare" or
        "king-james-bible".

    Raises:
        ValueError: `split` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"the corpus has no split {split!r}: choose one of {', '.join(SPLITS)}")
    with bz2.open(Path(__file__).parent / f"{split}.jsonl.bz2", "rt", encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])
