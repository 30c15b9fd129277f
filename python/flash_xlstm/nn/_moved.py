"""Names of modules of flash_xlstm.nn in release 0.1. They import the module of the new name with a DeprecationWarning,
so that code and pickled models keep working. To be removed in release 0.3."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_ROOT = "flash_xlstm.nn."
_MOVED = {
    "blocks": "block_stack",
    **{name: f"xlstm_7b.{name}" for name in ("block", "block_step", "feedforward", "mlstm", "norm", "projections")},
}


def install() -> None:
    """Lets the import system find modules under their old names. It precedes all other finders, which would load a
    second copy of a submodule from its package's folder."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def attribute(package: str, name: str) -> ModuleType:
    """An old name as an attribute of its package; AttributeError for any other name."""
    if name in _MOVED:
        return importlib.import_module(f"{package}.{name}")
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def _new_name(name: str) -> str | None:
    """The new name of the module `name`; None if `name` is not an old name."""
    if not name.startswith(_ROOT):
        return None
    first, dot, rest = name.removeprefix(_ROOT).partition(".")
    if first not in _MOVED:
        return None
    return _ROOT + _MOVED[first] + dot + rest


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        new = _new_name(fullname)
        if new is None or importlib.util.find_spec(new) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """Replaces `module` by the module of the new name, so that classes are the same under both names."""
        old = module.__name__
        new = _new_name(old)
        assert new is not None
        warnings.warn(f"{old} is now {new}; the old name goes in release 0.3", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)
