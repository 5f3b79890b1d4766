"""Which layer or attention a multiplication belongs to, while a network runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Owners:
    """Says, as a context while a network runs, which layer or attention a multiplication belongs to.

    It is the innermost one whose forward is running; what hooks compute before and after that is not part of it. A
    multiplication outside all layers by the weight of one, or by what was made of it, belongs to that layer.
    """

    def __init__(self, layers: Mapping[str, nn.Module], attentions: Mapping[str, nn.Module]) -> None:
        self.layers, self.modules = layers, {**layers, **attentions}
        self._running: list[str] = []
        self._hooks = ExitStack()
        places: dict[int, list[str]] = defaultdict(list)
        for name, layer in layers.items():
            if (place := place_of(_weight(layer))) is not None:
                places[place].append(name)
        self._by_weight = {place: names[0] for place, names in places.items() if len(names) == 1}
        self._kept: list[Tensor] = []  # the place of one that is gone may be given to another

    @property
    def innermost(self) -> str | None:
        """The innermost module that is running; None outside of all."""
        return self._running[-1] if self._running else None

    def of(self, operands: Sequence[Any]) -> str | None:
        """Return the owner of a multiplication of `operands` (other values among them do not matter)."""
        name = self.innermost
        if name in self.layers:
            return name
        found = (self._by_weight.get(place_of(operand)) for operand in operands)
        return next((layer for layer in found if layer is not None), name)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Let what is multiplied inside the context belong to `name`, as to a module that is running."""
        self._running.append(name)
        try:
            yield
        finally:
            self._running.pop()

    def derive(self, layer: str, made: Any) -> None:
        """Note that `made` was computed from the weight of `layer`; of another size it is no weight in its place."""
        place = place_of(made)
        if place is not None and made.numel() and made.numel() % _weight(self.layers[layer]).numel() == 0:
            self._by_weight.setdefault(place, layer)
            self._kept.append(made)

    def __enter__(self) -> Owners:
        for name, module in self.modules.items():
            enter = module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name))
            self._hooks.enter_context(enter)
            self._hooks.enter_context(module.register_forward_hook(self._leave, prepend=True))
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.close()
        self._running.clear()
        self._kept.clear()

    def _leave(self, *_: Any) -> None:
        """Nothing is returned: a hook's value would take the place of the module's output."""
        self._running.pop()


def _weight(layer: nn.Module) -> Tensor | None:
    """Return the weight that `layer` holds; one that is computed when it is asked for does not count."""
    held = (layer._parameters, layer._buffers, layer.__dict__)
    return next((values["weight"] for values in held if values.get("weight") is not None), None)


def place_of(value: Any) -> int | None:
    """Where the elements of a tensor lie; None for one without storage, and for what is no tensor."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        return None
    return value.untyped_storage().data_ptr() or None
