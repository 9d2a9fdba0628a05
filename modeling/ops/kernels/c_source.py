"""Reads C code from the files in this folder. `hub_code` replaces each call by the code, as a string."""

from pathlib import Path


def c_source(name: str) -> str:
    """Return the C code of the file `name` in this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
