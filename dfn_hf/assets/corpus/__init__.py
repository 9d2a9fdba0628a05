"""The embedded corpus of public-domain English. README.md beside this file tells where it comes from."""

import json
import lzma
from pathlib import Path

from datasets import Dataset

SPLITS = ("train", "validation", "test")


def load_corpus(split: str) -> Dataset:
    """One split of the embedded corpus: Shakespeare's plays and poems and the King James Bible, 9.2 MB in all.

    The split is by document: no play and no book of the Bible stands in two splits.

    Args:
        split: "train" (92 % of the text), "validation" (4 %) or "test" (4 %).

    Returns:
        A dataset in memory with the string columns `text`, `title` and `source` ("shakespeare" or "king-james-bible").

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"the corpus has no split {split!r}; there are: {', '.join(SPLITS)}")
    with lzma.open(Path(__file__).parent / f"{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])
