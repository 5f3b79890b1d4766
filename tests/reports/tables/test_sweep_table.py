"""The table that ends a sweep."""

import pytest
from markdown_text import squeezed

from ptq_exp.errors import DataError
from ptq_exp.reports.tables.sweep_table import sweep_table


def test_a_row_per_choice_and_the_best_marked(tmp_path, write_run):
    for job, (n, seed, fid) in enumerate([(64, 0, 3.0), (64, 1, 5.0), (256, 0, 1.0), (256, 1, 2.0), (512, 0, 9.0)]):
        status = "failed" if n == 512 else "finished"
        settings, metrics = {"calibration": {"n_samples": n}}, {"fid": fid, "psnr": 40.0}
        write_run(tmp_path / str(job), seed=seed, metrics=metrics, status=status, config=settings)
    text = squeezed(sweep_table(tmp_path, ["calibration.n_samples", "seed"]))
    assert text.splitlines()[:5] == [
        "| calibration.n_samples | FID ↓ | PSNR dB ↑ | |",
        "|:--|--:|--:|:--|",
        "| 64 | 4.00 ± 1.41 | 40.00 ± 0.00 | |",
        "| 256 | **1.50 ± 0.71** | 40.00 ± 0.00 | ← best FID |",
        "| 512 | — | — | |",
    ]
    assert "failed: 4" in text and "seed 0, 1" in text


def test_experiments_are_told_apart_by_name_and_full_precision_is_no_candidate(tmp_path, write_run):
    for bits, fid in (("fp32", 0.1), ("w8a8", 1.0), ("w4a8", 2.0)):
        write_run(tmp_path / bits, bits, metrics={"fid": fid})
    rows = squeezed(sweep_table(tmp_path, ["+experiment", "seed"])).splitlines()[2:5]
    assert rows == ["| FP32 | 0.10 | |", "| ndtc_w4a8 | 2.00 | |", "| ndtc_w8a8 | **1.00** | ← best FID |"]
    assert "ndtc_w8a8" in sweep_table(tmp_path, ["seed"])


def test_a_sweep_without_results_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no results.json"):
        sweep_table(tmp_path, ["bits"])
