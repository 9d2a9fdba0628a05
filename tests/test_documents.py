"""The snippets, links and tables of README and of the pages in `docs`, and the notebooks."""

import re
import shlex
from pathlib import Path

import nbformat
import pytest
import typer
from nbclient import NotebookClient

from dfn_hf.cli.app import app
from tests.support import hub_server
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


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    with hub_server.serve() as address:
        hub = {"HF_ENDPOINT": address, "HF_TOKEN": hub_server.TOKEN, "HF_HUB_DISABLE_XET": "1"}
        for name, value in {**hub, "HF_HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
