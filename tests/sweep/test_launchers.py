"""Jobs of a sweep in processes of their own: results, errors and exit status come back all the same."""

from importlib import import_module
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ptq_exp import config as config_module
from ptq_exp.config import config_folder, job_threads, validated
from ptq_exp.errors import ConfigError
from ptq_exp.sweep import plugins
from ptq_exp.sweep.job import check_processes


@pytest.mark.parametrize(
    ("launcher", "threads"),
    [("joblib", "hydra.launcher.n_jobs=2"), ("submitit_local", "hydra.launcher.cpus_per_task=1")],
)
def test_two_jobs_in_parallel_one_of_which_fails(launcher, threads, sweep, jobs, tmp_path, capsys):
    overrides = ("+experiment=fp32", "seed=0,-1", "logger=none", f"hydra/launcher={launcher}", threads)
    assert sweep(tmp_path / "s", *overrides) == 1
    found = jobs(tmp_path / "s")
    assert {name: values["status"] for name, values in found.items()} == {"0_fp32": "finished", "1_fp32": "failed"}
    assert found["0_fp32"]["config"]["trainer"]["threads"] is not None
    assert found["1_fp32"]["error"] == "seed=-1: choose 0 or more"
    printed = capsys.readouterr().out
    assert "failed: 1_fp32 (seed=-1)" in printed and "| FP32 |" in printed


@pytest.mark.parametrize(
    ("choice", "module", "extra"),
    [
        ("hydra/launcher=joblib", "hydra_joblib_launcher", "joblib"),
        ("hydra/launcher=submitit_slurm", "hydra_submitit_launcher", "slurm"),
        ("hydra/sweeper=optuna_bits", "hydra_optuna_sweeper", "optuna"),
    ],
)
def test_a_missing_plugin_is_named_with_what_installs_it(choice, module, extra, sweep, monkeypatch, tmp_path):
    missing = f"hydra_plugins.{module}"
    monkeypatch.setattr(plugins, "find_spec", lambda name: None if name == missing else object())
    message = sweep(tmp_path / "s", choice, "seed=0,1")
    plugin = module.replace("_", "-")
    assert message.startswith(f"error: {choice} needs {plugin}, which is not installed: pip install 'ptq-exp[{extra}]'")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("file", "module", "schema"),
    [
        ("launcher/joblib", "hydra_joblib_launcher", "JobLibLauncherConf"),
        ("launcher/submitit_local", "hydra_submitit_launcher", "LocalQueueConf"),
        ("launcher/submitit_slurm", "hydra_submitit_launcher", "SlurmQueueConf"),
        ("sweeper/optuna_bits", "hydra_optuna_sweeper", "OptunaSweeperConf"),
    ],
)
def test_our_configurations_of_plugins_have_only_settings_that_the_plugins_know(file, module, schema):
    ours = OmegaConf.load(config_folder() / "hydra" / f"{file}.yaml")
    known = OmegaConf.structured(getattr(import_module(f"hydra_plugins.{module}.config"), schema))
    assert set(ours) <= set(known) and ours._target_ == known._target_


def composed(*overrides):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return validated(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
@pytest.mark.parametrize("record", [None, "a sweep"])
def test_strategies_that_start_the_command_again_are_refused(strategy, record):
    config = composed("trainer.devices=2", f"trainer.strategy={strategy}")
    with pytest.raises(ConfigError, match=f"trainer.strategy={strategy} with trainer.devices=2 .*=ddp_spawn"):
        check_processes(config, SimpleNamespace(record=record))


def test_torchrun_is_refused_and_one_process_is_not(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for overrides in ([], ["trainer.devices=2", "trainer.strategy=ddp_spawn"], ["trainer.strategy=ddp"]):
        check_processes(composed(*overrides), SimpleNamespace(record=None))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun starts the whole command once per device"):
        check_processes(composed(), SimpleNamespace(record=None))


@pytest.mark.parametrize(
    ("launcher", "threads"),
    [({"n_jobs": 2}, 4), ({"n_jobs": 1}, None), ({"n_jobs": -1}, 1), ({"n_jobs": 16}, 1), ({"n_jobs": -7}, 4),
     ({"cpus_per_task": 3}, 3), ({}, None)],
)  # fmt: skip
def test_jobs_in_parallel_share_the_cores(launcher, threads, monkeypatch):
    hydra = OmegaConf.create({"mode": config_module.RunMode.MULTIRUN, "launcher": launcher})
    monkeypatch.setattr(config_module, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: hydra))
    monkeypatch.setattr(config_module.os, "sched_getaffinity", lambda _: set(range(8)))
    assert job_threads() == threads
