"""The small trained checkpoints that the package holds."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parents[1] / "assets" / "checkpoints"


def checkpoint_path(name: str) -> Path:
    """The folder of the embedded checkpoint `name`, for `from_pretrained` and `pipeline`.

    Raises:
        ValueError: there is no such checkpoint; the message lists those there are.
    """
    names = sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))
    if name not in names:
        raise ValueError(f"no embedded checkpoint is named {name!r}; there are: {', '.join(names) or 'none'}")
    return CHECKPOINTS / name
