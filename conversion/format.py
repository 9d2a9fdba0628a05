"""Description of a checkpoint format: the keys of one original, and the models that its weights are converted to."""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .key_table import Table

Sizes = Mapping[str, int]
Settings = Mapping[str, Any]

MAX_COUNT = 2**31 - 1
# Which values of a setting are accepted, and the rule in words; other numbers are counts.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha": (lambda value: 0 <= value <= 1e6, "between 0 and 1e6"),
    "beta": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "boundary_token_ids": (
        lambda value: all(type(number) is int and -1 <= number <= MAX_COUNT for number in value),
        "a list of token ids, with -1 for none",
    ),
    "compression_ratio": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "dense_limit": (lambda value: 0 <= value <= MAX_COUNT, f"between 0 and {MAX_COUNT}"),
    "dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "sigma": (lambda value: 0 < value <= 1e6, "above 0 and at most 1e6"),
}
COUNT: tuple[Callable[[Any], bool], str] = (lambda value: 1 <= value <= MAX_COUNT, f"between 1 and {MAX_COUNT}")


@dataclass(frozen=True)
class Destination:
    """Model class that a checkpoint is converted to.

    Attributes:
        model: model class.
        config: returns the configuration for sizes (letters of the table and counts of its placeholders) and settings.
        notes: sentences of the report about the result and its limits.
    """

    model: type[PreTrainedModel]
    config: Callable[[Sizes, Settings], PreTrainedConfig]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointFormat:
    """Format of the checkpoints of one original.

    Attributes:
        name: family and version, such as `liquid-L6`.
        settings: arguments of the original constructor that the shapes do not determine, with their defaults.
        table: the keys; see `key_table`. The targets are weights of `model`.
        model: default destination: this package's model, with every weight that has a counterpart in it.
        native: destination that computes the function of the original and has the keys of the original; None if this
            function is not well defined.
        not_native: reason why there is no `native`.
        stored_names: names of settings in the `config` of some files, if they differ from the constructor's.
    """

    name: str
    settings: Settings
    table: Table
    model: Destination
    native: Destination | None = None
    not_native: str = ""
    stored_names: Mapping[str, str] = field(default_factory=dict)

    def resolve_settings(self, given: Settings, stored: Settings) -> dict[str, Any]:
        """Return the settings: given by the user, else stored in the file, else the default of the original.

        Raises:
            ValueError: the format does not have a given setting, or a value has another type than the default or is
                out of range.
        """
        for name in given:
            if name not in self.settings:
                known = ", ".join(self.settings) or "no settings"
                raise ValueError(f"{name} does not apply to checkpoints of format {self.name}: use {known}")
        resolved = {}
        for name, default in self.settings.items():
            value = given.get(name, stored.get(name, stored.get(self.stored_names.get(name, name), default)))
            kinds = {bool: bool, int: int, float: int | float, list: list}[type(default)]
            if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
                example = [1, 2] if default == [] else default
                raise ValueError(
                    f"{name} is {reprlib.repr(value)}: it must have type {type(default).__name__}, such as {example}"
                )
            accepts, rule = RULES.get(name, COUNT)
            if type(default) is not bool and not accepts(value):
                raise ValueError(f"{name} is {reprlib.repr(value)}: it must be {rule}")
            resolved[name] = type(default)(value)
        return resolved
