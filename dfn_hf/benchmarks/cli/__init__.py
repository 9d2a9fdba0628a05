"""The commands of `dfn-hf bench`."""

from .app import app

__all__ = ["app"]
