"""Recording spoils no finished run: whatever fails after the results is a warning that says how to get it."""

import logging
import os
import signal
import time

import pandas as pd
import pytest
import wandb
from wandb_log import read_log

from ptq_exp.errors import ConfigError, Interrupted, PTQError
from ptq_exp.experiment import outcome
from ptq_exp.reports import figures
from ptq_exp.results import tracked as tracked_module
from ptq_exp.results import wandb as wandb_run
from ptq_exp.results.tracked import Tracked, tracked
from ptq_exp.results.wandb import of_one_type
from ptq_exp.storage.plain_json import read_json

QUICK = ("evaluation=paired", "evaluation.n_samples=2", "evaluation.batch_size=2", "metric=minmax")


def broken(*arguments, **named):
    raise RuntimeError("no luck\nat all")


@pytest.fixture
def warned(caplog):
    """The warnings so far, as text."""
    return lambda: [record.getMessage() for record in caplog.records
                    if record.levelno >= logging.WARNING and record.name.startswith("ptq_exp")]


def logged(folder):
    """The log of a W&B run; its process writes the end a moment after it has said so."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(100):
        if (run := read_log(path))["exit_code"] is not None:
            break
        time.sleep(0.1)
    return run


def said(folder):
    """The lines of the log of a run."""
    (path,) = folder.glob("*.log")
    return path.read_text().splitlines()


@pytest.mark.usefixtures("small_networks")
def test_a_run_is_finished_whatever_fails_after_its_results(command, monkeypatch):
    for place, name in [(outcome, "_picture"), (outcome, "write_card"), (outcome, "write_run_report"),
                        (outcome, "summary"), (outcome, "_left_in"), (figures, "noise"),
                        (wandb_run, "log_table"), (wandb_run, "finish")]:
        monkeypatch.setattr(place, name, broken)
    folder = command("+experiment=ptqd_w4a8", *QUICK)
    assert read_json(folder / "results.json")["status"] == "finished"
    lines = [line.partition("] - ")[2] or line for line in said(folder)]
    for what in ("grid.png", "noise.png", "quantized/README.md", "report.html"):
        assert len([line for line in lines if f"{what} was not made (RuntimeError: no luck at all); " in line]) == 1
    assert any(f"python -m ptq_exp report {folder} makes it" in line for line in lines)
    (lost,) = [line for line in lines if "W&B lacks" in line]
    assert "W&B lacks grid.png, the table of layers, the end of the run (FileNotFoundError" in lost
    assert wandb.run is None and (folder / "eps_error.png").exists()


@pytest.mark.usefixtures("small_networks")
def test_a_model_of_several_widths_is_recorded_and_so_is_its_evaluation(command):
    first = command("+experiment=ptqd_mp", *QUICK, "bits=step_list", "bits.schedule=[8,8,4]")
    second = command("+experiment=evaluate", f"quantized={first}", *QUICK[:3])
    for folder in (first, second):
        assert read_json(folder / "results.json")["status"] == "finished"
        assert logged(folder)["exit_code"] == 0
        assert list(folder.glob("wandb/offline-run-*/files/media/table/layers*.json"))
        assert not [line for line in said(folder) if "W&B lacks" in line]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hanging_process_of_wandb_is_a_warning_and_the_next_run_is_whole(tmp_path, how, monkeypatch, warned):
    monkeypatch.setitem(tracked_module.PATIENCE, "offline", 2.0)
    with tracked("offline", tmp_path / "one") as run:
        os.kill(wandb.setup()._connection._proc._process.pid, how)
        run.record({"a number": lambda logger: logger.log_metrics({"x": 1.0})})
    (line,) = warned()
    assert line.startswith("W&B lacks ") and "the end of the run (" in line and "results.json" in line
    monkeypatch.setitem(tracked_module.PATIENCE, "offline", 30.0)
    with tracked("offline", tmp_path / "two") as run:
        run.record({"a number": lambda logger: logger.log_metrics({"x": 1.0})})
    assert logged(tmp_path / "two")["summary"]["x"] == 1.0 and len(warned()) == 1


def test_one_item_that_fails_or_hangs_keeps_no_other_from_being_recorded():
    seen, run = [], Tracked("logger", "offline")
    run.record({"a": seen.append, "b": broken, "c": seen.append})
    assert seen == ["logger", "logger"] and run.lost == ["b"]
    run.patience = 0.05
    run.record({"d": seen.append, "e": lambda logger: time.sleep(1), "f": seen.append})
    assert len(seen) == 3 and run.lost == ["b", "e", "f"] and isinstance(run.why, RuntimeError)


def test_what_cannot_start_is_a_warning_offline_and_an_error_online(tmp_path, monkeypatch, warned):
    (tmp_path / "wandb").write_text("no folder")
    with tracked("offline", tmp_path) as run:
        assert run.logger is None
    (line,) = warned()
    assert line.startswith(f"no W&B run: cannot write {tmp_path / 'wandb'}") and "logger.mode=none" in line
    monkeypatch.setattr(wandb, "init", broken)
    with tracked("offline", tmp_path / "a") as run:
        assert run.logger is None
    assert "W&B cannot start (RuntimeError: no luck at all); logger.mode=none" in warned()[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(PTQError, match=r"does not answer \(RuntimeError: no luck at all\).*logger.mode=offline"):
        with tracked("online", tmp_path / "b"):
            pass


def test_a_setting_that_wandb_refuses_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise wandb.errors.UsageError("no such project")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"refuses a setting of logger \(no such project\); logger.mode=none"):
        with tracked("offline", tmp_path):
            pass


def test_the_exit_code_of_the_wandb_run_says_how_it_ended(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(wandb_run, "make_logger", lambda *arguments, **named: "logger")
    monkeypatch.setattr(wandb_run, "finish", lambda logger, code: codes.append(code))
    for error in (None, ValueError(), Interrupted(signal.SIGTERM)):
        try:
            with tracked("offline", tmp_path):
                if error is not None:
                    raise error
        except (ValueError, Interrupted):
            pass
    assert codes == [0, 1, 143]


def test_columns_of_a_wandb_table_are_of_one_type():
    frame = pd.DataFrame({
        "bits": [8, (8, 4), None], "lists": [[1], [2, 3], None], "mixed": [1, "a", True], "numbers": [1, 2.5, None],
        "inf": [float("inf"), 1.0, float("nan")], "text": ["a", None, ""], "bool": [True, None, False],
        "none": [None] * 3,
    })
    found = {name: column.tolist() for name, column in of_one_type(frame).items()}
    assert found == {
        "bits": ["8", "8/4", None], "lists": ["1", "2/3", None], "mixed": ["1", "a", "True"],
        "numbers": [1, 2.5, None], "inf": [float("inf"), 1.0, None], "text": ["a", None, ""],
        "bool": [True, None, False], "none": [None] * 3,
    }
    wandb.Table(dataframe=of_one_type(frame))
