"""`evaluation.gate` in a sweep: all jobs run, the end names those that miss it, and the command ends with 3."""

import pytest
from small_networks import use_small_networks

from ptq_exp.cli.sweep.end import finish_sweep
from ptq_exp.cli.sweep.record import SweepRecord
from ptq_exp.evaluation.gate import judged
from ptq_exp.storage.plain_json import write_json


@pytest.fixture(autouse=True)
def small(monkeypatch):
    use_small_networks(monkeypatch)


def test_a_missed_gate_stops_no_other_job_and_a_resume_judges_again(sweep, command, jobs, tmp_path, capsys):
    folder = tmp_path / "s"
    assert sweep(folder, "+experiment=fp32", "seed=0,1", "evaluation.gate={fid: 0, is: 1}", "logger=none") == 3
    found = jobs(folder)
    assert [values["status"] for values in found.values()] == ["finished"] * 2
    assert [list(values["gate"]["missed"]) for values in found.values()] == [["fid"]] * 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "evaluation.gate missed" in line]
    assert [line.partition(" ")[0] for line in lines] == ["0_fp32", "1_fp32"]
    assert all("above 0" in line and "(seed " in line for line in lines)
    assert "2 jobs: 2 finished" in printed.out and "again:" not in printed.out

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/samples.npz")}
    assert command(f"sweep.resume={folder}", "evaluation.gate={fid: 100000}") is None
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/samples.npz")} == before
    assert all(values["gate"]["passed"] for values in jobs(folder).values())
    assert command(f"sweep.resume={folder}", "evaluation.gate=null") is None
    assert all("gate" not in values for values in jobs(folder).values())


def test_the_end_tells_those_that_miss_from_those_that_pass(tmp_path, capsys):
    SweepRecord(["seed=0,1"], [], ["seed"]).save(tmp_path)
    for n, psnr in enumerate((31.0, 28.0)):
        gate = judged({"psnr": psnr}, {"psnr": 30.0})
        write_json(tmp_path / f"{n}_a" / "results.json", {"status": "finished", "gate": gate, "seed": n})
    assert finish_sweep(tmp_path) == ([], ["1_a"])
    assert capsys.readouterr().err == "1_a (seed 1): evaluation.gate missed: psnr 28 is 2 below 30\n"


def test_an_error_outranks_a_missed_gate(sweep, jobs, tmp_path):
    assert sweep(tmp_path / "s", "+experiment=fp32", "seed=-1,0", "evaluation.gate={fid: 0}", "logger=none") == 1
    assert [values["status"] for values in jobs(tmp_path / "s").values()] == ["failed", "finished"]
