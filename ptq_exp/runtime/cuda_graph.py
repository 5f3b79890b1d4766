"""`GraphedNetwork`: a network whose evaluation is recorded once as a CUDA graph, and replayed in every sampling step.

A step of a small network takes as long as Python and the driver need to start its kernels one by one. A replay starts
all of them at once, on the memory that they were recorded with: what a call gives is copied there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError, one_line
from ptq_exp.quantization import quantizers

Evaluate = Callable[[], Tensor]
Record = Callable[[Evaluate], tuple[Callable[[], object], Tensor]]
"""Records an evaluation without arguments; returns what replays it, and the tensor that holds its result then."""

PLAIN = 2
"""Evaluations of a shape before it is recorded: libraries load kernels and take memory in the first ones, and shapes
that a run meets once, such as that of a last, smaller batch, are not worth it."""
MOST = 4
"""Shapes that are recorded; each holds the memory of one evaluation. Others are evaluated as always."""


def on_cuda(evaluate: Evaluate) -> tuple[Callable[[], object], Tensor]:
    """Record an evaluation as a CUDA graph.

    Raises:
        RuntimeError: it cannot be recorded, as where it waits for the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = evaluate()
    return graph.replay, result


@dataclass(frozen=True)
class _Recorded:
    """One recorded evaluation: the tensors that it reads, what replays it, and where its result is then."""

    inputs: Mapping[str, Tensor]
    replay: Callable[[], object]
    result: Tensor

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        for name, value in given.items():
            self.inputs[name].copy_(value, non_blocking=True)
        self.replay()
        return self.result.clone()  # the next replay overwrites it, and solvers keep estimates


class GraphedNetwork(nn.Module):
    """Answers as `network` does, to the last bit.

    Which row of ranges a step uses, `Step` says in a tensor that stays where it is: one recording serves all steps.
    What would make a recording wrong is looked at in each call: tensors of the network that lie elsewhere, quantizers
    of another mode, hooks that came or went. Then it is recorded anew, after `PLAIN` calls. Modules that are added to
    the network, or taken away, are not seen.

    Args:
        network: called as (x [N, ...], t [N], conditions [N, ...] by name); evaluated without gradients.
        record: what records; another one than `on_cuda` is for tests.
    """

    def __init__(self, network: nn.Module, record: Record = on_cuda) -> None:
        super().__init__()
        self.network = network
        self._record = record
        self._modules_within = list(network.modules())
        self._quantizers = [quantizer for _, quantizer in quantizers(network)]
        self._recorded: dict[object, _Recorded] = {}
        self._calls: dict[object, int] = {}
        self._state: object = None

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Return the estimate of `network`.

        Raises:
            ConfigError: its evaluation cannot be recorded.
        """
        given = {"x": x, "t": t} | conditions
        if torch.is_grad_enabled():
            return self.network(x, t, **conditions)
        if (state := self._state_of_network()) != self._state:
            self._recorded, self._calls, self._state = {}, {}, state
        shape = tuple((name, value.shape, value.stride(), value.dtype, value.device) for name, value in given.items())
        if shape in self._recorded:
            return self._recorded[shape](given)
        self._calls[shape] = self._calls.get(shape, 0) + 1
        if self._calls[shape] <= PLAIN or len(self._recorded) == MOST:
            return self.network(x, t, **conditions)
        self._recorded[shape] = self._record_call(given)
        return self._recorded[shape](given)

    def _record_call(self, given: Mapping[str, Tensor]) -> _Recorded:
        inputs = {name: value.clone() for name, value in given.items()}
        conditions = {name: inputs[name] for name in list(inputs)[2:]}
        try:
            return _Recorded(inputs, *self._record(lambda: self.network(inputs["x"], inputs["t"], **conditions)))
        except RuntimeError as error:
            raise ConfigError(
                f"trainer.cuda_graph=true: an evaluation of the network cannot be recorded ({one_line(error, 300)}): "
                "set trainer.cuda_graph=false"
            ) from error

    def _state_of_network(self) -> object:
        places, hooks = [], 0
        for module in self._modules_within:
            for tensors in (module._parameters, module._buffers):
                places += [value.data_ptr() for value in tensors.values() if value is not None]
            hooks += len(module._forward_hooks) + len(module._forward_pre_hooks)
        return places, hooks, [quantizer.mode for quantizer in self._quantizers]
