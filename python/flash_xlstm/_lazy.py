"""Packages whose names are imported at their first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: str, names: Mapping[str, str | None]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its name.
        names: maps each name to the module that defines it, or to None where the name is a submodule of the package.
    """

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = names[name]
        if home is None:
            return importlib.import_module(f"{package}.{name}")
        module = importlib.import_module(home)
        for other, its_home in names.items():
            if its_home == home:  # later lookups bypass this function; a name of the module's own would find the module
                setattr(sys.modules[package], other, getattr(module, other))
        return getattr(module, name)

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return getattr_, dir_
