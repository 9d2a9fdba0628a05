"""Reads C code from the files beside this one. `hub_code` puts the code itself in place of the call."""

from pathlib import Path


def c_source(name: str) -> str:
    """The C code of the file `name` in this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
