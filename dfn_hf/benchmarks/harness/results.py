"""CSV results of a benchmark: one row per finished run, keyed by its settings, so that a benchmark can be resumed."""

import csv
import dataclasses
import io
import json
import math
import os
import statistics
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar


class Dataclass(Protocol):
    """A dataclass, or an instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


SettingsT = TypeVar("SettingsT", bound=Dataclass)
ResultT = TypeVar("ResultT", bound=Dataclass)


class ResultsFile(Generic[SettingsT, ResultT]):
    """The finished runs of one benchmark.

    Strings are stored unquoted, every other value as JSON.

    Args:
        path: the CSV file; it and its folder are created when the first run is finished.
        settings: frozen dataclass with the settings of a run (the key of a row).
        result: frozen dataclass with the measured values of a run.

    Raises:
        ValueError: the file has the columns of another benchmark, or an unreadable cell.
    """

    def __init__(self, path: str | Path, settings: type[SettingsT], result: type[ResultT]):
        self.path = Path(path)
        self._settings = settings
        self._result_type = result
        self._columns = [field.name for field in (*dataclasses.fields(settings), *dataclasses.fields(result))]
        self.rows()

    def rows(self) -> list[tuple[SettingsT, ResultT]]:
        """Return the finished runs, oldest first. An incomplete last row, left by a killed process, is ignored."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is not None and reader.fieldnames != self._columns:
                raise ValueError(
                    f"{self.path} has the columns ({', '.join(reader.fieldnames)}), but this benchmark writes "
                    f"({', '.join(self._columns)}): choose another --results file"
                )
            complete = [row for row in reader if None not in row.values()]
        return [(self._read(self._settings, row), self._read(self._result_type, row)) for row in complete]

    def run(self, settings: SettingsT, measure: Callable[[SettingsT], ResultT]) -> ResultT:
        """Return the stored result of these settings; without one, call `measure(settings)` and store its result."""
        for done, result in self.rows():
            if done == settings:
                return result
        result = measure(settings)
        self._append(settings, result)
        return result

    def _append(self, settings: SettingsT, result: ResultT) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        existing = self.path.read_bytes() if self.path.exists() else b""
        if not existing:
            writer.writerow(self._columns)
        elif not existing.endswith(b"\n"):
            text.write("\n")
        cells = [*vars(settings).values(), *vars(result).values()]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())

    def _read(self, kind: type[Any], row: dict[str, str]) -> Any:
        types = typing.get_type_hints(kind)
        values = {}
        for field in dataclasses.fields(kind):
            cell = row[field.name]
            try:
                values[field.name] = cell if types[field.name] is str else json.loads(cell)
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path}: column {field.name} holds {cell!r}, which is not JSON") from error
        return kind(**values)


def mean_with_error(values: Sequence[float | None], digits: int = 3) -> str:
    """Format mean ± standard error over seeds: the value without ± for one run, "–" if a run has no value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    if len(known) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(known) / math.sqrt(len(known)):.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (header, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
