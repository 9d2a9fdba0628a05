"""Builds a summarization dataset from HTML pages: the source is the start of a page, the target its title.

Example:
    ```bash
    python examples/summaries.py PAGES OUTPUT
    ```
"""

import json
import sys
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated

import typer

from dfn_hf.storage.output_folder import atomic_output_dir

MAX_CHARACTERS = 600  # of a source; it consists of complete paragraphs
TEST_FRACTION = 0.1  # of the titles


class Page(HTMLParser):
    """Parses the title and the paragraphs of one page.

    Attributes:
        title: text of the first `<h1>`.
        paragraphs: texts of the `<p>` elements after it.
    """

    def __init__(self, html: str):
        super().__init__()
        self.title = ""
        self.paragraphs: list[str] = []
        self._element: str | None = None
        self._text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == ("p" if self.title else "h1"):
            self._element, self._text = tag, []

    def handle_data(self, data: str) -> None:
        if self._element is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag != self._element:
            return
        text = " ".join("".join(self._text).split())
        if tag == "h1":
            self.title = text
        elif text:
            self.paragraphs.append(text)
        self._element = None


def read_pairs(folder: Path) -> list[dict[str, str]]:
    """Read one pair per HTML page below `folder`: `source` is its first paragraphs, `target` its title.

    Pages without title or paragraph and pages with the same source as an earlier page are skipped.

    Raises:
        ValueError: there is no folder or no such page.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: check the path")
    pairs: dict[str, dict[str, str]] = {}
    for path in sorted(folder.rglob("*.html")):
        page = Page(path.read_text(encoding="utf-8"))
        source = page.paragraphs[0] if page.paragraphs else ""
        for paragraph in page.paragraphs[1:]:
            if len(source) + 1 + len(paragraph) > MAX_CHARACTERS:
                break
            source += " " + paragraph
        if source and page.title and len(source) <= MAX_CHARACTERS:
            pairs.setdefault(source, {"source": source, "target": page.title})
    if not pairs:
        raise ValueError(f"{folder} holds no .html page with a heading and a paragraph: give a folder of pages")
    return list(pairs.values())


def is_test(title: str) -> bool:
    """Whether pages with this title belong to the test split; train and test splits have no title in common."""
    return int.from_bytes(sha256(title.lower().encode()).digest()[:4]) < TEST_FRACTION * 2**32


def build(
    pages: Annotated[Path, typer.Argument(help="Folder with .html files, read recursively.")],
    output: Annotated[Path, typer.Argument(help="New or empty folder for train.jsonl and test.jsonl.")],
) -> None:
    """Write the pairs as JSON Lines; 10 % of the titles form the test split."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty: choose another folder")
    pairs = read_pairs(pages)
    with atomic_output_dir(output) as folder:
        for split, is_test_split in (("train", False), ("test", True)):
            of_split = [pair for pair in pairs if is_test(pair["target"]) == is_test_split]
            lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in of_split)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
            typer.echo(f"{split}: {len(of_split):,} pairs")


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(build)

if __name__ == "__main__":
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
