"""The benchmarks find what they import, and the forecast's compares what it says it compares."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"
LOAD = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
for path in sys.argv[2:]:
    runpy.run_path(path, run_name="loaded")
"""


def test_every_benchmark_finds_what_it_imports():
    others = {"vendors.py", "vendor_settings.py"}  # they need packages of other makers
    found = sorted(str(path) for path in FOLDER.glob("*.py") if path.name not in others)
    assert len(found) >= 10
    run = subprocess.run([sys.executable, "-c", LOAD, str(FOLDER), *found], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_benchmark_of_the_forecast_compares_every_stage_with_what_it_took():
    settings = ["+experiment=ndtc_w4a8", "metric=minmax", "sampler.steps=4", "evaluation.n_samples=8",
                "evaluation.batch_size=4", "evaluation.eps_error_samples=4", "evaluation.fid_resamples=2",
                "calibration.n_samples=8", "calibration.batch_size=4"]
    run = subprocess.run([sys.executable, str(FOLDER / "forecast.py"), *settings],
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = {line.split(" | ")[0].lstrip("| "): line for line in run.stdout.splitlines() if line.startswith("| ")}
    assert {"quantize", "quantized_images", "all of these", "memory, GB"} <= set(rows)
