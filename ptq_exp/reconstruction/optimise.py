"""Reconstruction of one block (BRECQ, Li et al. 2021; QDrop, Wei et al. 2022).

Its roundings and step sizes are chosen so that it gives the full-precision network's output on the inputs that the
quantized network gives it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ptq_exp.diffusion import to_device
from ptq_exp.reconstruction.activations import StepSizes, dropping
from ptq_exp.reconstruction.adaround import Annealing, Rounding, reconstruction_loss
from ptq_exp.reconstruction.block_report import BlockError, LayerRounding
from ptq_exp.reconstruction.blocks import Block, held_twice
from ptq_exp.reconstruction.capture import Arena, Calls, output_of
from ptq_exp.reconstruction.inner import InnerTargets, outputs_of
from ptq_exp.reconstruction.randomness import block_generator, random_mask

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """How every block is optimised.

    Attributes:
        annealing: iterations of a block, and its regulariser.
        batch_size: rows per iteration, drawn without replacement.
        lr: Adam's, of the rounding variables; constant, as the regulariser is at its sharpest in the end.
        step_lr: Adam's, of the activation step sizes in units of the calibrated ones; falls to 0 as a cosine. 0 = they
            stay.
        power: of the errors in the loss.
        input_prob: probability of each input element to come from the quantized network, else from full precision.
        drop_prob: probability of each quantized activation to stay full precision.
        inner_weight: factor of the summed losses of the inner layers' outputs (EDA-DM); 0 = output alone.
        half: multiply in bfloat16 while a block of float32 is optimised; targets, losses, roundings and what judges
            them do not. Blocks of other types multiply in their own.
    """

    annealing: Annealing
    batch_size: int = 32
    lr: float = 1e-3
    step_lr: float = 0.0
    power: float = 2.0
    input_prob: float = 1.0
    drop_prob: float = 0.0
    inner_weight: float = 0.0
    half: bool = False

    reads_reference = True
    """Whether the optimisation needs outputs of the full-precision network."""

    def iterations(self, block: Block) -> int:
        """Return the number of steps of one block."""
        return self.annealing.iterations

    def start(
        self, block: Block, network: nn.Module, reference: nn.Module, data: BlockData, seed: int
    ) -> BlockOptimisation:
        """Return the optimisation of one block."""
        return BlockOptimisation(block, network, reference, data, self, seed=seed)


@dataclass
class BlockData:
    """What one block is optimised or measured on: the same rows in both networks.

    Attributes:
        full: calls in the full-precision network, with output; None where nobody reads them.
        quantized: calls in the quantized network, without output.
        arena: room for more rows of the block; None = there is none.
    """

    full: Calls | None
    quantized: Calls
    arena: Arena | None = None

    def __len__(self) -> int:
        return len(self.quantized)


class BlockOptimisation:
    """The optimisation of one block; the network is changed by `apply` alone and valid at any time.

    Args:
        block: of both networks.
        network: quantized, calibrated, its weights frozen; predecessors of the block reconstructed.
        reference: the full-precision network.
        data: rows to optimise on.
        settings: of the optimisation.
        seed: all draws depend on (seed, name of the block).

    Raises:
        ConfigError: step sizes are to be learned, but a quantizer of the block has candidate widths.
    """

    def __init__(
        self, block: Block, network: nn.Module, reference: nn.Module, data: BlockData, settings: Settings, *, seed: int
    ) -> None:
        self.block, self.data, self.settings = block, data, settings
        self.module, self.reference = block.module(network), block.module(reference)
        self.layers = block.modules(network)
        first = next(self.module.parameters())
        # of float16, torch would mix the two types, which its norms refuse
        self.device, self.half = first.device, settings.half and first.dtype == torch.float32
        self.full = cast("Calls", data.full)  # see `Settings.reads_reference`
        self.output = cast("Tensor", self.full.output)
        full = [layer.weight for layer in block.modules(reference)]
        self.rounding = Rounding(full, [layer.weight_quantizer for layer in self.layers])
        self.quantizers = block.quantizers(network)
        self.steps = StepSizes(self.quantizers) if settings.step_lr else None
        groups = [{"params": [self.rounding.v], "lr": settings.lr}]
        if self.steps is not None and len(self.steps.factors):
            groups.append({"params": [self.steps.factors], "lr": settings.step_lr})
        self.optimizer = torch.optim.Adam(groups, fused=self.device.type in ("cpu", "cuda"))
        self.rows_generator = block_generator(seed, block.name, "rows", torch.device("cpu"))
        self.generator = block_generator(seed, block.name, "elements", self.device)
        self.t, self.weights, self.tied = 0, self.rounding.v.numel(), held_twice(self.module, self._tensors())
        self.inner = block.inner if settings.inner_weight else ()
        self.targets = InnerTargets(
            self.reference, self.inner, self.full, settings.batch_size, settings.annealing.iterations, data.arena
        )
        self.details: list[LayerRounding] = []
        self.before = [tensor.clone() for tensor in self._tensors()]
        self._losses: list[Tensor] = []

    @property
    def loss(self) -> float:
        """Mean of the reconstruction loss over the last tenth of the iterations so far."""
        last = self._losses[-max(1, self.settings.annealing.iterations // 10) :]
        return float(torch.stack(last).mean()) if last else math.nan

    def step(self) -> Tensor:
        """One iteration; returns the reconstruction loss of its batch, 0-d, detached."""
        settings = self.settings
        self.t += 1
        index = torch.randperm(len(self.data), generator=self.rows_generator)[: settings.batch_size]
        inputs = self._mixed(index)
        target = to_device(self.output[index], self.device)
        h = self.rounding.h()
        tensors = {self._name(layer): w for layer, w in zip(self.block.layers, self.rounding.soft(h), strict=True)}
        if self.steps is not None:
            tensors |= self.steps.scales()
        wanted = self.targets.rows(index)
        args, kwargs = self.full.arguments(inputs)
        with (
            dropping(self.quantizers, settings.drop_prob, self.generator),
            outputs_of(self.module, self.inner) as inner,
            self.full.ranges_of(self.module, index),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.half),
        ):
            output = functional_call(self.module, tensors, args, kwargs, tie_weights=self.tied)
        loss = reconstruction_loss(output_of(output, self.block.name), target, settings.power)
        for name, value in wanted.items():
            loss = loss + settings.inner_weight * reconstruction_loss(inner[name], value, settings.power)
        self._update(loss + settings.annealing.penalty(h, self.t))
        self._losses.append(loss.detach())
        return self._losses[-1]

    @torch.no_grad()
    def apply(self) -> None:
        """Give the network the weights rounded as learned, and the learned step sizes."""
        scales = [] if self.steps is None else self.steps.scales().values()
        for tensor, value in zip(self._tensors(), [*self.rounding.hard(), *scales], strict=True):
            tensor.copy_(value)

    @torch.no_grad()
    def revert(self) -> None:
        """Give the network what it had before."""
        for tensor, value in zip(self._tensors(), self.before, strict=True):
            tensor.copy_(value)

    def changed(self) -> float:
        """Share of the weights that now differ from what they were before."""
        differ = sum(int((layer.weight != old).sum()) for layer, old in zip(self.layers, self.before, strict=False))
        return differ / self.weights

    def _tensors(self) -> list[Tensor]:
        """Return what the optimisation chooses, in the network: weights, then step sizes."""
        scales = [] if self.steps is None else [quantizer.scale for quantizer in self.quantizers.values()]
        return [*(layer.weight for layer in self.layers), *scales]

    def _name(self, layer: str) -> str:
        return f"{layer}.weight" if layer else "weight"

    def _mixed(self, index: Tensor) -> list[Tensor]:
        """Mix the inputs of one batch: elements come from the quantized network with probability `input_prob`."""
        probability = self.settings.input_prob
        if probability == 1:
            return self.data.quantized.rows(index, self.device)
        full = self.full.rows(index, self.device)
        if probability == 0:
            return full
        quantized = self.data.quantized.rows(index, self.device)
        return [
            torch.lerp(f, q, random_mask(q, probability, self.generator)) if q.is_floating_point() else q
            for f, q in zip(full, quantized, strict=True)
        ]

    def _update(self, loss: Tensor) -> None:
        share = 0.5 * (1 + math.cos(math.pi * (self.t - 1) / self.settings.annealing.iterations))
        for group in self.optimizer.param_groups[1:]:
            group["lr"] = self.settings.step_lr * share
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


@torch.no_grad()
def block_error(module: nn.Module, calls: Calls, target: Tensor, name: str) -> BlockError:
    """Error of `module` on the inputs of `calls` against `target` [N, ...]."""
    device = next(module.parameters()).device
    squares, power = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(calls), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        args, kwargs = calls.arguments(calls.rows(rows, device))
        wanted = to_device(target[rows], device).double()
        with calls.ranges_of(module, rows):
            error = output_of(module(*args, **kwargs), name).double() - wanted
        squares += error.square().sum()
        power += wanted.square().sum()
    mse, mean_square = float(squares) / target.numel(), float(power) / target.numel()
    return BlockError(mse, math.sqrt(mse / mean_square) if mean_square else math.inf)

