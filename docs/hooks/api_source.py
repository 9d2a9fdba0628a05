"""Gives mkdocstrings a copy of the package in its installed layout.

mkdocstrings reads source code without importing it. It cannot follow two things that this package does at import time:
`modeling/` and `conversion/` are mapped into `dfn_hf`, and packages export their public names lazily. The copy has the
layout of the wheel, and each lazy export is written there as an ordinary import.
"""

import ast
import re
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parents[2]
MAPPED = {"dfn_hf": "dfn_hf", "dfn_hf/modeling": "modeling", "dfn_hf/conversion": "conversion"}

EXAMPLE = re.compile(r"^( +)Example:$", flags=re.MULTILINE)  # only "Examples:" is a section of doctests to the parser
FIELD = re.compile(r"^ {8}[\w, ]+ \((.*)\): ", flags=re.MULTILINE)  # `name (`int`, defaults to 4): ...`

_copy: tempfile.TemporaryDirectory | None = None


def on_startup(**kwargs) -> None:
    """Present so that mkdocs keeps this module, and with it the copy, across the builds of `mkdocs serve`."""


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config):
    """Copy the package and point mkdocstrings to the copy."""
    global _copy
    _copy = tempfile.TemporaryDirectory(prefix="dfn-hf-docs-")
    folder = Path(_copy.name)
    for target, source in MAPPED.items():
        for path in sorted((ROOT / source).rglob("*.py")):
            copied = folder / target / path.relative_to(ROOT / source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_text(readable_docstrings(path), encoding="utf-8")
    for path in folder.rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(folder).parts)
        statements = explicit_exports(path.read_text(encoding="utf-8"), package)
        if statements:
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" + statements)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(folder)]
    return config


def on_shutdown(**kwargs) -> None:
    """Delete the copy."""
    if _copy is not None:
        _copy.cleanup()


def readable_docstrings(path: Path) -> str:
    """Return the source of a module with its docstrings in the form that the parser of mkdocstrings expects.

    Configurations document their fields as transformers does, with Markdown in the types. They are dataclasses through
    a decorator that the parser does not know, so their arguments are listed as attributes.
    """
    text = EXAMPLE.sub(r"\1Examples:", path.read_text(encoding="utf-8"))
    if path.name.startswith("configuration_"):
        text = re.sub(r"^    Args:$", "    Attributes:", text, flags=re.MULTILINE)
        text = FIELD.sub(lambda found: found[0].replace("`", "").replace("*", ""), text)
    return text


def explicit_exports(source: str, package: str) -> str:
    """Return import statements and `__all__` for the call of `lazy_exports` in `source`; empty if there is none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_exports":
            base = package.rpartition(".")[0] if "rpartition" in ast.unparse(node.args[0]) else package
            modules = ast.literal_eval(node.args[1])
            lines = [f"from {base}.{module} import {', '.join(names)}" for module, names in modules.items()]
            names = sorted(name for names in modules.values() for name in names)
            return "\n".join([*lines, f"__all__ = {names!r}", ""])
    return ""
