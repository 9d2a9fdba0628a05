"""`python -m dfn_hf.cli`, for launchers such as torchrun."""

import sys

from . import app

sys.exit(app())
