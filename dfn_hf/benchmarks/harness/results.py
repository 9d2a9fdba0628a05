"""One CSV per benchmark: a finished run is a row, keyed by its settings, so that a long table can grow by and by."""

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
    """Any dataclass or instance of one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


SettingsT = TypeVar("SettingsT", bound=Dataclass)
MeasuresT = TypeVar("MeasuresT", bound=Dataclass)


class ResultsFile(Generic[SettingsT, MeasuresT]):
    """The finished runs of one benchmark.

    Args:
        path: the CSV file; made, with its folder, at the first finished run.
        settings: frozen dataclass of what decides a run (the key of a row).
        measures: frozen dataclass of what a run found.

    Strings are stored as they are, every other value as JSON.

    Raises:
        ValueError: the file holds another benchmark's columns, or a cell that cannot be read.
    """

    def __init__(self, path: str | Path, settings: type[SettingsT], measures: type[MeasuresT]):
        self.path = Path(path)
        self._settings = settings
        self._measures = measures
        self._columns = [field.name for field in (*dataclasses.fields(settings), *dataclasses.fields(measures))]
        self.rows()

    def rows(self) -> list[tuple[SettingsT, MeasuresT]]:
        """Every finished run, oldest first. A last row cut short by a kill is no finished run."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is not None and reader.fieldnames != self._columns:
                raise ValueError(
                    f"{self.path} has other columns ({', '.join(reader.fieldnames)}) than this benchmark writes "
                    f"({', '.join(self._columns)}): move it away or choose another results file"
                )
            complete = [row for row in reader if None not in row.values()]
        return [(self._read(self._settings, row), self._read(self._measures, row)) for row in complete]

    def run(self, settings: SettingsT, measure: Callable[[SettingsT], MeasuresT]) -> MeasuresT:
        """The stored measures of these settings, or else those of `measure(settings)`, stored before they return."""
        for done, measures in self.rows():
            if done == settings:
                return measures
        measures = measure(settings)
        self._append(settings, measures)
        return measures

    def _append(self, settings: SettingsT, measures: MeasuresT) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        existing = self.path.read_bytes() if self.path.exists() else b""
        if not existing:
            writer.writerow(self._columns)
        elif not existing.endswith(b"\n"):
            text.write("\n")
        cells = [*vars(settings).values(), *vars(measures).values()]
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
                raise ValueError(f"{self.path}: column {field.name} holds {cell!r}, which is no value") from error
        return kind(**values)


def mean_with_error(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± standard error over seeds; the value alone where there is one run; "–" where a run has no value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    if len(known) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(known) / math.sqrt(len(known)):.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up when read as plain text."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (header, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
