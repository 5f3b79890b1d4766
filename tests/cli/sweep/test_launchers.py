"""Jobs of a sweep in processes of their own: results, errors and exit status come back all the same."""

import os
from importlib import import_module
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from markdown_text import squeezed
from omegaconf import OmegaConf

from ptq_exp.cli.sweep import plugins
from ptq_exp.cli.sweep.processes import check_devices, only_process
from ptq_exp.errors import ConfigError
from ptq_exp.lightning import make_trainer
from ptq_exp.settings import compose as config_module
from ptq_exp.settings.compose import config_folder, job_threads, validated


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
    assert "failed: 1_fp32 (seed=-1)" in printed and "| FP32 |" in squeezed(printed)


@pytest.mark.parametrize(
    ("choice", "module", "extra"),
    [
        ("hydra/launcher=joblib", "hydra_joblib_launcher", "joblib"),
        ("hydra/launcher=submitit_slurm", "hydra_submitit_launcher", "slurm"),
        ("hydra/launcher=ray", "hydra_ray_launcher", "ray"),
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
        ("launcher/ray", "hydra_ray_launcher", "RayLauncherConf"),
        ("sweeper/optuna_bits", "hydra_optuna_sweeper", "OptunaSweeperConf"),
    ],
)
def test_our_configurations_of_plugins_have_only_settings_that_the_plugins_know(file, module, schema):
    if not plugins._installed(f"hydra_plugins.{module}"):
        pytest.skip(f"NOT TESTED: {module} is not installed; whether it knows conf/hydra/{file}.yaml is not seen")
    ours = OmegaConf.load(config_folder() / "hydra" / f"{file}.yaml")
    place = f"hydra_plugins.{module}." + ("_config" if module == "hydra_ray_launcher" else "config")
    known = OmegaConf.structured(getattr(import_module(place), schema))
    assert set(ours) <= set(known) and ours._target_ == known._target_
    if file == "launcher/ray":
        assert set(ours.ray) <= set(known.ray)


@pytest.mark.parametrize(
    ("launcher", "overrides", "threads"),
    [("submitit_slurm", ["hydra.launcher.cpus_per_task=6", "hydra.launcher.partition=gpu"], 6),
     ("submitit_local", [], 1), ("joblib", ["hydra.launcher.n_jobs=1000"], 1),
     ("ray", ["hydra.launcher.ray.remote.num_cpus=3"], 3)],
)
def test_every_launcher_composes_and_says_how_many_threads_a_job_has(launcher, overrides, threads, monkeypatch):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        found = compose("config", [f"hydra/launcher={launcher}", *overrides], return_hydra_config=True).hydra
    assert found.runtime.choices["hydra/launcher"] == launcher
    assert found.launcher._target_.rsplit(".", 2)[0] in plugins.PLUGINS  # what a missing one is called by
    hydra = SimpleNamespace(mode=config_module.RunMode.MULTIRUN, launcher=found.launcher)
    monkeypatch.setattr(config_module, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: hydra))
    assert job_threads() == threads


def composed(*overrides):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return validated(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_strategies_that_start_the_command_again_are_refused(strategy):
    config = composed("trainer.devices=2", f"trainer.strategy={strategy}")
    with pytest.raises(ConfigError, match=f"trainer.strategy={strategy} with trainer.devices=2 .*=ddp_spawn"):
        check_devices(config.trainer)
    for overrides in ([], ["trainer.devices=2", "trainer.strategy=ddp_spawn"], ["trainer.strategy=ddp"]):
        check_devices(composed(*overrides).trainer)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
SBATCH = {"SLURM_JOB_ID": "11", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TORCHRUN, "WORLD_SIZE=2: torchrun .*starts the whole command once per process"),
        (SBATCH | {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2: srun .*trainer.strategy=ddp_spawn"),
        (SBATCH | {"SLURM_PROCID": "1"}, "SLURM_PROCID=1: srun"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, "OMPI_COMM_WORLD_SIZE=4: mpirun"),
        ({"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0"}, "JSM_NAMESPACE_SIZE=2: jsrun"),
    ],
)
def test_one_of_several_processes_is_refused(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        only_process()


ALONE = [
    TORCHRUN | {"WORLD_SIZE": "1"}, SBATCH, {"WORLD_SIZE": "8"}, {"RANK": "3", "LOCAL_RANK": "x", "MASTER_PORT": "y"},
    {"SLURM_NTASKS": "two", "SLURM_JOB_ID": "", "SLURM_PROCID": "abc"}, {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/no"},
]


@pytest.mark.parametrize("variables", ALONE)
def test_one_process_in_an_allocation_runs_on_one_device(variables, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "SLURM_PROCID", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what is forgotten comes back after the test
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    only_process()
    assert {os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")} == {"0"}
    trainer = make_trainer("t", accelerator="cpu", progress_bar=False)
    assert (trainer.world_size, trainer.global_rank, trainer.is_global_zero) == (1, 0, True)


@pytest.mark.parametrize(
    ("launcher", "threads"),
    [({"n_jobs": 2}, 4), ({"n_jobs": 1}, None), ({"n_jobs": -1}, 1), ({"n_jobs": 16}, 1), ({"n_jobs": -7}, 4),
     ({"cpus_per_task": 3}, 3), ({}, None)],
)
def test_jobs_in_parallel_share_the_cores(launcher, threads, monkeypatch):
    hydra = OmegaConf.create({"mode": config_module.RunMode.MULTIRUN, "launcher": launcher})
    monkeypatch.setattr(config_module, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: hydra))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert job_threads() == threads
