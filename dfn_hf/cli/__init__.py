"""The `dfn-hf` command."""

from .app import app

__all__ = ["app"]
