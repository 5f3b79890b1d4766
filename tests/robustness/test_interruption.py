"""Ctrl-C and SIGTERM at any stage: one line that says how to go on, status 130 or 143, and a resume that works."""

import os
import signal
import subprocess
import sys
import time

import pytest
from small_networks import use_blank_pictures, use_one_composition, use_small_networks

from ptq_exp.cli.coordinate_search import Search
from ptq_exp.cli.main import main
from ptq_exp.cli.search_space import Space, Stage
from ptq_exp.errors import Interrupted, command_line, interruptible, interruption
from ptq_exp.experiment import experiment, images, stages
from ptq_exp.experiment.pairs import PairScorer
from ptq_exp.lightning import EvaluationModule
from ptq_exp.results.record import Results
from ptq_exp.storage.plain_json import read_json

SMALL = [
    "sampler.steps=2", "evaluation=paired", "evaluation.n_samples=6", "evaluation.batch_size=2", "metric=minmax",
    "evaluation.eps_error_samples=2", "evaluation.grid_images=2", "evaluation.fid_resamples=2",
    "calibration.n_samples=4", "logger=none",
    "calibration.batch_size=4", "trainer.progress_bar=false", "trainer.accelerator=cpu", "save_quantized=false",
]


@pytest.fixture(autouse=True)
def interactive():
    """As from a terminal: a shell that starts the tests in the background would have SIGINT ignored, here and below."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(monkeypatch, capsys, cache):
    """Run the command in small, on a small network; returns its exit status and what it says on standard error."""
    for use in (use_small_networks, use_blank_pictures, use_one_composition):
        use(monkeypatch)

    def run(*arguments):
        flags = [argument for argument in arguments if argument.startswith("-")]
        others = [argument for argument in arguments if not argument.startswith("-")]
        monkeypatch.setattr(sys, "argv", ["ptq_exp", *flags, *SMALL, f"cache_dir={cache}", *others])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err

    return run


def sent(number):
    """A function that sends the signal to this process, in place of a stage."""

    def send(*arguments, **named):
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("the signal was ignored")

    return send


PLACES = [(images, "draw_images"), (stages, "calibrate"), (experiment, "eps_error"),
          (PairScorer, "__call__"), (EvaluationModule, "predict_step")]


@pytest.mark.parametrize(
    ("place", "name", "number"), [(*place, signal.SIGINT) for place in PLACES] + [(*PLACES[-1], signal.SIGTERM)],
    ids=lambda value: getattr(value, "name", value) if not isinstance(value, type) else None,
)
def test_at_any_stage(command, monkeypatch, tmp_path, place, name, number):
    monkeypatch.setattr(place, name, sent(number))
    # nothing of the cache may stand in for the stage
    status, said = command("+experiment=ndtc_w8a8", f"hydra.run.dir={tmp_path / 'run'}", "cache=off")
    assert status == 128 + number
    assert "interrupted: the same command goes on where it stopped" in said and "Traceback" not in said
    values = read_json(tmp_path / "run" / "results.json")
    assert values["status"] == "interrupted" and values["error_type"] == "Interrupted"
    assert values["error"].startswith(f"interrupted by {number.name}")
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


def test_what_was_drawn_before_is_not_drawn_again(command, monkeypatch, tmp_path, cache):
    predict, drawn = EvaluationModule.predict_step, []

    def second(self, batch):
        drawn.append(batch)
        if len(drawn) == 2:
            sent(signal.SIGINT)()
        return predict(self, batch)

    monkeypatch.setattr(EvaluationModule, "predict_step", second)
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    assert command("+experiment=fp32", folder, "seed=7")[0] == 130
    assert list((cache / "parts").glob("*/*"))
    assert command("+experiment=fp32", folder, "seed=7")[0] == 0
    assert len(drawn) == 4  # three batches, of which the second was interrupted
    values = read_json(tmp_path / "run" / "results.json")
    assert values["status"] == "finished" and "error" not in values


def test_a_sweep_stops_and_its_resume_does_the_rest(command, monkeypatch, tmp_path):
    folder, psnr, jobs = tmp_path / "s", PairScorer.__call__, []

    def second(*images):
        jobs.append(images)
        return sent(signal.SIGTERM)() if len(jobs) == 2 else psnr(*images)

    monkeypatch.setattr(PairScorer, "__call__", second)
    sweep = ("-m", "+experiment=ndtc_w8a8", "seed=0,1,2", f"hydra.sweep.dir={folder}")
    status, said = command(*sweep)
    assert status == 143 and len(jobs) == 2
    assert "interrupted: 1 of the 2 jobs that were started are done; the rest: " in said
    assert f"python -m ptq_exp sweep.resume={folder}" in said
    found = {path.parent.name[0]: read_json(path)["status"] for path in folder.glob("*/results.json")}
    assert found == {"0": "finished", "1": "interrupted"}
    monkeypatch.setattr(sys, "argv", ["ptq_exp", f"sweep.resume={folder}"])
    main()
    found = [read_json(path)["status"] for path in folder.glob("*/results.json")]
    assert len(jobs) == 4 and found == ["finished"] * 3


def test_joblib_workers_end_too(tmp_path, cache):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    slow = [argument for argument in SMALL if "steps" not in argument and "n_samples=6" not in argument]
    arguments = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "+experiment=ndtc_w8a8", *slow,
                 "sampler.steps=50", "evaluation.n_samples=4000", "seed=0,1,2", f"cache_dir={cache}",
                 f"hydra.sweep.dir={tmp_path / 's'}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "ptq_exp", *arguments], stderr=log, stdout=log)
    for _ in range(1200):
        if list((tmp_path / "s").glob("*/results.json")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = (tmp_path / "log").read_text()
    assert "interrupted: 0 of the" in said and "Traceback" not in said
    found = [read_json(path)["status"] for path in (tmp_path / "s").glob("*/results.json")]
    assert found and set(found) == {"interrupted"}


def test_the_second_signal_kills():
    program = """
import os, signal, time
from ptq_exp.errors import Interrupted, interruptible
with interruptible():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except Interrupted:
        os.kill(os.getpid(), signal.SIGTERM)  # of the same event, passed on
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGINT


def test_what_somebody_handles_or_ignores_stays():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_commands_end_in_one_line_too(capsys):
    with pytest.raises(SystemExit) as stop, command_line("give it again"):
        sent(signal.SIGTERM)()
    assert stop.value.code == 143 and capsys.readouterr().err == "\ninterrupted: give it again\n"


def test_a_search_stops_its_trials_and_starts_no_more():
    started, stopped = [], []

    def trial(overrides):
        started.append(overrides)
        if len(started) == 1:
            return {"metrics": {"psnr": 1.0}}
        for _ in range(100):
            time.sleep(0.02)
            if stopped:
                return {"error": "stopped"}
        raise AssertionError("nobody stopped it")

    stage = Stage("one", [f"x={i}" for i in range(6)])
    search = Search(Space("psnr", "maximize", (0,), (), (stage,)), trial, stop=lambda: stopped.append(True),
                    on_trial=lambda trial: sent(signal.SIGINT)())
    with pytest.raises(Interrupted), interruptible():
        search.best()
    assert stopped == [True] and len(started) <= 2


def test_lightnings_answer_to_ctrl_c_in_a_program_of_ones_own_is_readable(tmp_path):
    with pytest.raises(SystemExit), Results(tmp_path / "results.json"):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    values = read_json(tmp_path / "results.json")
    assert (values["status"], values["error"]) == ("interrupted", "interrupted by SIGINT (Ctrl-C)")
    assert interruption(SystemExit(1)) is None
