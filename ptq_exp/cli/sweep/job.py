"""One job of the command: a single run, or one of a sweep, which must neither stop the others nor be done twice."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ptq_exp.cli.start import loaded
from ptq_exp.cli.sweep.processes import check_devices, only_process
from ptq_exp.cli.sweep.record import SweepRecord, plain_key
from ptq_exp.errors import ConfigError, DataError, InfeasibleError, PTQError
from ptq_exp.evaluation.gate import gate_line, judged
from ptq_exp.reports.tables.identity import decides_numbers
from ptq_exp.reports.tables.runs import completed
from ptq_exp.settings.compose import validated
from ptq_exp.settings.composition import check_composition
from ptq_exp.settings.schema import ExperimentConfig, SweepConfig
from ptq_exp.storage.plain_json import flatten, read_json, to_plain, write_json

log = logging.getLogger("ptq_exp")
RESULTS = "results.json"
_TAG_LENGTH = 64  # W&B refuses longer ones

Objectives = float | tuple[float, ...] | None


@dataclass(frozen=True)
class Job:
    """What Hydra says of the running job; `record` is that of its sweep, None for a single run."""

    folder: Path
    overrides: list[str]
    record: SweepRecord | None
    sweep_folder: Path
    n_objectives: int

    @classmethod
    def current(cls) -> Job:
        """Return the job that Hydra runs now."""
        hydra = HydraConfig.get()
        sweep_folder = Path(hydra.sweep.dir)
        record = SweepRecord.load(sweep_folder) if hydra.mode == RunMode.MULTIRUN else None
        direction = OmegaConf.select(hydra, "sweeper.direction")
        n = len(direction) if OmegaConf.is_list(direction) else 1
        return cls(Path(hydra.runtime.output_dir), list(hydra.overrides.task), record, sweep_folder, n)

    @property
    def tags(self) -> list[str]:
        """`bits=w8a8` for each swept setting."""
        tags = [override.lstrip("+") for override in self.overrides if plain_key(override) in self.record.swept]
        return [tag[:_TAG_LENGTH] for tag in tags]


def run_job(composed: DictConfig) -> tuple[Objectives, str]:
    """Run one composed experiment.

    In a sweep an error goes to the job's results.json and to standard error, and its objective is None. A job of a
    sweep that is resumed is left alone if it is done already.

    Returns:
        What a sweeper minimises, FID (else eps error), or that and the BOPs; and the line that says which scores of a
        single run miss evaluation.gate, "" where none does. The end of a sweep says it of its jobs.

    Raises:
        PTQError: in a single run, something the user can mend.
    """
    job = Job.current()
    if job.record is None:
        values = _run(composed, job)
        return _objectives(values, job.n_objectives), gate_line(values.get("gate", {}))
    try:
        values = _run(composed, job)
    except Exception as error:  # whatever it is, the other jobs go on
        _tell(error, job)
        return None, ""
    return _objectives(values, job.n_objectives), ""


def _run(composed: DictConfig, job: Job) -> dict[str, Any]:
    sweep = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepConfig()), composed.get("sweep") or {}))
    done = job.folder / RESULTS
    if sweep.resume is None:
        done.unlink(missing_ok=True)  # of an earlier run into the same folder
    only_process()
    check_composition(job.overrides)
    config = validated(composed, job.overrides)
    check_devices(config.trainer)
    if job.record is None:
        return _experiment(config, job, None)
    logger = replace(
        config.logger, group=config.logger.group or job.sweep_folder.resolve().name,
        tags=[*config.logger.tags, *job.tags],
    )
    config = replace(config, logger=logger)
    if sweep.resume is not None and (values := _done(done, config)) is not None:
        if values["status"] == "infeasible":
            raise InfeasibleError(values["error"])
        log.info("%s: finished already", job.folder)
        return _judged_again(done, values, config)
    return _experiment(config, job, job.record.started)


def _experiment(config: ExperimentConfig, job: Job, fresh_since: float | None) -> dict[str, Any]:
    # a misspelt setting is reported before all that is loaded
    from ptq_exp.experiment.experiment import forecast_experiment, run_experiment

    loaded()

    if config.forecast:
        if job.record is not None:
            raise ConfigError("forecast=true: a single run is forecast, not the jobs of a sweep; leave out -m")
        forecast = forecast_experiment(config, job.folder)
        print("no forecast, see above" if forecast is None else forecast.table())
        _remove_unused(job.folder)
        return {"metrics": {}}
    return run_experiment(config, job.folder, fresh_since)


def _remove_unused(folder: Path) -> None:
    """Remove a run folder in which lies nothing but what Hydra put there before the run."""
    if {path for path in folder.iterdir() if path.name != ".hydra"} <= set(folder.glob("*.log")):
        shutil.rmtree(folder, ignore_errors=True)


def _done(path: Path, config: ExperimentConfig) -> dict[str, Any] | None:
    """Return the results of a job that ended well, or proved infeasible, with these settings; None: run it."""
    try:
        values = read_json(path)
    except DataError:
        return None
    if values.get("status") not in ("finished", "infeasible"):
        return None
    found, wanted = (_deciding(settings) for settings in (values["config"], to_plain(asdict(config))))
    for key in sorted(set(found) | set(wanted)):
        if found.get(key) != wanted.get(key):
            log.warning(
                "%s was made with %s=%s, now it is %s: running it again", path, key, found.get(key), wanted.get(key)
            )
            return None
    return values


def _judged_again(path: Path, values: dict[str, Any], config: ExperimentConfig) -> dict[str, Any]:
    """Return the results of a finished job with the verdict of the gate that is set now, on disk, too."""
    gate = config.evaluation.gate or {}
    if gate != values.get("gate", {}).get("bounds", {}):
        values = {key: value for key, value in values.items() if key != "gate"}
        values |= {"gate": judged(values["metrics"], gate)} if gate else {}
        write_json(path, values)
    return values


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the numbers, flat, the seed included; newer ones have the value of before."""
    columns = completed(flatten(settings, "config."))
    flat = {key.removeprefix("config."): value for key, value in columns.items()}
    return {key: value for key, value in flat.items() if decides_numbers(key)}


def _tell(error: Exception, job: Job) -> None:
    """Leave the error in results.json, if the run itself has not done so, and on standard error."""
    if isinstance(error, InfeasibleError):
        log.info("%s: infeasible: %s", job.folder.name, error)
        return
    path = job.folder / RESULTS
    try:
        values = read_json(path)
    except DataError:
        values = {"stage": "start", "name": HydraConfig.get().job.name}
    if values.get("status") != "failed":
        values |= {"status": "failed", "error": str(error) or type(error).__name__, "error_type": type(error).__name__}
    write_json(path, values | {"overrides": job.overrides})
    if not isinstance(error, PTQError):
        log.error("%s", job.folder.name, exc_info=error)
    print(f"error: {job.folder.name}: {error}", file=sys.stderr)


def _objectives(values: dict[str, Any], n: int) -> Objectives:
    metrics = values["metrics"]
    error = metrics.get("fid", metrics.get("eps_error"))
    if n == 1:
        return error
    return error, values["quantization"]["bops"]["conv_linear"]
