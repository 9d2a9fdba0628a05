"""Report on the conversion of every weight."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..data.files import explain_read_errors

REPORT_FILE = "conversion_report.json"


@dataclass
class ConversionReport:
    """Report of a conversion.

    Attributes:
        layout: format of the source, such as `flownetwork-F1`.
        model: class of the written model.
        mapped: source key → names of the weights that it fills.
        dropped: source key → reason. Together with `mapped` it covers all source keys.
        new: weights without a source, which are newly initialised.
        notes: sentences about the result and its limits.
    """

    layout: str
    model: str
    mapped: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write `conversion_report.json` into `folder`."""
        (folder / REPORT_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def lines(self) -> list[str]:
        """Return the report as a few lines, with the dropped weights grouped by reason."""
        total = len(self.mapped) + len(self.dropped)
        reasons: dict[str, list[str]] = {}
        for key, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(key)
        filled = sum(len(targets) for targets in self.mapped.values())
        return [
            f"format {self.layout} → {self.model}",
            f"{total} keys: {len(self.mapped)} mapped to {filled} weights, {len(self.dropped)} dropped; "
            f"{len(self.new)} weights newly initialised",
            *(f"dropped {len(keys)}, such as {keys[0]}: {reason}" for reason, keys in reasons.items()),
            *self.notes,
        ]


def read_report(folder: Path) -> ConversionReport:
    """Read the report of the conversion that wrote `folder`.

    Raises:
        ValueError: `folder` contains no report, or it is damaged.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        raise ValueError(f"{folder} contains no {REPORT_FILE}: pass a folder that `dfn-hf convert` wrote")
    with explain_read_errors(path, "a conversion report"):
        return ConversionReport(**json.loads(path.read_text()))
