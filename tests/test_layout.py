"""The layout of the source: short files and functions, and arrows between the rooms of modeling that point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("modeling", "conversion", "dfn_hf") for path in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES = 450
MAX_STATEMENT_LINES = 60
# What each room of modeling may import.
ROOMS = {
    "ops": {"ops"},
    "modules": {"ops", "modules"},
    "dfn": {"ops", "modules", "dfn"},
    "flownetwork": {"ops", "modules", "flownetwork"},
    "liquid": {"ops", "modules", "liquid"},
    "native": {"ops", "modules", "native"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def statement_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the statements of a function, without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_are_short(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: statement_lines(node) for node in functions if statement_lines(node) > MAX_STATEMENT_LINES}
    assert long == {}


def test_model_code_lies_in_short_files():
    paths = [path for path in (ROOT / "modeling").rglob("*.py") if not path.name.startswith("modeling_")]
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_modeling_import_what_they_may(room):
    imported = set()
    for path in (ROOT / "modeling" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = path.parents[node.level - 1].joinpath(*node.module.split("."))
                imported.add(target.relative_to(ROOT / "modeling").parts[0])
    assert imported - {"hub_code"} <= ROOMS[room]


def test_the_package_does_not_import_its_benchmarks():
    outside = [path for path in (ROOT / "dfn_hf").rglob("*.py") if "benchmarks" not in path.parts]
    importing = [
        name_of(path)
        for path in outside
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and "benchmarks" in (node.module or "")
    ]
    assert importing == []
