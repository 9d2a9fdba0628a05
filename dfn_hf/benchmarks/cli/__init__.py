"""The commands of `dfn-hf bench`; importing this package imports typer and the standard library only."""

from .app import app

__all__ = ["app"]
