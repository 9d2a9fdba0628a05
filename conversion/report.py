"""What became of every weight."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPORT_FILE = "conversion_report.json"


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        layout: of the source, such as `flownetwork-F1`.
        model: class of what was written.
        mapped: source key → names of the weights it fills; dropped: source key → why. Together all source keys.
        new: weights that nothing of the source fills, freshly initialised.
        notes: what the result is and is not, a sentence each.
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
        """The report in a few lines, dropped weights by reason."""
        total = len(self.mapped) + len(self.dropped)
        reasons: dict[str, list[str]] = {}
        for key, why in self.dropped.items():
            reasons.setdefault(why, []).append(key)
        filled = sum(len(targets) for targets in self.mapped.values())
        return [
            f"layout {self.layout} → {self.model}",
            f"{total} keys: {len(self.mapped)} mapped to {filled} weights, {len(self.dropped)} dropped; "
            f"{len(self.new)} weights newly initialised",
            *(f"dropped {len(keys)}, such as {keys[0]}: {why}" for why, keys in reasons.items()),
            *self.notes,
        ]


def read_report(folder: Path) -> ConversionReport:
    """The report of the conversion that wrote `folder`.

    Raises:
        ValueError: there is none.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {REPORT_FILE}: give a folder that `dfn-hf convert` wrote")
    return ConversionReport(**json.loads(path.read_text()))
