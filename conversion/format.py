"""A layout: the keys of one original, and the models of this package that its weights go to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .key_table import Table

Sizes = Mapping[str, int]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Destination:
    """A kind of model that a layout's weights go to.

    Attributes:
        model: its class.
        config: its configuration, from sizes (the table's letters and the counts of its placeholders) and settings.
        notes: what the result is and is not, a sentence each.
    """

    model: type[PreTrainedModel]
    config: Callable[[Sizes, Settings], PreTrainedConfig]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """An original's way to name its weights.

    Attributes:
        name: family and version, such as `liquid-L6`.
        settings: arguments of the original's constructor that shapes don't give, with its defaults.
        table: its keys; see `key_table`. The targets are weights of `model`.
        model: what is written by default: this package's model with every weight that has a meaning there.
        native: a model that computes the original's function under the original's keys; None where that function is
            not well defined.
        not_native: why there is none.
        stored_names: what some files' `config` calls a setting in the place of the constructor's name.
    """

    name: str
    settings: Settings
    table: Table
    model: Destination
    native: Destination | None = None
    not_native: str = ""
    stored_names: Mapping[str, str] = field(default_factory=dict)

    def settle(self, given: Settings, stored: Settings) -> dict[str, Any]:
        """Settings as given, else as stored in the file, else as the original's default.

        Raises:
            ValueError: a setting that this layout has not, or a value of another type than the default's.
        """
        for name in given:
            if name not in self.settings:
                known = ", ".join(self.settings) or "none"
                raise ValueError(f"{name} has no meaning for a checkpoint of layout {self.name}: it takes {known}")
        settled = {}
        for name, default in self.settings.items():
            value = given.get(name, stored.get(name, stored.get(self.stored_names.get(name, name), default)))
            kinds = {bool: bool, int: int, float: int | float, list: list}[type(default)]
            if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
                example = [1, 2] if default == [] else default
                raise ValueError(
                    f"{name} is {value!r}: it must be of type {type(default).__name__}, such as {example}"
                )
            settled[name] = type(default)(value)
        return settled
