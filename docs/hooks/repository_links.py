"""Resolves links from pages to files of the repository that lie outside `docs/`.

A page links to such a file by its relative path, which works where the repository is read as files. In the site,
images are published under `repository/`, and other files are named by their path.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
IMAGES = {".png", ".svg", ".jpg"}


def outside_docs(source: str, target: str) -> Path | None:
    """Return the repository file outside `docs/` that the page `source` links to, None for any other link."""
    if "://" in target or target.startswith(("/", "mailto:")):
        return None
    path = Path(os.path.normpath(DOCS / PurePosixPath(source).parent / target))
    is_outside = path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)
    return path if is_outside and path.exists() else None


def on_files(files, config):
    """Publish the images outside `docs/` that pages show."""
    for page in list(files.documentation_pages()):
        for link in LINK.finditer(page.content_string):
            path = outside_docs(page.src_uri, link["target"])
            if path is None or path.suffix not in IMAGES:
                continue
            uri = f"repository/{path.relative_to(ROOT).as_posix()}"
            if uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of one page."""

    def rewrite(link: re.Match) -> str:
        path = outside_docs(page.file.src_uri, link["target"])
        if path is None:
            return link[0]
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in IMAGES:
            target = os.path.relpath(f"repository/{name}", str(PurePosixPath(page.file.src_uri).parent))
            return f"{link['image']}[{link['text']}]({target})"
        return f"`{name}`" if link["text"].strip("`") == name else f"{link['text']} (`{name}`)"

    return LINK.sub(rewrite, markdown)
