"""The entry of ptq_exp in diffusers' table of quantization methods, made when diffusers has the table.

Importing this module takes nothing but the standard library: diffusers and torch are imported by whoever needs them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TABLES = "diffusers.quantizers.auto"
_OURS = "ptq_exp.deploy.diffusers_quantizer"


def register() -> None:
    """Let `from_pretrained` of diffusers know the method, now or as soon as diffusers is imported."""
    if _TABLES in sys.modules:
        _add(sys.modules[_TABLES])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _add(tables: ModuleType) -> None:
    import_module(_OURS).add_to(tables)


class _Finder(MetaPathFinder):
    """Finds the module with the tables where it is, and adds to it after its own code has run."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of that one module; None of all others."""
        if fullname != _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _add(module)

            loader.exec_module = exec_module
        return spec
