"""Builds the bundled verse pairs from the output of `mod2imp` for both Bibles; see dfn_hf/assets/verses/README.md.

Example:
    ```bash
    python scripts/build_verses.py web.imp rv1909.imp
    ```
"""

import bz2
import html
import json
import re
from pathlib import Path
from typing import Annotated

import typer

ASSETS = Path(__file__).parents[1] / "dfn_hf/assets/verses"
VALIDATION = ("Song of Solomon", "Lamentations", "Jonah", "Philippians", "Titus")
TEST = ("Ruth", "Esther", "Ecclesiastes", "I Thessalonians", "James")
MAX_RATIO = 3  # of text lengths in a pair; beyond it, verses are numbered differently or include a glossary

VERSE = re.compile(r"\$\$\$((?:[IV]+ )?[A-Z][A-Za-z ]*) (\d+):(\d+)$")
NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)
TITLE = re.compile(r"<title\b.*?</title>", re.DOTALL)
TAG = re.compile(r"<[^>]*>")
SPACE = re.compile(r"\s+")
BEFORE_MARK = re.compile(r" ([,.;:?!’”»)])")


def read_verses(path: Path) -> dict[tuple[str, int, int], str]:
    """Read the plain text of each verse by (book, chapter, number). Verses with number 0 are headings and skipped.

    Raises:
        ValueError: the file holds no verse.
    """
    verses: dict[tuple[str, int, int], str] = {}
    key = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("$$$"):
            found = VERSE.match(line)
            key = (found[1], int(found[2]), int(found[3])) if found else None
        elif key is not None and key[1] and key[2]:
            verses[key] = f"{verses[key]} {line}" if key in verses else line
    if not verses:
        raise ValueError(f"{path} holds no verse: give the output of mod2imp")
    return {key: strip_markup(text) for key, text in verses.items()}


def strip_markup(text: str) -> str:
    """Remove notes, headings, tags and pilcrows from a verse."""
    text = NOTE.sub(" ", text)
    text = TITLE.sub(" ", text)
    text = html.unescape(TAG.sub("", text)).replace("¶", " ")
    return BEFORE_MARK.sub(r"\1", SPACE.sub(" ", text)).strip()


def split_of(book: str) -> str:
    """Return the split of a book."""
    return "test" if book in TEST else "validation" if book in VALIDATION else "train"


def build(
    english: Annotated[Path, typer.Argument(help="Output of `mod2imp engWEB2015eb`.")],
    spanish: Annotated[Path, typer.Argument(help="Output of `mod2imp spaRV1909eb`.")],
    folder: Annotated[Path, typer.Option(help="Folder for the three splits.")] = ASSETS,
) -> None:
    """Pair the verses that both Bibles contain, skip pairs of very different lengths, and write the three splits."""
    sources, targets = read_verses(english), read_verses(spanish)
    lines: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for key, source in sources.items():
        target = targets.get(key)
        if source and target and 1 / MAX_RATIO <= len(source) / len(target) <= MAX_RATIO:
            book, chapter, number = key
            pair = {"source": source, "target": target, "verse": f"{book} {chapter}:{number}"}
            lines[split_of(book)].append(json.dumps(pair, ensure_ascii=False))
    for split, pairs in lines.items():
        data = "".join(f"{pair}\n" for pair in pairs).encode()
        (folder / f"{split}.jsonl.bz2").write_bytes(bz2.compress(data))
        typer.echo(f"{split}: {len(pairs):,} pairs, {len(data):,} bytes")


if __name__ == "__main__":
    typer.run(build)
