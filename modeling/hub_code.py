"""Writes a family's code next to its weights, so that a saved folder loads with `trust_remote_code=True`.

transformers loads remote code from the files of one folder; their relative imports may only name files of that folder.
This module therefore merges the modules that a family imports, in dependency order, into at most three files:

- `configuration_<family>.py`: the configuration and what it imports;
- `<family>_kernels.py`: the modules of `ops/kernels` and what they import, with their C code as strings;
- `modeling_<family>.py`: everything else.

A merged file holds the imports of its modules and then their bodies, each below a comment with its source path.
Modules that need Triton are wrapped in a `try`, so that the file imports without it.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import ClassVar, TypeGuard

from .ops.kernels.c_source import c_source

ROOT = Path(__file__).parent
KERNELS = ROOT / "ops" / "kernels"
C_SOURCE = KERNELS / "c_source.py"
NOT_MERGED = (Path(__file__), C_SOURCE)
MARK = "# Generated from the modules of dfn_hf.modeling that are named below. Do not edit: change those."


class HubCodeMixin:
    """Lets a configuration save the code of its family. It must be the first base class of the configuration.

    `PreTrainedModel.save_pretrained`, `push_to_hub` and `Trainer` all save the configuration, so they all run this
    method. Merged files omit this class: transformers itself copies the code of classes loaded from a saved folder.

    Attributes:
        when_created: called whenever a configuration is created, unpickled or copied.
    """

    when_created: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def __new__(cls, *args, **kwargs):
        cls.when_created()
        return super().__new__(cls)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Write the family's code, then the configuration; arguments of `PreTrainedConfig.save_pretrained`."""
        write_code(sys.modules[type(self).__module__].__file__, Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)


def write_code(configuration_file: str, folder: Path) -> None:
    """Write the merged files of the family of `configuration_file`; delete merged files of earlier saves."""
    files = merged_files(Path(configuration_file))
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.py"):
        if path.name not in files and path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
            path.unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


@cache
def merged_files(configuration: Path) -> dict[str, str]:
    """Return the merged files, {file name: text}, of the family with this configuration module."""
    family = configuration.stem.removeprefix("configuration_")
    names = dict.fromkeys(closure([configuration]), configuration.name)
    paths = closure(sorted(configuration.parent.glob(f"modeling_{family}*.py")))
    kernels = closure(path for path in paths if path.parent == KERNELS)
    for path in paths:
        names.setdefault(path, f"{family}_kernels.py" if path in kernels else f"modeling_{family}.py")
    return {
        name: merge([path for path in names if names[path] == name], names) for name in sorted(set(names.values()))
    }


def closure(entries: Iterable[Path]) -> list[Path]:
    """Return `entries` and the modules that they import, directly or indirectly, dependencies first."""
    ordered: dict[Path, None] = {}

    def visit(path: Path) -> None:
        if path in ordered or path in NOT_MERGED:
            return
        imports = list(relative_imports(path))
        for _, target in (found for found in imports if found[0].col_offset == 0):
            visit(target)
        ordered[path] = None
        for _, target in imports:  # inside functions: may import this module in turn
            visit(target)

    for entry in entries:
        visit(entry)
    return list(ordered)


def relative_imports(path: Path) -> Iterator[tuple[ast.ImportFrom, Path]]:
    """Yield the statements `from .module import name` of a module, and the file that each imports from.

    Raises:
        ValueError: a relative import has another form, which a merged file could not resolve.
    """
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node.module is None or any(alias.asname for alias in node.names):
            raise ValueError(f"{path}:{node.lineno}: import names from a module, without `as`: the code is merged.")
        folder = path.parents[node.level - 1]
        yield node, folder.joinpath(*node.module.split(".")).with_suffix(".py")


def merge(paths: list[Path], names: dict[Path, str]) -> str:
    """Return the text of one merged file.

    Args:
        paths: its modules, dependencies first.
        names: the merged file of every module.
    """
    optional = [path for path in paths if needs_triton(path)]
    required = [path for path in paths if path not in optional]
    parts = [MARK, imports_of(required, names), *(body_of(path, names) for path in required)]
    if optional:
        inside = [imports_of(optional, names, within_try=True), *(body_of(path, names) for path in optional)]
        parts.append(
            f"try:\n{indented(blocks(inside))}\nexcept ImportError:  # torch operations run without Triton\n    pass"
        )
    return blocks(parts) + "\n"


def blocks(parts: Iterable[str]) -> str:
    return "\n\n\n".join(part.strip("\n") for part in parts if part)


def needs_triton(path: Path) -> bool:
    """Return whether a module imports Triton; such imports stand in a `try`."""
    return any(is_guarded_import(node) for node in parsed(path).body)


def is_guarded_import(node: ast.stmt) -> TypeGuard[ast.Try]:
    return isinstance(node, ast.Try) and all(isinstance(inner, ast.Import | ast.ImportFrom) for inner in node.body)


def imports_of(paths: list[Path], names: dict[Path, str], within_try: bool = False) -> str:
    """Return the imports of a merged file without duplicates: standard library, packages, other merged files."""
    modules: set[str] = set()
    members: dict[str, set[str]] = {}
    for path in paths:
        statements = list(parsed(path).body)
        if within_try:
            statements += [inner for node in parsed(path).body if is_guarded_import(node) for inner in node.body]
        for statement in statements:
            if isinstance(statement, ast.Import):
                modules.add(ast.unparse(statement))
            elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
                members.setdefault(statement.module, set()).update(ast.unparse(alias) for alias in statement.names)
        for node, target in relative_imports(path):
            if node.col_offset == 0 and target not in NOT_MERGED and names[target] != names[path]:
                module = "." + Path(names[target]).stem
                members.setdefault(module, set()).update(alias.name for alias in node.names)
    lines = [(line.split()[1], line) for line in modules]
    lines += [(module, from_import(module, members[module])) for module in members]
    return "\n".join(line for _, line in sorted(lines, key=lambda found: import_order(found[0])))


def from_import(module: str, members: Iterable[str]) -> str:
    line = f"from {module} import {', '.join(sorted(members))}"
    if len(line) <= 119:
        return line
    return f"from {module} import (\n" + "".join(f"    {member},\n" for member in sorted(members)) + ")"


def import_order(module: str) -> tuple[int, str]:
    """Sort key: standard library, then packages, then files of the folder."""
    is_standard = module.partition(".")[0] in sys.stdlib_module_names
    return (0 if is_standard else 2 if module.startswith(".") else 1), module


def body_of(path: Path, names: dict[Path, str]) -> str:
    """Return a module without its imports and `__all__`, after a comment with its path."""
    lines = path.read_text(encoding="utf-8").splitlines()
    edits: list[tuple[ast.stmt, str]] = []
    for inner, target in relative_imports(path):
        if inner.col_offset:
            edits.append((inner, "" if names[target] == names[path] else import_in_function(inner, names[target])))
    for node in parsed(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom) or is_guarded_import(node) or is_export_list(node):
            edits.append((node, ""))
        elif isinstance(node, ast.Assign) and (source := named_c_source(node)) is not None:
            edits.append((node, f'{ast.unparse(node.targets[0])} = r"""\n{c_source(source)}"""'))
        elif isinstance(node, ast.ClassDef):
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"{HubCodeMixin.__name__}, ", "")
    for node, text in sorted(edits, key=lambda edit: edit[0].lineno, reverse=True):
        lines[node.lineno - 1 : node.end_lineno] = [text] if text else []
    body = "\n".join(lines).strip("\n")
    return f"# {path.relative_to(ROOT.parent).as_posix()}\n{body}"


def import_in_function(node: ast.ImportFrom, file: str) -> str:
    """Return an import inside a function, rewritten to import from the merged file that contains the module."""
    names = ", ".join(alias.name for alias in node.names)
    return f"{' ' * node.col_offset}from .{Path(file).stem} import {names}"


def is_export_list(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def named_c_source(node: ast.Assign) -> str | None:
    """Return the file name in `NAME = c_source("file.c")`; None for another assignment."""
    if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "c_source":
        return ast.literal_eval(node.value.args[0])
    return None


def indented(text: str) -> str:
    """Indent `text` by four spaces, except the lines inside multi-line strings."""
    inside: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING:
            inside.update(range(token.start[0] + 1, token.end[0] + 1))
    lines = enumerate(text.splitlines(), start=1)
    return "\n".join(line if number in inside or not line else f"    {line}" for number, line in lines)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))
