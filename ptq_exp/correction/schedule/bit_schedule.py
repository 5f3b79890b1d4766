"""`BitSchedule`: one weight width, and a width of the activations for each sampling step."""

from __future__ import annotations

import ast
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq_exp.diffusion import TimeGrid
from ptq_exp.errors import ConfigError, DataError, QuantizationError, one_line
from ptq_exp.quantization import step_of
from ptq_exp.quantization.widths import check_bits
from ptq_exp.storage.atomic import atomic_path


@dataclass(frozen=True)
class BitSchedule:
    """Widths along a time grid.

    Attributes:
        weight: bits of the weights, the same in all steps.
        activation: bits of the activations in each of the S steps, noisiest first.
        timesteps: network time of each step; what the schedule was made for.
        rule: how it was found: "snr", "budget" or "list".

    Raises:
        ConfigError: a width is impossible, the two lists differ in length, or positions of one network time have
            different widths (they share one network, which sees the time alone).
    """

    weight: int
    activation: tuple[int, ...]
    timesteps: tuple[float, ...]
    rule: str = "list"

    def __post_init__(self) -> None:
        check_bits("bits.weight", self.weight)
        for bits in self.activation:
            check_bits("bits.schedule", bits)
        if len(self.activation) != len(self.timesteps):
            raise ConfigError(
                f"bits.schedule has {len(self.activation)} widths, but the sampler takes {len(self.timesteps)} steps"
            )
        width_at: dict[float, int] = {}
        for step, (time, bits) in enumerate(zip(self.timesteps, self.activation, strict=True)):
            if width_at.setdefault(time, bits) != bits:
                raise ConfigError(
                    f"bits.schedule: step {step} has {bits} bits, an earlier one of the same network time {time:g} has "
                    f"{width_at[time]}: give both the same"
                )

    def __len__(self) -> int:
        return len(self.activation)

    @property
    def widths(self) -> tuple[int, ...]:
        """The different activation widths in use, ascending."""
        return tuple(sorted(set(self.activation)))

    def rows(self, candidates: Sequence[int]) -> Tensor:
        """For each step the position of its width among `candidates`, int64 [S].

        Raises:
            ConfigError: a width is not among them.
        """
        missing = [bits for bits in self.widths if bits not in candidates]
        if missing:
            raise ConfigError(f"bits.schedule uses {missing[0]} bits, but only {list(candidates)} are calibrated")
        return torch.tensor([list(candidates).index(bits) for bits in self.activation])

    def shares(self, candidates: Sequence[int]) -> list[float]:
        """Return the share of network evaluations that run at each of the `candidates`."""
        return [self.activation.count(bits) / len(self) for bits in candidates]

    def check(self, grid: TimeGrid) -> None:
        """Raise ConfigError unless the schedule belongs to `grid`."""
        times = grid.timesteps.tolist()
        if len(times) != len(self) or any(abs(a - b) > 1e-3 for a, b in zip(times, self.timesteps, strict=False)):
            raise ConfigError(
                f"bits.schedule was made for {len(self)} steps at the network times {self.timesteps[0]:g} to "
                f"{self.timesteps[-1]:g}, but the sampler takes {len(times)} from {times[0]:g} to {times[-1]:g}: "
                "change sampler.steps and sampler.spacing, or make another schedule"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write `bit_schedule.json`, atomically; `activation` may be edited by hand."""
        content = {
            "weight": self.weight, "rule": self.rule, "activation": list(self.activation),
            "timesteps": list(self.timesteps),
        }
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        with atomic_path(path) as temporary:
            temporary.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> BitSchedule:
        """Read what `save` wrote; `activation` may also be an expression such as "[8]*12 + [4]*8".

        Raises:
            DataError: the file is missing, or is no bit schedule.
            ConfigError: its widths are impossible.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            activation, times = content["activation"], [float(time) for time in content["timesteps"]]
            weight, rule = content["weight"], str(content.get("rule", "list"))
            if type(weight) is not int or not times or not all(math.isfinite(time) for time in times):
                raise ValueError(f"weight={weight!r}, timesteps={times}"[:100])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = one_line(repr(error))
            raise DataError(f"{path} is no bit schedule (bit_schedule.json of a run): {reason}") from error
        try:
            return cls(weight, tuple(parse_widths(activation)), tuple(times), rule)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def parse_widths(text: str | Sequence[int]) -> list[int]:
    """Widths per step from a list, or from an expression of lists such as "[8]*100 + [4]*150".

    Raises:
        ConfigError: anything but integers, lists, + and *.
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body) if isinstance(text, str) else list(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list) or not value or any(type(bits) is not int for bits in value):
        raise ConfigError(f"bits.schedule={text}: give a list of one width per step, such as [8]*100+[4]*150")
    return value


_MOST_STEPS = 100_000


def _value(node: ast.AST) -> list | int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) != isinstance(right, list):
            items, times = (left, right) if isinstance(left, list) else (right, left)
            if len(items) * times <= _MOST_STEPS:
                return items * times
    raise ValueError("not an expression of lists")


class Scheduled(nn.Module):
    """A quantized denoiser that runs each step with its own row of the activation ranges, again a denoiser.

    Args:
        denoiser: quantized with candidate activation widths, or bins of steps; see `ptq_exp.quantization.Step`.
        rows: row of each step, int64 [S]; see `BitSchedule.rows` and `ptq_exp.calibration.time_bins`.
        grid: the one that is sampled with.

    Raises:
        QuantizationError: the denoiser has a single row.
    """

    def __init__(self, denoiser: nn.Module, rows: Tensor, grid: TimeGrid) -> None:
        super().__init__()
        self.denoiser, self.grid = denoiser, grid
        self.switch = step_of(denoiser)
        if self.switch is None:
            raise QuantizationError(
                "the denoiser has one activation width in all steps: quantize it with candidate widths for a schedule, "
                "or with bins of steps"
            )
        self.register_buffer("rows", rows, persistent=False)

    def compile(self, *args, **kwargs) -> None:
        """Compile the network alone: finding the step of a time looks at values, which would break its graph."""
        self.denoiser.compile(*args, **kwargs)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """eps [N, C, H, W]; the whole batch must be at one step.

        Raises:
            ConfigError: a time that is not on the grid, or different times in one batch.
        """
        step = self.grid.step_of(t)
        if bool((step != step[0]).any()):
            raise ConfigError(
                "a batch with several sampling steps cannot run at their widths or ranges: give one step a batch"
            )
        self.switch.set(self.rows.index_select(0, step[:1]))
        return self.denoiser(x, t, **conditions)
