"""A sweep of four jobs, one of which fails: the others go on, the end says what happened, a resume does the rest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_networks import use_small_networks

from ptq_exp.cli.sweep.end import cache_line, read_jobs
from ptq_exp.experiment import experiment
from ptq_exp.storage.plain_json import read_json, write_json

FAILING = "3_ndtc_w4a8"


def break_the_last(monkeypatch):
    """The last combination loses its device while it draws."""
    draw = experiment.quantized_images

    def failing(run, config, key, quantized, title, *rest):
        if (title, run.seed) == ("W4A8 images", 1):
            raise RuntimeError("device lost")
        return draw(run, config, key, quantized, title, *rest)

    monkeypatch.setattr(experiment, "quantized_images", failing)


def wandb_run(folder: Path) -> dict:
    (run,) = (folder / "wandb").glob("offline-run-*")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(inspect, capture_output=True, text=True, check=True, timeout=240).stdout.splitlines()
    return next(record for record in map(json.loads, lines) if record["type"] == "run")


def modified(folder: Path) -> dict[str, float]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/results.json")}


def test_a_sweep_with_a_failing_job_and_its_resume(sweep, command, jobs, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "my_sweep"
    use_small_networks(monkeypatch)
    with pytest.MonkeyPatch.context() as broken:
        break_the_last(broken)
        assert sweep(folder, "+experiment=ndtc_w8a8", "bits=w8a8,w4a8", "seed=0,1") == 1

    found = jobs(folder)
    combinations = [("w8a8", 8, 0), ("w8a8", 8, 1), ("w4a8", 4, 0), ("w4a8", 4, 1)]
    assert list(found) == [f"{i}_ndtc_{bits}" for i, (bits, _, _) in enumerate(combinations)]
    for values, (bits, weight, seed) in zip(found.values(), combinations, strict=True):
        config = values["config"]
        assert (values["name"], config["bits"]["name"], config["seed"]) == (f"ndtc_{bits}", bits, seed)
        assert (config["bits"]["weight"], config["bits"]["activation"]) == (weight, 8)
        assert config["logger"]["group"] == "my_sweep"
        assert config["logger"]["tags"] == [f"bits={bits}", f"seed={seed}"]
    assert [values["status"] for values in found.values()] == ["finished"] * 3 + ["failed"]
    assert found[FAILING]["error"] == "device lost" and found[FAILING]["error_type"] == "RuntimeError"

    printed = capsys.readouterr()
    assert f"failed: {FAILING} (bits=w4a8 seed=1): device lost" in printed.out
    assert f"error: {FAILING}: device lost" in printed.err
    assert "4 jobs: 3 finished, 1 failed" in printed.out and f"sweep.resume={folder}" in printed.out
    (best,) = (line for line in printed.out.splitlines() if "← best FID" in line)
    fid = {bits: [v["metrics"]["fid"] for v in found.values() if v["name"] == f"ndtc_{bits}" and "metrics" in v]
           for bits in ("w8a8", "w4a8")}
    assert min(fid, key=lambda bits: sum(fid[bits]) / len(fid[bits])) in best.split(" | ")[0].lower()
    assert (folder / "report.html").exists() and f"report: {folder / 'report.html'}" in printed.out

    # of each seed one calibration set, one set of images and their features; one reference; ranges of every job
    misses = {"reference": 1, "images": 2, "features": 2, "calibration": 2, "ranges": 4, "noise": 4}
    for kind, n in misses.items():
        counts = [values["cache"]["kinds"][kind] for values in found.values()]
        assert (sum(c["misses"] for c in counts), sum(c["hits"] for c in counts)) == (n, 4 - n), kind
    assert cache_line(found) in printed.out and "cache: 9 of 27 artefacts reused (" in printed.out

    run = json.dumps(wandb_run(folder / FAILING))
    assert "my_sweep" in run and "bits=w4a8" in run and "seed=1" in run

    # another job was killed: it says that it still runs
    killed = folder / "0_ndtc_w8a8" / "results.json"
    write_json(killed, read_json(killed) | {"status": "running"})
    before = modified(folder)
    assert command(f"sweep.resume={folder}", "logger=none") is None
    after, found = modified(folder), jobs(folder)
    assert {name for name in before if after[name] != before[name]} == {"0_ndtc_w8a8", FAILING}
    assert [values["status"] for values in found.values()] == ["finished"] * 4 and "error" not in found[FAILING]
    assert "4 jobs: 4 finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep.resume={}/nothing"], "nothing holds no sweep, sweep.json is missing"),
        (["sweep.resume={}", "seed=0,1,2"], "seed=0,1,2 would change the sweep in"),
        (["sweep.resume={}", "+experiment=ndtc_w4a4"], "+experiment=ndtc_w4a4 would change the sweep in"),
    ],
)
def test_a_resume_refuses_what_is_no_sweep_or_another_one(arguments, message, command, tmp_path):
    write_json(tmp_path / "sweep.json", {"task": ["seed=0,1"], "hydra": [], "swept": ["seed"], "started": 0.0})
    assert message in command(*(argument.format(tmp_path) for argument in arguments))


def test_a_resume_runs_anew_what_was_made_with_other_settings(sweep, command, jobs, tmp_path, caplog):
    folder = tmp_path / "s"
    assert sweep(folder, "+experiment=fp32", "seed=0", "logger=none") is None
    (path,) = folder.glob("*/results.json")
    values = read_json(path)
    values["config"]["sampler"]["steps"] = 7
    write_json(path, values)
    assert command("-m", f"sweep.resume={folder}") is None
    assert "sampler.steps=7, now it is 2: running it again" in (path.parent / "fp32.log").read_text()
    assert next(iter(jobs(folder).values()))["config"]["sampler"]["steps"] == 2


def test_mistakes_of_one_job_do_not_stop_the_others(sweep, jobs, tmp_path, capsys):
    assert sweep(tmp_path / "s", "+experiment=fp32", "seed=-1,0", "logger=none") == 1
    found = list(jobs(tmp_path / "s").values())
    assert [values["status"] for values in found] == ["failed", "finished"]
    assert found[0]["error"] == "seed=-1: choose 0 or more" and found[0]["error_type"] == "ConfigError"
    printed = capsys.readouterr()
    assert "failed: 0_fp32 (seed=-1): seed=-1: choose 0 or more" in printed.out and "Traceback" not in printed.err


def test_a_folder_without_results_is_a_killed_job(tmp_path):
    (tmp_path / "10_b").mkdir()
    (tmp_path / "2_a").mkdir()
    write_json(tmp_path / "2_a" / "results.json", {"status": "running", "stage": "fp32"})
    found = read_jobs(tmp_path)
    assert list(found) == ["2_a", "10_b"] and {values["status"] for values in found.values()} == {"killed"}


def test_an_experiments_own_bits_do_not_leak_into_the_swept_group(sweep, jobs, tmp_path):
    overrides = ("+experiment=ptqd_ldm4_w8a8", "bits=w6a6", "logger=none")
    assert sweep(tmp_path / "s", *overrides) == 1
    (values,) = jobs(tmp_path / "s").values()
    assert "bits=w6a6 would take over bits.boundary=8, which experiment=ptqd_ldm4_w8a8 sets" in values["error"]
