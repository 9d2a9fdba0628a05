"""The snippets, links and tables of README and of the pages in `docs`, and the notebooks."""

import re
import shlex
from pathlib import Path

import nbformat
import pytest
import typer

from dfn_hf.cli.app import app
from tests.support import notebooks
from tests.support.native_checkpoints import save_those_in_docs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
BASH = re.compile(r"```bash\n(.*?)```", flags=re.DOTALL)
FENCED = re.compile(r"```.*?```", flags=re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
GENERATED = {ROOT / "docs" / "reference" / "cli.md"}  # by docs/hooks/cli_reference.py when the site is built
MAX_README_BYTES = 14_000
SNIPPETS = PYTHON.findall(README)
DOCS = sorted((ROOT / "docs").rglob("*.md"))
every_page = pytest.mark.parametrize(
    "page", [ROOT / "README.md", *DOCS], ids=lambda page: str(page.relative_to(ROOT).with_suffix(""))
)
PAGES = [
    pytest.param(code, id=f"{page.relative_to(ROOT / 'docs').with_suffix('')}-{number}")
    for page in DOCS
    for number, code in enumerate(PYTHON.findall(page.read_text(encoding="utf-8")), start=1)
]


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippet_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number], f"README.md, snippet {number + 1}", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("code", PAGES)
def test_snippet_of_a_page_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_those_in_docs(tmp_path, code)
    exec(compile(code, "snippet", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_readme_has_its_snippets():
    assert len(SNIPPETS) == 4


def test_readme_is_short():
    assert len(README.encode()) <= MAX_README_BYTES


@every_page
def test_relative_links_resolve(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    targets = {target.partition("#")[0] for target in LINK.findall(text) if "://" not in target}
    paths = {(page.parent / target).resolve() for target in targets if target}
    missing = sorted(str(path.relative_to(ROOT)) for path in paths - GENERATED if not path.exists())
    assert not missing, f"{page.relative_to(ROOT)} links to {missing}"


@every_page
def test_commands_parse(page):
    blocks = BASH.findall(page.read_text(encoding="utf-8"))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program == "dfn-hf" and arguments[0] != "bench":  # the tables are tested with their commands
            command = typer.main.get_command(app)
            while hasattr(command, "commands"):
                command = command.commands[arguments.pop(0)]
            command.make_context(line, arguments)


SLOW_NOTEBOOKS = {"06_fields", "07_pairs"}  # 48 and 47 seconds on one core; the others take 21 to 41 seconds
NOTEBOOKS = [
    pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW_NOTEBOOKS), id=path.stem)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_gives_its_stored_outputs(path, tmp_path):
    stored = nbformat.read(path, as_version=4)
    changed = list(notebooks.changed_outputs(stored, notebooks.execute(path, tmp_path)))
    assert not changed, f"run: python -m tests.support.notebooks notebooks/{path.name}"


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("loss 4.532", "loss 4.533", True),
        ("loss 4.53", "loss 4.63", False),
        ("12 documents", "13 documents", False),
        ("wrote", "written", False),
        ("<object at 0x7f3a>", "<object at 0x55e1>", True),
        ("saved in /tmp/a/b in 1.5 s", "saved in /tmp/c/d in 3.1 s", True),
    ],
)
def test_notebook_outputs_are_compared_to_three_digits(before, after, same):
    assert notebooks.same_text(before, after) == same
