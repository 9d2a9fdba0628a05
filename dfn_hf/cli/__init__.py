"""The command line, `dfn-hf`."""

from .app import app

__all__ = ["app"]
