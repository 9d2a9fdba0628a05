"""The small trained checkpoints that are part of the package."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parents[1] / "assets" / "checkpoints"


def checkpoint_path(name: str) -> Path:
    """Return the folder of the bundled checkpoint `name`, for `from_pretrained` and `pipeline`.

    Raises:
        ValueError: there is no such checkpoint; the message lists the bundled ones.
    """
    names = sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))
    if name not in names:
        raise ValueError(f"no bundled checkpoint is named {name!r}: choose one of {', '.join(names) or 'none'}")
    return CHECKPOINTS / name
