"""`Plan`: how the settings ask for a network to be quantized, on the time grid that it is sampled on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ptq_exp.calibration import Labelled, labelled, positions, time_bins
from ptq_exp.correction import BitSchedule, parse_widths
from ptq_exp.diffusion import TimeGrid
from ptq_exp.errors import ConfigError, naming
from ptq_exp.quantization import Policy, group_bits
from ptq_exp.settings.build import build
from ptq_exp.settings.schema import RULES, BitsConfig, CalibrationConfig, ExperimentConfig


@dataclass(frozen=True)
class Plan:
    """What is to be quantized, and to how many bits.

    Attributes:
        quantization, bits: the settings.
        metric: that the range search minimises.
        batch_size: calibration states per evaluation of the network.
        widths: that activations are calibrated for, ascending; one, unless they differ between steps, which may be a
            number format.
        time_bins: row of the activation ranges that each sampling step uses, int64 [S].
        groups: setting -> (glob, weight bits, activation bits) of groups of layers with widths of their own.
    """

    quantization: Policy
    bits: BitsConfig
    metric: str
    batch_size: int
    widths: list[int | str]
    time_bins: Tensor
    groups: Mapping[str, tuple[str, int | str, int | str]]

    @classmethod
    def of(cls, config: ExperimentConfig, grid: TimeGrid) -> Plan:
        """Make the plan of an experiment.

        Raises:
            ConfigError: the bit schedule or the bins do not fit the grid.
            DataError: the file of the schedule cannot be read.
        """
        quantization, bits = config.quantization, config.bits
        return cls(
            quantization, bits, config.metric.name, config.calibration.batch_size, activation_widths(bits, grid),
            time_bins(grid, quantization.temporal, quantization.temporal_bins), bit_groups(bits, config.model.groups),
        )

    @property
    def n_bins(self) -> int:
        """Number of bins of sampling steps; 1 = the same ranges in all steps."""
        return int(self.time_bins.max()) + 1


def drawn_positions(config: CalibrationConfig, n_steps: int, seed: int, each: int = 1) -> Tensor:
    """Draw the positions [n_samples, each] in a grid of `n_steps` at which states of the trajectories are taken."""
    distribution = build(config.distribution, "calibration.distribution")
    return positions(distribution, config.n_samples * each, n_steps, seed).view(-1, each)


def drawn_states(config: CalibrationConfig, grid: TimeGrid, seed: int) -> Labelled:
    """Draw the positions and times of states that are taken one from each trajectory."""
    return labelled(drawn_positions(config, len(grid), seed)[:, 0], grid, config.labels)


def activation_widths(bits: BitsConfig, grid: TimeGrid) -> list[int | str]:
    """List the widths that activations are calibrated for, ascending, or their number format."""
    if bits.schedule is None:
        return [bits.activation]
    if bits.schedule not in RULES:
        given_schedule(bits, grid)
    return sorted(set(bits.candidates or given_schedule(bits, grid).widths))


def bit_groups(bits: BitsConfig, named: Mapping[str, str]) -> dict[str, tuple[str, int | str, int | str]]:
    """Map setting -> (glob, weight bits, activation bits) for the groups of layers that have bits of their own.

    Globs on the command line come before the names that the model declares: they are narrower.

    Args:
        named: name -> glob of the groups that the model declares.
    """
    groups = bits.groups
    given = sorted((key for key in groups if groups[key] is not None), key=lambda key: key in named)
    settings = {key: f"bits.groups.{key}" for key in given}
    return {settings[key]: (named.get(key, key), *group_bits(settings[key], groups[key])) for key in given}


def given_schedule(bits: BitsConfig, grid: TimeGrid) -> BitSchedule:
    """Read the bit schedule that `bits.schedule` spells out or names the file of, for `grid`.

    Raises:
        ConfigError: it does not fit the grid, or its file has another weight width.
        DataError: no such file.
    """
    if isinstance(bits.schedule, str) and bits.schedule.endswith(".json"):
        with naming("bits.schedule="):  # the error begins with the path
            schedule = BitSchedule.load(bits.schedule)
        schedule.check(grid)
        if schedule.weight != bits.weight:
            raise ConfigError(
                f"{bits.schedule} is for {schedule.weight}-bit weights: set bits.weight={schedule.weight}"
            )
        return schedule
    return BitSchedule(bits.weight, tuple(parse_widths(bits.schedule)), tuple(grid.timesteps.tolist()))
