"""The table command, on hand-made results."""

import pytest

from ptq_exp.table import experiment_table, main
from ptq_exp.tracking.results import write_json


def results(name, bits, seed, increase, **metrics):
    spec = {"extractor": "e", "preprocessing": "p", "reference": "r", "n_samples": 4, "seed": seed}
    values = {
        "name": name, "status": "finished", "seed": seed, "metric_spec": spec,
        "config": {"seed": seed, "metric": {"name": "lp"}, "bits": {"name": bits}},
        "metrics": {"fid": 1.0 + seed, "sfid": 2.0, "is": 9.0, **metrics},
    }  # fmt: skip
    if increase is not None:
        values["metrics"] |= {"fid_increase_units": increase, "psnr": 40.0, "eps_error": 0.0125}
        values["quantization"] = {"coverage_conv_linear": 1.0, "bops_ratio": 16.0}
    return values


@pytest.fixture
def runs(tmp_path):
    rows = [("ndtc_w4a4", "w4a4", 3.0), ("ndtc_w8a8", "w8a8", 0.1), ("fp32", "fp32", None)]
    for name, bits, increase in rows:
        for seed in (0, 2):
            write_json(tmp_path / f"{name}_{seed}" / "results.json", results(name, bits, seed, increase))
    return tmp_path


def test_rows_stand_in_order_of_their_damage_with_mean_and_deviation(runs):
    lines = experiment_table(str(runs)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| fp32", "| ndtc_w8a8", "| ndtc_w4a4"]
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["ndtc_w8a8", "lp", "2.00 ± 1.41", "2.00 ± 0.00", "9.00 ± 0.00", "0.10 ± 0.00", "40.00 ± 0.00",
                     "1.25 ± 0.00", "100.00", "16.00"]  # fmt: skip
    assert lines[2].count("—") == 5  # what full precision has no value for is shown as missing
    assert lines[-1] == "extractor e, n_samples 4, preprocessing p, reference r; seeds 0, 2."


def test_a_folder_without_results_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="error: no results.json below"):
        main([str(tmp_path)])
