"""Whether 8-bit sums are right on this processor: without VNNI instructions two products are added in 16 bits first."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ptq_exp.errors import ConfigError
from ptq_exp.runtime.grouped import GroupedLinear, GroupedWeight
from ptq_exp.runtime.integers import Grid, IntegerWeight
from ptq_exp.runtime.plan import FLOAT, LayerPlan, Plan

CHANNELS = 64
_LARGEST = {"as_saved": 127, "7bit": 63}


class Probe(nn.Module):
    """One convolution of inputs at their largest level, 255, by weights at theirs."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        from ptq_exp.runtime.plain_layers import IntegerLayer, Row

        self.convolution = nn.utils.skip_init(nn.Conv2d, CHANNELS, CHANNELS, 3, padding=1, bias=False)
        nn.init.zeros_(self.convolution.weight)  # the same in every process: compiled probes are found again
        levels = torch.full(self.convolution.weight.shape, largest, dtype=torch.int8)
        weight = IntegerWeight(levels, torch.ones(CHANNELS), torch.zeros(CHANNELS, dtype=torch.int32))
        grid = Grid(torch.ones(1), torch.zeros(1), torch.full((1,), 255.0))
        self.plan = LayerPlan("probe", "Conv2d", "int8", weights=(weight,), inputs=(grid,))
        self.layer = IntegerLayer(self.convolution, self.plan, Row())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def saturation(compile_network, weights: str = "as_saved") -> float:
    """Measure what an engine's 8-bit sum is of the right one, 1 where it is exact.

    Args:
        compile_network: (nn.Module) -> callable of the same arguments, the engine.
        weights: "as_saved" probes with weights of 127, "7bit" with 63.
    """
    x = torch.full((1, CHANNELS, 8, 8), 255.0)
    probe = Probe(_LARGEST[weights]).eval()
    with torch.no_grad():
        return float(compile_network(probe)(x)[..., 4, 4].double().mean() / probe(x)[..., 4, 4].double().mean())


def check_sums(compile_network, weights: str = "as_saved", engine: str = "openvino") -> float:
    """As `saturation`, which it returns.

    Raises:
        ConfigError: the sums are wrong; it says what to set.
    """
    ratio = saturation(compile_network, weights)
    if abs(ratio - 1) > 1e-3:
        raise ConfigError(
            f"runtime={engine}: 8-bit sums saturate on this processor (it has no VNNI instructions): a sum came out as "
            f"{ratio:.2f} of the right one; choose runtime.weights=7bit, or runtime=simulate"
        )
    return ratio


def quantizes_inputs(compile_network, size: int) -> bool:
    """Whether an engine multiplies 4-bit weights in groups of `size` by inputs that it has quantized to 8 bits.

    Its answer then differs from float arithmetic by their rounding; otherwise by that of float32.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (CHANNELS, 4, size)
    levels = torch.randint(16, shape, generator=generator, dtype=torch.uint8)
    weight = GroupedWeight(levels, torch.full((*shape[:2], 1), 8, dtype=torch.uint8), torch.ones(*shape[:2], 1))
    layer = GroupedLinear(nn.utils.skip_init(nn.Linear, 4 * size, CHANNELS, bias=False), weight, nn.Identity())
    x = torch.randn(1, CHANNELS, 4 * size, generator=generator)
    with torch.no_grad():
        wanted = layer(x)
        return float((compile_network(layer.eval())(x) - wanted).norm() / wanted.norm()) > 1e-4


def probed_groups(plan: Plan, compile_network) -> Plan:
    """Return the plan with its grouped layers in float where the engine does not quantize their inputs."""
    sizes = {entry.grouped.size for entry in plan.values() if entry.grouped is not None}
    if not sizes or quantizes_inputs(compile_network, min(sizes)):
        return plan
    reason = "4-bit groups; on this processor the engine leaves the input in float"
    return {
        name: entry if entry.grouped is None else replace(entry, executed=FLOAT, reason=reason)
        for name, entry in plan.items()
    }
