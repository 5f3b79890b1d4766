"""The stages that measure quantization noise: bit schedule, correction, and what it achieves on other trajectories."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ptq_exp.correction import (
    BitSchedule,
    Merged,
    MomentChunks,
    NoiseStatistics,
    budget_rows,
    fit_moments,
    fixed_pattern_share,
    forward_snr,
    gains,
    mean_square_error,
    measured_steps,
    relative_error,
    snr_rows,
    step_correlation,
)
from ptq_exp.diffusion.noise import CALIBRATION, EVALUATION
from ptq_exp.errors import ConfigError, DataError
from ptq_exp.experiment.run import Setup, given_schedule
from ptq_exp.experiment.twin import AtRow, Twin
from ptq_exp.lightning import NoiseModule, PropagationModule, measure
from ptq_exp.settings.schema import RULES
from ptq_exp.storage.atomic import file_digest, write_npz
from ptq_exp.storage.npz import npz_arrays
from ptq_exp.storage.plain_json import to_plain

log = logging.getLogger("ptq_exp")


def schedule_bits(setup: Setup, twin: Twin) -> Twin:
    """Decide the activation width of each step, where `bits.schedule` asks for that."""
    bits, widths = setup.config.bits, setup.activation_widths
    if bits.schedule is None:
        return twin
    snr = None
    if bits.schedule in RULES:
        rows, snr = _rule_rows(setup, twin)
        activation = tuple(widths[row] for row in rows.tolist())
        schedule = BitSchedule(bits.weight, activation, tuple(setup.grid.timesteps.tolist()), bits.schedule)
    else:
        schedule = given_schedule(bits, setup.grid)
    shares = schedule.shares(widths)
    log.info(
        "bit schedule: %s", ", ".join(f"{s:.0%} of the steps at {b} bits" for b, s in zip(widths, shares, strict=True))
    )
    report = twin.report.mixed(shares) if len(widths) > 1 else twin.report
    return replace(twin, schedule=schedule, report=report, output_snr=snr)


def fit_correction(setup: Setup, twin: Twin) -> Twin:
    """Fit (or load) the statistics of the noise, where `correction` asks for any."""
    config = setup.config.correction
    if not config.active:
        return twin
    made_for = _made_for(setup, twin.schedule)
    if config.statistics is not None:
        statistics = _given_statistics(setup)
        _check_made_for(statistics, made_for, config.statistics)
    else:
        statistics = replace(_fit(setup, _noise_of(setup, twin)), made_for=made_for)
    log.info("correction %s: %s", config.name, statistics.summary())
    corrected = replace(twin, statistics=statistics)
    if (fit := corrected.variance_fit(setup)) is not None:
        log.info("%s", fit.summary())
    return corrected


def check_statistics(setup: Setup) -> None:
    """Read the file that `correction.statistics` names, if it does, before anything is computed.

    Raises:
        DataError: it cannot be read, or its numbers are no statistics.
        ConfigError: they belong to another model, sampler or quantization.
    """
    config, schedule = setup.config, None
    if setup.artifact is not None or not config.correction.active or config.correction.statistics is None:
        return
    found_here = config.bits.schedule in RULES  # known once it is decided, and compared then
    if config.bits.schedule is not None and not found_here:
        schedule = given_schedule(config.bits, setup.grid)
    statistics, wanted = _given_statistics(setup), _made_for(setup, schedule)
    _check_made_for(statistics, wanted, config.correction.statistics, ("schedule",) if found_here else ())
    found, expected = tuple(statistics.bias.shape), (len(setup.grid), setup.model.sample_shape[0])
    if found != expected:
        raise ConfigError(
            f"correction.statistics={config.correction.statistics} has {found[0]} steps and {found[1]} channels, but "
            f"the sampler takes {expected[0]} steps of {expected[1]} channels: correction.statistics=null fits them"
        )


def _given_statistics(setup: Setup) -> NoiseStatistics:
    try:
        return NoiseStatistics.load(setup.config.correction.statistics)
    except DataError as error:  # begins with the path
        raise DataError(f"correction.statistics={error}") from error


class EpsError(NamedTuple):
    """What is left on trajectories that no statistics were fitted on.

    Attributes:
        before, after: relative eps error of each step without and with the correction, [S].
        share_before, share_after: of a fixed pattern in these errors, [S]; see `fixed_pattern_share`.
        samples: trajectories that they were measured on.
        histogram: of the standardised residuals, [S, bins]; None without a correction.
        step_correlation: of residuals of consecutive steps, [S - 1]; None without a correction.
    """

    before: Tensor
    after: Tensor
    share_before: Tensor
    share_after: Tensor
    samples: int
    histogram: np.ndarray | None = None
    step_correlation: Tensor | None = None

    @property
    def corrected(self) -> bool:
        """Whether there is a correction, so that before and after differ."""
        return self.histogram is not None


def eps_error(setup: Setup, twin: Twin) -> EpsError:
    """Relative eps error of each step, before and after the correction, on the first full-precision trajectories."""
    evaluation, grid = setup.config.evaluation, setup.grid
    n, batch_size = evaluation.eps_error_samples, min(evaluation.eps_error_samples, evaluation.batch_size)
    module = NoiseModule(
        setup.model, setup.guided(setup.model.denoiser), [twin.guided(setup)], grid, seed=setup.config.seed,
        stream=EVALUATION, statistics=twin.statistics, summed=n,
    )  # fmt: skip
    spec = twin_spec(setup, twin) | {"stream": EVALUATION, "samples": [n, batch_size]}
    found = _measured(setup, "eps error", module, n, batch_size, spec)
    chunks = MomentChunks(found["moments"])
    sums = [torch.from_numpy(np.array(found[name])) for name in module.totals]
    both = (None, twin.statistics)
    errors = [relative_error(chunks, len(grid), statistics) for statistics in both]
    errors += [fixed_pattern_share(sums[0], n, chunks, len(grid), statistics, sums[-1]) for statistics in both]
    if twin.statistics is None:
        return EpsError(*errors, n)
    change = errors[1] / errors[0] - 1
    worst = int(change.argmax())
    log.log(
        logging.WARNING if float(change[worst]) > 0.01 else logging.INFO,
        "the correction changes the eps error of other trajectories by %+.1f %% on average, by %+.1f %% in step %d",
        100 * float(change.mean()), 100 * float(change[worst]), worst,
    )  # fmt: skip
    correlation = step_correlation(torch.from_numpy(np.array(found["products"])))
    if len(correlation):
        log.info(
            "residuals of consecutive steps correlate by %.2f to %.2f (variance correction takes them for independent)",
            float(correlation.min()), float(correlation.max()),
        )  # fmt: skip
    return EpsError(*errors, n, np.asarray(found["histogram"]).sum(0), correlation)


def twin_spec(setup: Setup, twin: Twin) -> dict[str, Any]:
    """All that decides what the twin answers: its network, widths and correction."""
    correction = asdict(setup.config.correction) if twin.statistics is not None else None
    if correction and correction["statistics"]:
        correction["statistics"] = file_digest(correction["statistics"])
    return setup.quantization_spec() | {
        "schedule": twin.schedule and list(twin.schedule.activation),
        "correction": correction,
    }


def _rule_rows(setup: Setup, twin: Twin) -> tuple[Tensor, dict[int, list[float]]]:
    """The row of each step by the rule `bits.schedule`, and the SNR of the estimates at each width."""
    grid, widths = setup.grid, setup.activation_widths
    same = grid.first_with_time
    noise = [Merged(chunks, same) for chunks in _noise_of_widths(setup, twin)]
    output_snr = torch.stack([relative_error(chunks, len(grid))[same] for chunks in noise], 1) ** -2
    shown = {width: output_snr[:, row].tolist() for row, width in enumerate(widths)}
    if setup.config.bits.schedule == "snr":
        return snr_rows(output_snr, forward_snr(grid)), shown
    errors = []
    for chunks in noise:
        statistics = _fit(setup, chunks) if setup.config.correction.active else None
        errors.append(mean_square_error(chunks, len(grid), statistics)[same])
    damage = _gains(setup, twin).view(-1, 1) * torch.stack(errors, 1)
    rows = budget_rows(damage, *_bit_operations(setup, twin), same)
    totals = ", ".join(f"{float(damage[:, row].sum()):.3g} at {width} bits" for row, width in enumerate(widths))
    chosen = float(damage.gather(1, rows.view(-1, 1)).sum())
    log.info("squared error of a typical final state, expected: %.3g (with one width in all steps: %s)", chosen, totals)
    return rows, shown


def _bit_operations(setup: Setup, twin: Twin) -> tuple[list[int], float]:
    """Cost of one evaluation at each width, and the budget of a whole trajectory; convolutions and linear layers.

    Raises:
        ConfigError: the budget is below the cost of the lowest width.
    """
    bits, widths = setup.config.bits, setup.activation_widths
    totals = [twin.report.at(row).totals for row in range(len(widths))]
    cost = [total["bops"]["conv_linear"] for total in totals]
    full = totals[0]["bops_fp32"]["conv_linear"]
    if full / bits.bops_ratio < min(cost):
        raise ConfigError(
            f"bits.bops_ratio={bits.bops_ratio}: at {widths[0]} bits in all steps the ratio is {full / min(cost):.1f}; "
            f"choose {full / max(cost):.1f} to {full / min(cost):.1f}, or add a lower width to bits.candidates={widths}"
        )
    return cost, len(setup.grid) * full / bits.bops_ratio


def _gains(setup: Setup, twin: Twin) -> Tensor:
    """Squared error of a typical final state per squared error of eps in each step, [S]."""
    bits, grid = setup.config.bits, setup.grid
    steps = measured_steps(len(grid), bits.gain_steps)
    denoiser = setup.guided(setup.model.denoiser)
    module = PropagationModule(
        setup.model, denoiser, setup.guided(AtRow(twin.network, 0)), grid, steps, seed=setup.config.seed
    )
    batch_size = min(bits.gain_samples, setup.config.correction.batch_size)
    spec = setup.quantization_spec() | {"steps": steps, "samples": [bits.gain_samples, batch_size]}
    found = _measured(setup, "propagation of errors", module, bits.gain_samples, batch_size, spec)
    cause, effect = (torch.from_numpy(np.array(found[name])) for name in module.names)
    return gains(cause, effect, steps, len(grid))


def _noise_of_widths(setup: Setup, twin: Twin) -> list[MomentChunks]:
    """Noise of the network at each of its widths, on the same full-precision trajectories."""
    rows = range(len(setup.activation_widths))
    networks = [setup.guided(AtRow(twin.network, row)) for row in rows]
    moments = _collect(setup, "noise of each width", networks, "fp32", setup.quantization_spec())
    return [MomentChunks(moments, torch.full((len(setup.grid),), row)) for row in rows]


def _noise_of(setup: Setup, twin: Twin) -> MomentChunks:
    """Noise of the network as it is sampled, at the width of each step."""
    follow, schedule = setup.config.correction.follow, twin.schedule
    if follow == "fp32" and twin.output_snr is not None:  # was measured to choose the widths
        moments = _noise_of_widths(setup, twin)[0].moments
        return MomentChunks(moments, schedule.rows(setup.activation_widths))
    spec = setup.quantization_spec() | {"schedule": schedule and list(schedule.activation)}
    return MomentChunks(_collect(setup, "noise statistics", [twin.guided(setup)], follow, spec))


def _collect(setup: Setup, title: str, networks: list, follow: str, spec: dict[str, Any]) -> np.ndarray:
    """Moments [n, W, S, C, M] of `networks` on calibration trajectories."""
    config = setup.config.correction
    module = NoiseModule(
        setup.model, setup.guided(setup.model.denoiser), networks, setup.grid, seed=setup.config.seed,
        stream=CALIBRATION, follow=follow,
    )  # fmt: skip
    batch_size = min(config.n_samples, config.batch_size)
    spec = spec | {"stream": CALIBRATION, "follow": follow, "samples": [config.n_samples, batch_size]}
    return _measured(setup, title, module, config.n_samples, batch_size, spec)["moments"]


def _fit(setup: Setup, chunks: Any) -> NoiseStatistics:
    config = setup.config.correction
    return fit_moments(
        chunks, len(setup.grid), int(np.prod(setup.model.sample_shape[1:])), config.convention,
        correlation=config.correlation, bias=config.bias, shrink=config.shrink and config.convention == "paper",
        repeats=setup.grid.first_with_time,
    )  # fmt: skip


def _measured(
    setup: Setup, title: str, module: NoiseModule | PropagationModule, n: int, batch_size: int, spec: dict[str, Any]
) -> dict[str, np.ndarray]:
    """What `module` finds on samples 0..n-1, memory-mapped; reused, or continued where a killed run stopped."""
    kind = "noise" if isinstance(module, NoiseModule) else "propagation"
    spec = spec | {"arrays": [*module.names, *module.totals]}
    folder = setup.working_folder(kind, spec)

    def make() -> dict[str, np.ndarray]:
        measure(module, setup.trainer(title), n, batch_size, folder, folder / "joined.npz")
        return npz_arrays(folder / "joined.npz")

    arrays, reused = setup.cache.get_or_make(
        kind, spec, make=make, save=lambda arrays, path: write_npz(path, **arrays), load=npz_arrays
    )
    shutil.rmtree(folder, ignore_errors=True)
    log.info("%s: %s, %d trajectories", title, "reused from the cache" if reused else "measured", n)
    return arrays


def _made_for(setup: Setup, schedule: BitSchedule | None) -> dict[str, Any]:
    """What noise statistics belong to: network, grid, widths, and the parts that they are fitted for."""
    correction = setup.config.correction
    parts = {name: getattr(correction, name) for name in ("correlation", "bias", "convention")}
    schedule = schedule and list(schedule.activation)
    return to_plain(setup.quantization_spec() | {"schedule": schedule, "correction": parts})


def _check_made_for(
    statistics: NoiseStatistics, wanted: dict[str, Any], path: str, unknown: tuple[str, ...] = ()
) -> None:
    """Raise ConfigError unless the statistics were made for the same model, bits, grid and calibration.

    `unknown` names what is not known yet.
    """
    found = statistics.made_for or {}
    for key in sorted((set(wanted) | set(found)) - set(unknown)):
        if found.get(key) != wanted.get(key):
            raise ConfigError(
                f"correction.statistics={path} was made for another {key}: {_short(found.get(key))}, this run has "
                f"{_short(wanted.get(key))}; set correction.statistics=null to fit them"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
