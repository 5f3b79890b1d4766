"""The search for bits per group of layers: its trials, those over the budget, the front as table and picture."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_networks import use_blank_pictures, use_small_networks

from ptq_exp.reports.pareto import on_front

# FP32 / this many bit operations; the small network at 8 bits takes FP32 / 15.93, all else less
BUDGET = 17


def test_a_search_finds_the_front_and_computes_nothing_over_the_budget(
    sweep, command, jobs, tmp_path, capsys, monkeypatch
):
    use_small_networks(monkeypatch)
    use_blank_pictures(monkeypatch)
    folder = tmp_path / "search"
    overrides = (
        "hydra/sweeper=optuna_bits", "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=6", "logger=none",
        "+experiment=ndtc_w8a8", f"bits.min_bops_ratio={BUDGET}", "bits.groups.time=w8a8", "bits.groups.mid=w8a8",
        "bits.groups.attention=w8a8", "bits.groups.down=w8a8,w4a4", "bits.groups.up=w8a8,w6a6,w4a4",
    )
    assert sweep(folder, *overrides) is None
    found = jobs(folder)
    assert len(found) == 4 and {values["status"] for values in found.values()} == {"finished", "infeasible"}
    for name, values in found.items():
        feasible = values["budget"]["bops_ratio"] >= BUDGET
        assert (values["status"] == "finished") == feasible == (folder / name / "samples.npz").exists()
        assert ("seconds" in values) == feasible
        if feasible:
            assert values["quantization"]["bops"] == values["budget"]["bops"]
        else:
            assert f"bits.min_bops_ratio={BUDGET} is not met" in values["error"]

    table = pd.read_csv(folder / "pareto.csv", index_col="job")
    assert list(table.columns[1:3]) == ["down", "up"] and set(table["down"]) <= {"w8a8", "w4a4"}
    done = {name: values for name, values in found.items() if values["status"] == "finished"}
    points = {name: (v["quantization"]["bops"]["conv_linear"], v["metrics"]["fid"]) for name, v in done.items()}
    front = {
        name for name, (cost, fid) in points.items()
        if not any(c <= cost and f <= fid and (c, f) != (cost, fid) for c, f in points.values())
    }
    assert set(table.index[table["front"]]) == front and front
    assert Image.open(folder / "pareto.png").width == 1000
    printed = capsys.readouterr().out
    assert "Pareto front of FID and bit operations" in printed and "infeasible" in printed

    # the same seed asks for the same trials, and all of them are there already
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/results.json")}
    assert command(f"sweep.resume={folder}") is None
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/results.json")} == before


@pytest.mark.parametrize("seed", range(3))
def test_the_front_is_what_no_other_row_dominates(seed):
    values = np.random.default_rng(seed).integers(0, 6, (30, 2)).astype(float)
    values[3] = np.nan, 0
    values[4] = 0, np.inf
    front = on_front(values)
    for i, row in enumerate(values):
        dominated = any((other <= row).all() and (other < row).any() for other in values if np.isfinite(other).all())
        assert front[i] == (np.isfinite(row).all() and not dominated)


def test_equal_rows_are_on_the_front_together():
    assert on_front(np.array([[1, 2], [1, 2], [2, 2]])).tolist() == [True, True, False]
