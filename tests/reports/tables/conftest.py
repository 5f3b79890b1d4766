"""Hand-made results of experiments, as tests of tables write them."""

import pytest

from ptq_exp.storage.plain_json import write_json

SPEC = {"extractor": "digits", "preprocessing": "none", "reference": "train", "n_samples": 512}


def values_of_a_run(bits="w8a8", calibration="ndtc", seed=0, *, metrics=None, config=None, spec=None, **extra):
    """What results.json of an experiment holds, as far as tables read it; `config` is merged group by group."""
    settings = {
        "name": f"{calibration}_{bits}", "seed": seed, "cache": "on", "logger": {"project": f"p{seed}"},
        "model": {"name": "digits"}, "sampler": {"name": "ddim", "steps": 20, "eta": 0.0},
        "calibration": {"name": calibration, "n_samples": 512}, "metric": {"name": "mse"}, "bits": {"name": bits},
        "quantization": {"name": "full", "shortcut": "joint"}, "reconstruction": {"name": "none"},
        "correction": {"name": "none"},
    }
    for group, changes in (config or {}).items():
        settings[group] = settings[group] | changes if isinstance(changes, dict) else changes
    values = {
        "name": settings["name"], "status": "finished", "stage": "done", "seed": seed, "config": settings,
        "metrics": {"fid": 1.0} | (metrics or {}), "metric_spec": (SPEC if spec is None else spec) | {"seed": seed},
    }
    return values | extra


@pytest.fixture(scope="session")
def run_values():
    """What results.json of an experiment holds: `values_of_a_run`."""
    return values_of_a_run


@pytest.fixture(scope="session")
def write_run():
    """Write `values_of_a_run(...)` as folder/results.json."""

    def write(folder, *args, **kwargs):
        write_json(folder / "results.json", values_of_a_run(*args, **kwargs))

    return write
