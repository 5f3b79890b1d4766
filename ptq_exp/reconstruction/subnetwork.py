"""Some layers of a network cut out of it, together with the functions that lead from one of them to the next.

They are found by one forward of the network, not listed: a function between two layers is followed where all tensors
that it takes follow from outputs of the layers. Anything else that a layer reads is an input of the part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.trace.evaluate import evaluate, tensors_in
from ptq_exp.quantization.trace.provenance import watching


@dataclass(frozen=True)
class Slot:
    """A tensor of one forward, by the order in which it was made."""

    number: int


@dataclass(frozen=True)
class Operation:
    """One piece of the forward of these layers: a call of `layer`, or of `function` between two of them.

    Attributes:
        layer: name in the network; None for a function.
        args, kwargs: with a `Slot` in the place of each tensor.
        outputs: one, or several for a function that returns a tuple or list.
    """

    layer: str | None
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[Slot, ...]

    @property
    def inputs(self) -> list[Slot]:
        """The tensors that it reads."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Slot)]


@dataclass(frozen=True)
class Plan:
    """How the outputs of some layers follow from the inputs of the first ones of them.

    Attributes:
        steps: in the order of the forward.
        roots: {layer: its input} of those whose input follows from no other layer.
        leaves: {layer: its output} of those that no other layer follows from.
    """

    steps: tuple[Operation, ...]
    roots: dict[str, Slot]
    leaves: dict[str, Slot]


class Part(nn.Module):
    """The layers of a `Plan` cut out of `network`, whose modules they remain.

    ``(inputs of the roots, each [N, ...]) -> [N, D]``, the outputs of all leaves side by side: the sum over dimension 1
    of an error is the sum of the errors of all leaves.
    """

    def __init__(self, network: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        names = [step.layer for step in plan.steps if step.layer is not None]
        self.layers = nn.ModuleList(network.get_submodule(name) for name in names)
        self.number = {name: number for number, name in enumerate(names)}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the steps of the plan; `inputs` in the order of its roots."""
        values: dict[Slot, Tensor] = dict(zip(self.plan.roots.values(), inputs, strict=True))
        for step in self.plan.steps:
            args, kwargs = pytree.tree_map_only(Slot, values.__getitem__, (step.args, step.kwargs))
            run = step.function if step.layer is None else self.layers[self.number[step.layer]]
            found = run(*args, **kwargs)
            values |= zip(step.outputs, [found] if isinstance(found, Tensor) else found, strict=True)
        return torch.cat([values[slot].flatten(1) for slot in self.plan.leaves.values()], 1)


def plan_part(network: nn.Module, names: Sequence[str], inputs: tuple) -> Plan:
    """Follow the layers `names` through one forward of the full-precision `network` on `inputs`.

    A layer that is called again on the values that it has read before is one step: it makes the same of them.

    Raises:
        QuantizationError: one of them is called on different values.
    """
    recorder = _Recorder()
    with watching(network) as watch, recorder:
        for name in names:
            watch(
                network.get_submodule(name),
                before=lambda x, name=name: recorder.enter(name, x), after=recorder.leave,
            )
        evaluate(network.forward, inputs)
    wanted = set(recorder.read.values())
    steps: list[Operation] = []
    for step in reversed(recorder.steps):
        if step.layer is not None or wanted & set(step.outputs):
            steps.append(step)
            wanted |= set(step.inputs)
    steps.reverse()
    followed = {slot for step in steps for slot in step.inputs}
    made = {slot for step in steps for slot in step.outputs}
    layers = {step.layer: step for step in steps if step.layer is not None}
    return Plan(
        tuple(steps),
        {name: step.inputs[0] for name, step in layers.items() if step.inputs[0] not in made},
        {name: step.outputs[0] for name, step in layers.items() if step.outputs[0] not in followed},
    )


def check_same(name: str, before: Tensor, now: Tensor) -> None:
    """Raise QuantizationError unless the layer `name`, which read `before`, reads the same again."""
    if not torch.equal(before, now):
        raise QuantizationError(
            f"{name} is called more than once in one evaluation of the network, on different values, and cannot be "
            "reconstructed on all times: set quantization.time_layers=calibration_set"
        )


class _Recorder(TorchFunctionMode):
    """Writes down the layers that are entered, and every function of nothing but what followed from their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Operation] = []
        self.read: dict[str, Slot] = {}
        self._values: dict[str, Tensor] = {}
        self._made_by: dict[str, Slot] = {}
        self._made = 0
        # the tensors are kept too: the identity of one that is gone may be given to another
        self._slots: dict[int, tuple[Tensor, Slot]] = {}

    def enter(self, name: str, x: Tensor) -> None:
        """Note that the layer `name` is about to read `x`."""
        self._entered = name
        if name not in self.read:
            self.read[name] = self._slot(x) or self._new(x)
            self._values[name] = x.clone()
        else:
            check_same(name, self._values[name], x)

    def leave(self, y: Tensor) -> None:
        """Note that the layer entered last has made `y`."""
        name = self._entered
        if name in self._made_by:
            self._slots[id(y)] = (y, self._made_by[name])
            return
        self._made_by[name] = self._new(y)
        self.steps.append(Operation(name, None, (self.read[name],), {}, (self._made_by[name],)))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned = function(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        outputs = [returned] if isinstance(returned, Tensor) else returned
        follows = tensors and all(self._slot(tensor) is not None for tensor in tensors)
        if not follows or not isinstance(outputs, list | tuple) or not all(isinstance(y, Tensor) for y in outputs):
            return returned
        slots = pytree.tree_map_only(Tensor, self._slot, (args, kwargs))
        # made after the arguments are looked up: a function may return its own argument
        self.steps.append(Operation(None, function, *slots, tuple(self._new(y) for y in outputs)))
        return returned

    def _slot(self, tensor: Tensor) -> Slot | None:
        return self._slots.get(id(tensor), (None, None))[1]

    def _new(self, tensor: Tensor) -> Slot:
        slot = Slot(self._made)
        self._made += 1
        self._slots[id(tensor)] = (tensor, slot)
        return slot
