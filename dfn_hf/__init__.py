"""Dynamic Flow Networks for Hugging Face Transformers."""

from pathlib import Path

# In a checkout `modeling` and `conversion` lie beside this folder, not in it: the installed layout holds there too.
if (Path(__file__).parent.parent / "modeling" / "configuration_dfn.py").exists():
    __path__.append(str(Path(__file__).parent.parent))

from .embedded import checkpoint_path  # noqa: E402

__version__ = "0.1.0"

__all__ = ["checkpoint_path"]
