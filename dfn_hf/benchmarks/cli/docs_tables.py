"""Tables of the documentation: each is the output of the benchmark command in the code block above it."""

import re
import shlex
from pathlib import Path

from .output import Command, captured_output

# A bash block that holds one `dfn-hf bench` command with --results, and the tables below it.
TABLE_BLOCK = re.compile(
    r"^(?P<head>```bash\ndfn-hf bench (?P<arguments>(?:[^`\n]|\n(?=    ))*--results(?:[^`\n]|\n(?=    ))*)\n```\n\n)"
    r"(?P<tables>(?:\|.*\n|\n(?=\|))+)",
    flags=re.MULTILINE,
)


def commands_of(page: str) -> list[list[str]]:
    """Return the arguments of `dfn-hf bench` above each table of a Markdown page."""
    return [_arguments(block) for block in TABLE_BLOCK.finditer(page)]


def tables_of(output: str) -> str:
    """Return the Markdown tables in the output of a benchmark command, separated by blank lines."""
    lines = [line if line.startswith("|") else "" for line in output.splitlines()]
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines).strip()) + "\n"


def render_page(page: str, group: Command) -> str:
    """Replace every table of a Markdown page by the output of its command."""
    return TABLE_BLOCK.sub(lambda block: block["head"] + tables_of(captured_output(group, _arguments(block))), page)


def update_tables(folder: Path, group: Command, *, write: bool = True) -> list[Path]:
    """Render the Markdown pages of a folder.

    Args:
        folder: the pages, such as docs/benchmarks.
        group: the command `dfn-hf bench`.
        write: whether changed pages are written.

    Returns:
        The changed pages.

    Raises:
        ValueError: the folder has no page with a table.
    """
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}
    if not any(TABLE_BLOCK.search(page) for page in pages.values()):
        raise ValueError(f"folder is {folder}, which has no page with a benchmark table: choose docs/benchmarks")
    changed = []
    for path, page in pages.items():
        rendered = render_page(page, group)
        if rendered == page:
            continue
        changed.append(path)
        if write:
            path.write_text(rendered, encoding="utf-8")
    return changed


def _arguments(block: re.Match[str]) -> list[str]:
    return shlex.split(block["arguments"].replace("\\\n", ""))
