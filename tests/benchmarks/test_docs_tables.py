"""Every table in docs/benchmarks equals the output of the command above it."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from dfn_hf.benchmarks.cli import app
from dfn_hf.benchmarks.cli.docs_tables import TABLE_BLOCK, commands_of, render_page, tables_of, update_tables
from dfn_hf.benchmarks.harness.results import ResultsFile

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "benchmarks").glob("*.md"))}
BLOCKS = [
    pytest.param(block.group(), id=f"{name}-{number}")
    for name, page in PAGES.items()
    for number, block in enumerate(TABLE_BLOCK.finditer(page), start=1)
]
WITHOUT_COMMAND = {"index.md", "conformance.md"}
PAGE = """Text.

```bash
dfn-hf bench echo --word "a b" \\
    --results x.csv
```

| old |
| --- |

After.
"""


def echo_group():
    echo_app = typer.Typer()

    @echo_app.command()
    def echo(word: str = typer.Option(), results: str = typer.Option()) -> None:
        typer.echo(f"\n| {word} |\n|---|\n\n| {results} |\n|---|\nslope 1.0\n")

    @echo_app.callback()
    def bench() -> None:
        pass

    return get_command(echo_app)


@pytest.mark.parametrize("block", BLOCKS)
def test_table_equals_the_output_of_its_command(block, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ResultsFile, "_append", lambda *_: pytest.fail("a run of the table is missing in its CSV"))
    (arguments,) = commands_of(block)
    plotted = arguments[0] in ("scaling", "peers", "single-head")
    plot = ["--plot", str(tmp_path / "plot.png")] if plotted else []
    result = CliRunner().invoke(app, [*arguments, *plot])
    assert result.exit_code == 0, result.output
    assert block.endswith("\n```\n\n" + tables_of(result.stdout))


def test_every_table_has_a_command():
    assert len(BLOCKS) == 29
    for name, page in PAGES.items():
        if name not in WITHOUT_COMMAND:
            assert not re.search(r"^\|", TABLE_BLOCK.sub("", page), flags=re.MULTILINE), name


def test_one_script_prints_every_table():
    script = (ROOT / "benchmarks" / "all.sh").read_text(encoding="utf-8").replace("\\\n", "")
    commands = [shlex.split(line)[2:] for line in script.splitlines() if line.startswith("dfn-hf bench ")]
    assert commands == [arguments for page in PAGES.values() for arguments in commands_of(page)]


def test_links_and_figures_exist():
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)", page):
            assert (ROOT / "docs" / "benchmarks" / target).is_file(), f"{name}: {target}"


def test_a_table_is_replaced_by_the_output_of_its_command():
    assert commands_of(PAGE) == [["echo", "--word", "a b", "--results", "x.csv"]]
    rendered = render_page(PAGE, echo_group())
    assert rendered == PAGE.replace("| old |\n| --- |\n", "| a b |\n|---|\n\n| x.csv |\n|---|\n")
    assert render_page(rendered, echo_group()) == rendered


def test_pages_are_written_unless_checked(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    assert update_tables(tmp_path, echo_group(), write=False) == [path]
    assert path.read_text() == PAGE
    assert update_tables(tmp_path, echo_group()) == [path]
    assert update_tables(tmp_path, echo_group()) == []


def test_a_folder_without_tables_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="choose docs/benchmarks"):
        update_tables(tmp_path, get_command(app))


def test_the_command_reports_outdated_pages(tmp_path):
    (tmp_path / "page.md").write_text(
        "```bash\ndfn-hf bench paper-lengths --results benchmarks/results/paper-lengths.csv\n```\n\n| old |\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        checked = CliRunner().invoke(app, ["docs", "--folder", str(tmp_path), "--check"])
        assert checked.exit_code == 1 and "page.md: outdated" in checked.stdout
        assert CliRunner().invoke(app, ["docs", "--folder", str(tmp_path)]).exit_code == 0
        assert CliRunner().invoke(app, ["docs", "--folder", str(tmp_path), "--check"]).exit_code == 0
