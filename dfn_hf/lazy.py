"""Lazy exports of a package (PEP 562): a name's module is imported when the name is first used."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from .extras import missing_extra


def lazy_exports(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: `__name__` of the package.
        modules: the names that each of its modules exports, by the module's path below the package.

    `__getattr__` raises an ImportError that names the extra to install if the module needs a package that is missing.

    Example:
        ```python
        __getattr__, __dir__, __all__ = lazy_exports(__name__, {"trainer": ["train_model"]})
        ```
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f"{package}.{module_of[name]}"), name)
        except ImportError as error:
            sentence = missing_extra(error)
            if sentence is None:
                raise
            raise ImportError(sentence, name=error.name) from error

    return __getattr__, lambda: sorted(module_of), sorted(module_of)
