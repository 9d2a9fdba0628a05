"""Where a model is loaded from: a folder, a bundled checkpoint or the Hub. Imports the standard library only."""

import re
from pathlib import Path

from .bundled import checkpoint_path

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_source(source: str) -> str:
    """Return what `from_pretrained` takes for `source`.

    Args:
        source: a folder with a `config.json`, the name of a bundled checkpoint, or a Hub id of the form `owner/name`,
            tried in this order.

    Raises:
        ValueError: `source` is none of the three.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{source} holds no config.json: give the folder of a saved model")
        return str(folder)
    try:
        return str(checkpoint_path(source))
    except ValueError as error:
        if HUB_ID.fullmatch(source):
            return source
        raise ValueError(f"{source!r} is neither a folder nor a Hub id (owner/name), and {error}") from None
