"""Pairs to summarise, what an HTML page says → its title: `python -m dfn_hf.page_titles PAGES OUTPUT`."""

import json
import sys
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated

import typer

from .hub.output_folder import atomic_output_dir

MAX_CHARACTERS = 600  # of a page's text, whole paragraphs
TEST_SHARE = 0.1


class Page(HTMLParser):
    """The title and the paragraphs of one page.

    Attributes:
        title: its first heading (h1).
        paragraphs: the texts of the `<p>` below it, in order.
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
    """`source`, the first paragraphs, and `target`, the title, of every page below `folder` that has both.

    Pages that start alike count once.

    Raises:
        ValueError: there is no such page.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
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
    """Whether pages of this title are held out, so that none of a test page's title is trained on."""
    return int.from_bytes(sha256(title.lower().encode()).digest()[:4]) < TEST_SHARE * 2**32


def build(
    pages: Annotated[Path, typer.Argument(help="A folder; every .html below it is read.")],
    output: Annotated[Path, typer.Argument(help="Folder for train.jsonl and test.jsonl: new or empty.")],
) -> None:
    """Write the pairs as JSON Lines, a tenth of the titles for testing."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty: choose another folder")
    pairs = read_pairs(pages)
    with atomic_output_dir(output) as folder:
        for split, tested in (("train", False), ("test", True)):
            chosen = [pair for pair in pairs if is_test(pair["target"]) == tested]
            lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in chosen)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
            typer.echo(f"{split}: {len(chosen):,} pairs")


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(build)

if __name__ == "__main__":
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
