"""Make the start of a command quicker: what libraries import and most runs never use is imported when it is used.

Nobody sees a difference but in seconds: every name is there when it is asked for, and is what it would have been.
"""

from __future__ import annotations

import gc
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock
from types import ModuleType
from typing import Any
from unittest import mock

_DYNAMO = "torch._dynamo"
_SIGNAL = "scipy.signal"
_CONFIGS = "transformers.utils.quantization_config"
_Run = Callable[[ModuleType], None]


def postpone_imports() -> None:
    """Postpone what diffusers, Lightning and torchmetrics import and a run may never need; see `_HOW`."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


_paused: bool | None = None  # None = nothing has been loaded yet


def pause_collector() -> None:
    """Look for no cyclic garbage until `loaded`, once in a process.

    While thousands of modules are loaded the collector goes through all of their objects again and again, and finds
    nothing.
    """
    global _paused
    if _paused is None:
        _paused = gc.isenabled()
        gc.disable()


def loaded() -> None:
    """Collect garbage again, but never look at what has been loaded so far: modules stay to the end."""
    global _paused
    if _paused:
        _paused = False
        gc.freeze()
        gc.enable()


class _Finder(MetaPathFinder):
    """Finds modules where they are, and lets a function run the code of those in `_HOW`."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a module in `_HOW`; None of all others."""
        if fullname not in _HOW:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = partial(_postponed, _HOW[fullname], loader.exec_module)
        return spec


def _postponed(how: Callable[[_Run, ModuleType], None], run: _Run, module: ModuleType) -> None:
    """Run the code of a module as `_HOW` says, or as it is, if another version of the library does not bear that."""
    try:
        how(run, module)
    except (ImportError, AttributeError):
        run(module)


_loading = RLock()


def _at_first_name(run: _Run, package: ModuleType) -> None:
    """Run the code of a package when it is asked for a name; its modules can be imported before.

    Other threads that ask meanwhile wait; after an error the next one that asks tries again.
    """
    own, running = vars(package), []

    def load(name: str) -> Any:
        # import and inspect ask every module for some names that begin so
        if not name.startswith("__") or name == "__all__":
            with _loading:
                if own.get("__getattr__") is load and not running:
                    running.append(True)
                    try:
                        run(package)
                    finally:
                        running.clear()
                    for key, value in (("__getattr__", load), ("__dir__", names)):
                        if own.get(key) is value:
                            del own[key]
            if own.get("__getattr__") is not load:
                return getattr(package, name)
        raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")

    def names() -> list[str]:
        with suppress(AttributeError):
            load("__all__")
        return sorted(own)

    own.update(__getattr__=load, __dir__=names)


def _functions_of_metrics(run: _Run, package: ModuleType) -> None:
    """As `_at_first_name`, but its modules import each other in circles, which are entered at this one."""
    import_module("torchmetrics.utilities")
    _at_first_name(run, package)


def _or_at_once(run: _Run, package: ModuleType) -> None:
    """Run the code of a package with parts in `_HOW`; where they cannot be imported by themselves, as it is."""
    try:
        _without_signal(run, package)
    except ImportError:
        inside = f"{package.__name__}."
        for modules in (_HOW, sys.modules):
            for name in [name for name in modules if name.startswith(inside)]:
                del modules[name]
        run(package)


def _without_signal(run: _Run, package: ModuleType) -> None:
    """Run the code of a package that gives `scipy.signal` back an old name, and for that loads most of scipy."""
    if _SIGNAL in sys.modules:
        return run(package)
    stand_in = ModuleType(_SIGNAL)
    vars(stand_in).update(hamming=None)
    with _instead(_SIGNAL, stand_in):
        run(package)
    _old_names.append("hamming")


def _with_old_names(run: _Run, module: ModuleType) -> None:
    """Run the code of `scipy.signal`, and make up for what `_without_signal` left out."""
    run(module)
    for name in _old_names:
        vars(module).setdefault(name, getattr(module.windows, name))


_old_names: list[str] = []
_allowed: list[Any] = []
_asking: list[ModuleType] = []


class _Compiled:
    """Stands for what `torch.compile` returns, of which there is nothing before it is loaded."""


def _allow_in_graph(function: Any) -> Any:
    """Tell `torch.compile` that it may call a class or function as it is; where it is not loaded yet, later."""
    allow = getattr(sys.modules.get(_DYNAMO), "allow_in_graph", None)
    if allow is not None:
        return allow(function)
    _allowed.append(function)
    return function


def _without_dynamo(run: _Run, module: ModuleType) -> None:
    """Run the code of a module that wants one of two names of what compiles, a hundred modules."""
    if _DYNAMO in sys.modules:
        return run(module)
    stand_in = ModuleType(_DYNAMO)
    vars(stand_in).update(allow_in_graph=_allow_in_graph, OptimizedModule=_Compiled)
    with _instead(_DYNAMO, stand_in):
        run(module)
    if vars(module).get("OptimizedModule") is _Compiled:
        _asking.append(module)


def _told(run: _Run, module: ModuleType) -> None:
    """Run the code of what compiles, and make up for what `_without_dynamo` left out."""
    run(module)
    for function in _allowed:
        vars(module)["allow_in_graph"](function)
    for other in _asking:
        vars(other)["OptimizedModule"] = vars(module)["OptimizedModule"]


def _disabled_at_calls(run: _Run, module: ModuleType) -> None:
    """Run the code of a module with methods that are not to be compiled, marked as torch marks its own: when called."""
    import torch

    with mock.patch.object(torch.compiler, "disable", torch._disable_dynamo):
        run(module)


def _without_configs(run: _Run, module: ModuleType) -> None:
    """Run the code of a module that takes a class of transformers for annotations, and does without if need be."""
    if _CONFIGS in sys.modules:
        return run(module)
    with _instead(_CONFIGS, None):
        run(module)


@contextmanager
def _instead(name: str, module: ModuleType | None) -> Iterator[None]:
    """Let `import` find another module, or none, under a name that is not loaded."""
    sys.modules[name] = module  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[name]


class _Distributions(Mapping):
    """Distributions that packages are of, listed at the first question: that reads the lists of all installed files."""

    @cached_property
    def _found(self) -> Mapping[str, list[str]]:
        return importlib.metadata.packages_distributions()

    def __getitem__(self, package: str) -> list[str]:
        return self._found[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _without_list(run: _Run, module: ModuleType) -> None:
    """Run the code of a module that asks which distributions there are, and seldom looks at the answer."""
    with mock.patch.object(importlib.metadata, "packages_distributions", _Distributions):
        run(module)


_HOW: dict[str, Callable[[_Run, ModuleType], None]] = {
    # packages of all architectures there are, with peft, transformers and scipy.stats; a run has one of them
    "diffusers.models.autoencoders": _at_first_name,
    "diffusers.models.transformers": _at_first_name,
    "diffusers.models.unets": _at_first_name,
    "diffusers.quantizers.pipe_quant_config": _without_configs,
    "diffusers.utils.import_utils": _without_list,
    "diffusers.utils.torch_utils": _without_dynamo,
    "lightning_fabric.wrappers": _without_dynamo,
    "pytorch_lightning.trainer.connectors.logger_connector.result": _disabled_at_calls,
    "pytorch_lightning.utilities.compile": _without_dynamo,
    _DYNAMO: _told,
    _SIGNAL: _with_old_names,
    # Lightning takes the class of all metrics; these bring transformers, torchvision and torch_fidelity
    "torchmetrics": _or_at_once,
    "torchmetrics.audio": _at_first_name,
    "torchmetrics.detection": _at_first_name,
    "torchmetrics.functional": _functions_of_metrics,
    "torchmetrics.functional.audio": _at_first_name,
    "torchmetrics.functional.detection": _at_first_name,
    "torchmetrics.functional.image": _at_first_name,
    "torchmetrics.functional.multimodal": _at_first_name,
    "torchmetrics.functional.text": _at_first_name,
    "torchmetrics.image": _at_first_name,
    "torchmetrics.text": _at_first_name,
}
"""How the code of modules is run, so that it imports less."""
