"""report.html of a sweep: what was varied, means over seeds, links to the runs, the Pareto front."""

import json
import os
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from matplotlib.axes import Axes

from ptq_exp.errors import DataError
from ptq_exp.reports.html import write_sweep_report
from ptq_exp.reports.html.sweep import compared
from ptq_exp.reports.pareto import front
from ptq_exp.reports.tables.runs import collect


@pytest.fixture
def sweep(make_run, tmp_path):
    """Two bit-widths at two seeds, a full-precision run, and a failed one."""
    folder = tmp_path / "sweep"
    for i, (bits, seed, fid, bops) in enumerate(
        [("w8a8", 0, 1.1, 4e9), ("w8a8", 1, 1.3, 4e9), ("w4a8", 0, 2.0, 2e9), ("w4a8", 1, 3.0, 2e9)]
    ):
        run = make_run(folder / f"{i}_ndtc_{bits}", name=f"ndtc_{bits}", bits=bits, seed=seed, fid=fid, bops=bops)
        (run / "report.html").touch()
    make_run(folder / "4_fp32 #1", quantized=False, name="fp32", bits="fp32")
    make_run(folder / "5_broken", name="ndtc_w8a8", status="failed", seed=2, error="no <such> file")
    return folder


def test_the_sections_of_a_sweep(sweep, read_page):
    path = write_sweep_report(sweep)
    page = read_page(path)
    assert path == sweep / "report.html"
    assert page.sections == ["pareto", "compared", "runs", "failures", "reproduce"]
    assert "6 runs: 5 finished, 1 failed" in page.texts
    assert all(address.startswith("data:") for address in page.addresses())
    pictures = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert pictures == ["FID increase over FP32 over bit operations, digits",
                        "relative eps error, % over bit operations, digits"]
    (failure,) = next(rows for rows in page.tables if "error" in rows[0])[1:]
    assert failure == ["5_broken", "done", "no <such> file"]


def test_rows_are_means_over_the_seeds_of_finished_runs(sweep, read_page):
    rows = {row["experiment"]: row for row in read_page(write_sweep_report(sweep)).table("experiment")}
    assert set(rows) == {"ndtc_w8a8", "ndtc_w4a8", "FP32"}
    assert (rows["ndtc_w4a8"]["seeds"], rows["FP32"]["seeds"]) == ("0, 1", "0")
    for name, fids in (("ndtc_w8a8", [1.1, 1.3]), ("ndtc_w4a8", [2.0, 3.0])):
        assert rows[name]["FID"] == f"{np.mean(fids):.2f} ± {np.std(fids, ddof=1):.2f}"
    assert (rows["FP32"]["FID"], rows["FP32"]["BOPs G"]) == ("1.00", "64.00")


def test_every_run_is_linked_to_its_report_or_its_folder(sweep, read_page):
    page = read_page(write_sweep_report(sweep))
    links = [Path(unquote(address)) for address in page.addresses("a")]
    assert len(links) == 6 and not any(link.is_absolute() for link in links)
    assert all((sweep / link).exists() for link in links)
    assert [link.name for link in links].count("report.html") == 4


def test_the_command_of_the_sweep_is_shown(sweep, read_page):
    (sweep / "multirun.yaml").write_text(json.dumps({"hydra": {"overrides": {"task": ["bits=w8a8,w4a8", "seed=0,1"]}}}))
    assert "python -m ptq_exp -m bits=w8a8,w4a8 seed=0,1" in read_page(write_sweep_report(sweep)).texts


def test_settings_that_a_name_implies_are_no_columns_and_others_are(make_run, tmp_path):
    base = {"model": {"name": "digits"}, "sampler": {"solver": "ddim", "steps": 3}}
    for i, (bits, n) in enumerate([("w8a8", 8), ("w8a8", 16), ("w4a8", 8), ("w4a8", 16)]):
        config = base | {"bits": {"name": bits, "weight": int(bits[1])}, "calibration": {"n_samples": n},
                         "trainer": {"threads": i}, "seed": 0, "name": "one"}
        make_run(tmp_path / str(i), name="one", config=config, fid=float(i))
    table = compared(collect(tmp_path))
    assert table.keys == ["name", "model", "bits", "calibration.n_samples"]
    assert table.frame["fid"].tolist() == [1, 0, 1, 2, 3]


def test_a_repeated_run_counts_once_and_the_newest_wins(make_run, tmp_path):
    for i, fid in enumerate([5.0, 7.0]):
        folder = make_run(tmp_path / str(i), fid=fid)
        os.utime(folder / "results.json", (1000 - i, 1000 - i))
    frame = compared(collect(tmp_path)).frame
    assert frame["fid"].tolist()[1:] == [5.0] and np.isnan(frame["fid.std"][1])


def test_a_single_run_and_runs_that_all_failed_still_have_a_report(make_run, tmp_path, read_page):
    make_run(tmp_path / "one" / "0")
    assert read_page(write_sweep_report(tmp_path / "one")).sections == ["compared", "runs", "reproduce"]
    make_run(tmp_path / "bad" / "0", status="failed", error="x")
    (tmp_path / "bad" / "1").mkdir()
    (tmp_path / "bad" / "1" / "results.json").write_text("{")
    page = read_page(write_sweep_report(tmp_path / "bad"))
    assert page.sections == ["runs", "failures", "reproduce"] and "unreadable" in page.texts
    with pytest.raises(DataError, match="no results.json"):
        write_sweep_report(tmp_path / "one" / "0" / "nothing")


def test_hostile_names_are_text_here_too(make_run, tmp_path, read_page):
    hostile = "</script><script>alert(1)</script>$\\frac{"
    for i in range(2):
        make_run(tmp_path / "<b>" / str(i), name=f"{hostile}{i}", model=hostile, bops=1e9 * (i + 1))
    page = read_page(write_sweep_report(tmp_path))
    assert [tag for tag, _ in page.elements].count("script") == 1 and "b" not in dict(page.elements)
    assert f"{hostile}0" in page.texts and "pareto" in page.sections


def test_the_front_is_what_nothing_else_beats():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 30):
        cost, loss = rng.integers(0, 6, (2, n)).astype(float)
        found = front(np.stack([cost, loss], axis=1))
        beaten = [
            any((cost[j] <= cost[i] and loss[j] <= loss[i]) and (cost[j] < cost[i] or loss[j] < loss[i])
                for j in range(n))
            for i in range(n)
        ]
        assert sorted(found) == [i for i in range(n) if not beaten[i]]
        assert (np.diff(cost[found]) >= 0).all() and (np.diff(loss[found]) <= 0).all()


@pytest.fixture
def long_sweep(make_run, tmp_path):
    """Twelve jobs: as text, the names of the last two come before that of the third."""
    for i in range(12):
        make_run(tmp_path / f"{i}_run", name=f"n{i}", fid=1.0 + i % 5, bops=(1 + i) * 1e9, seed=0)
    return tmp_path


def test_runs_stand_in_the_order_of_their_jobs(long_sweep, read_page):
    page = read_page(write_sweep_report(long_sweep))
    runs = [f"{i}_run" for i in range(12)]
    assert [row["run"] for row in page.table("run")] == runs
    assert [row["experiment"] for row in page.table("experiment")] == ["FP32", *(f"n{i}" for i in range(12))]


def test_a_setting_looks_the_same_in_all_plots(long_sweep, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, **style: drawn.append(
        (style["label"], style["fmt"], style["color"])))
    write_sweep_report(long_sweep)
    assert len(drawn) >= 2 * 12 and len(set(drawn)) == 12
