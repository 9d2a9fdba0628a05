"""Reads C code from the files in this folder. `hub_code` replaces each call by the code, as a string."""

import re
from pathlib import Path


def c_source(name: str) -> str:
    """Return the C code of the file `name` in this folder, with the files that it includes from the folder."""
    code = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return re.sub(r'#include "(.+)"\n', lambda include: c_source(include[1]), code)
