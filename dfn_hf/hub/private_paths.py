"""Keeps local paths out of published files. Imports the standard library only."""

import os
import re
from pathlib import Path
from typing import Any

from ..loading.model_path import HUB_ID

PATH_FIELDS = ("name_or_path", "_file")  # endings of the JSON fields in which transformers and PEFT store paths
MIN_PARTS = 3  # "/data/models" has 3 parts; the paths of shorter folders, such as /tmp, are not private


def public_name(source: str | Path) -> str:
    """Return the name of a model or of data for a card: the last component of a local path, anything else unchanged.

    Args:
        source: a path, the name of a bundled checkpoint, a Hub id, or words without a slash.
    """
    text = str(source)
    is_hub_id = HUB_ID.fullmatch(text) is not None and not text.startswith(".")
    if (is_hub_id or not re.search(r"[/\\]", text)) and not os.path.exists(text):
        return text
    return re.split(r"[/\\]", os.path.abspath(text))[-1] or text


def without_paths(value: Any) -> Any:
    """Return a copy of a JSON value in which the fields that name a local path hold its last component."""
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        field: public_name(item) if isinstance(item, str) and field.endswith(PATH_FIELDS) else without_paths(item)
        for field, item in value.items()
    }


def find_private_path(text: str, folder: Path) -> str | None:
    """Return a path in `text` that lies in the home folder or beside `folder`, or None."""
    home = Path.home()
    places = {home} if home != Path(home.anchor) else set()
    places |= {place for place in (folder.absolute().parent, folder.resolve().parent) if len(place.parts) >= MIN_PARTS}
    for place in places:
        found = re.search(rf"{re.escape(str(place))}[/\\][^\s\"'`<>()]+", text)
        if found is not None:
            return found.group().rstrip(".,;:")
    return None
