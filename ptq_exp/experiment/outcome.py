"""What is made of a finished run's results to look at: picture, model card, report, W&B; none can fail the run."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ptq_exp.deploy.artifact import SUBFOLDER
from ptq_exp.deploy.card import write_card
from ptq_exp.deploy.measure import Trajectory
from ptq_exp.experiment.execution import line
from ptq_exp.quantization import Report
from ptq_exp.reports.grid import save_grid
from ptq_exp.reports.html import write_run_report
from ptq_exp.reports.summary import summary
from ptq_exp.results import wandb as wandb_run
from ptq_exp.results.sinks import spoils_nothing
from ptq_exp.results.tracked import Tracked, tracked
from ptq_exp.settings.schema import ExperimentConfig

log = logging.getLogger("ptq_exp")


@dataclass(frozen=True)
class Outcome:
    """What a run made.

    Attributes:
        images, fp_images: uint8 NHWC, drawn from the same noise.
        metrics: scores of the images.
        report: of the quantized network's layers; None in full precision.
        saved: description of the saved model; None = none was saved.
        watched: what drew the images, where an engine is to be compared with it.
    """

    images: np.ndarray
    fp_images: np.ndarray
    metrics: dict[str, float]
    report: Report | None = None
    saved: Mapping[str, Any] | None = None
    watched: Trajectory | None = None


def look_at(
    outcome: Outcome, values: dict[str, Any], config: ExperimentConfig, folder: Path, pictures: list[str],
    wandb_sink: Tracked,
) -> None:
    """Leave picture, model card and report in the run folder, and what W&B records; troubles are warnings.

    Args:
        values: the content of results.json.
        pictures: names of the pictures in the folder, for W&B.
    """
    with spoils_nothing("grid.png", "the images are in samples.npz"):
        _picture(config, folder, outcome.fp_images, outcome.images)
    if outcome.saved is not None:
        with spoils_nothing(f"{SUBFOLDER}/README.md", "the saved model is whole, results.json says how it was made"):
            write_card(folder / SUBFOLDER, outcome.saved, values, values["command"])
    with spoils_nothing("report.html", f"python -m ptq_exp report {shlex.quote(str(folder))} makes it"):
        write_run_report(folder)
    with spoils_nothing("the W&B run", "results.json and the other files of the run hold all of it"):
        wandb_sink.record(_for_wandb(folder, values, outcome.report, pictures))


def say(outcome: Outcome, values: dict[str, Any], folder: Path) -> None:
    """Log the table of a finished run, and where it is."""
    with spoils_nothing("the table above", "results.json has its numbers"):
        log.info("\n%s", summary(values, outcome.report and outcome.report.summary()))
    if "runtime" in values:
        with spoils_nothing("the line on the engine", "results.json has its numbers"):
            log.info("%s", line(values["runtime"]))
    with spoils_nothing("the list of files", f"they are in {folder}"):
        log.info("\n%s in %s", ", ".join(_left_in(folder)), folder)


def tracked_run(config: ExperimentConfig, folder: Path) -> AbstractContextManager[Tracked]:
    """Open the W&B run of the experiment."""
    settings = config.logger
    tags = [config.model.name, config.calibration.name, config.metric.name, config.bits.name, *settings.tags]
    return tracked(
        settings.mode, folder, project=settings.project, entity=settings.entity, name=f"{config.name}-s{config.seed}",
        group=settings.group or config.name, tags=list(dict.fromkeys(tags)), config=asdict(config),
    )


def quantization_entry(report: Report) -> dict[str, Any]:
    """Coverage, size and bit operations for results.json."""
    totals = report.totals
    not_counted = {"not_counted": list(report.not_counted)} if report.not_counted else {}
    return totals | not_counted | {
        "coverage_conv_linear": totals["coverage"]["conv_linear"],
        "bops_ratio": totals["bops_reduction"]["conv_linear"],
        "bops_ratio_everything": totals["bops_reduction"]["everything"],
    }


def _picture(config: ExperimentConfig, folder: Path, fp_images: np.ndarray, images: np.ndarray) -> None:
    n = min(config.evaluation.grid_images, len(images))
    save_grid(folder / "grid.png", fp_images[:n], images[:n], labels=("FP32", config.bits.name.upper()))


def _for_wandb(
    folder: Path, values: dict, report: Report | None, pictures: list[str]
) -> dict[str, Callable[[Any], object]]:
    """Return what W&B records of a run: each item with the function that gives it to the logger."""

    def errors_per_step(logger: Any) -> None:
        for step, error in enumerate(values.get("eps_error_per_step", [])):
            row = {"eps_error_of_step": error, "sampling_step": step}
            for name in ("eps_error_uncorrected", "fixed_pattern_share", "fixed_pattern_share_uncorrected"):
                if per_step := values.get(f"{name}_per_step"):
                    row[f"{name}_of_step"] = per_step[step]
            logger.log_metrics(row)

    numbers = dict(values["metrics"]) | {"calibration/evaluations": values.get("evaluations", 0)}
    numbers |= {f"fp32/{key}": value for key, value in values["fp32"].items()}
    if report is not None:
        entry = quantization_entry(report)
        numbers |= {key: entry[key] for key in ("coverage_conv_linear", "bops_ratio", "bops_ratio_everything")}
    # a table can be made from the W&B run alone
    sections = ("metric_spec", "quantization", "real", "weights", "runtime", "intervals")
    summed = {key: values[key] for key in sections if key in values}
    items = {
        "the errors per step": errors_per_step,
        "the scores": lambda logger: logger.log_metrics(numbers),
        "the summary": lambda logger: wandb_run.log_summary(logger, summed),
        "grid.png": lambda logger: wandb_run.log_image(
            logger, "grid", folder / "grid.png", caption="full precision over quantized, same seeds"),
    }
    if report is not None:
        items["the table of layers"] = lambda logger: wandb_run.log_table(logger, "layers", report.table())
    for name in pictures:
        # a name of its own: a metric is called eps_error, too
        picture = f"pictures/{Path(name).stem}"
        items[name] = partial(wandb_run.log_image, key=picture, path=folder / name)
    return items


def _left_in(folder: Path) -> list[str]:
    """Return the files of a finished run, the ones that people look for first."""
    names = [path.name for path in folder.iterdir() if path.suffix in (".json", ".npz", ".png", ".html")]
    return sorted(names, key=lambda name: (name != "results.json", name))
