"""The processes that a command runs in: it starts its own, and is none of several that a launcher has started."""

from __future__ import annotations

import os

from ptq_exp.errors import ConfigError
from ptq_exp.settings.schema_machine import TrainerConfig

_SPAWNED = ("ddp_spawn", "ddp_fork")
_LAUNCHERS = {
    "torchrun or a job of Kubernetes": ("WORLD_SIZE", "RANK"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpirun (MPICH)": ("PMI_SIZE", "PMI_RANK"),
    "mpirun (MVAPICH)": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    "jsrun": ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
}
"""What starts a command several times -> the variables with the number of processes and the number of this one."""
_OF_A_GROUP = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
               "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables that Lightning believes, whoever has left them behind."""


def only_process() -> None:
    """Refuse to be one of several processes of the same command; forget what says so where there is one alone.

    A scheduler's allocation of several tasks, in which the command runs once, is one alone. To be called before
    Lightning is imported.

    Raises:
        ConfigError: a launcher has started the command several times.
    """
    for launcher, (size, rank) in _LAUNCHERS.items():
        if (_number(size) > 1 and rank in os.environ) or (rank == "SLURM_PROCID" and _number(rank) > 0):
            found = size if size in os.environ else rank
            raise ConfigError(
                f"{found}={os.environ[found]}: {launcher} starts the whole command once per process, each with a run "
                "folder of its own, so that each would hold a part of the images: start the command itself, once, with "
                "trainer.devices=N trainer.strategy=ddp_spawn for several devices"
            )
    for name in _OF_A_GROUP:
        if os.environ.get(name) != "0" or name == "LOCAL_RANK":  # launchers of sweeps read their own zeros again
            os.environ.pop(name, None)


def _number(name: str) -> int:
    """Return a variable of the environment as a whole number; 0 for anything else."""
    try:
        return int(os.environ.get(name, "0"))
    except ValueError:
        return 0


def check_devices(trainer: TrainerConfig) -> None:
    """Refuse devices whose processes would write to different folders or wait for each other.

    Raises:
        ConfigError: several devices with another strategy than those that start processes from within a run.
    """
    if trainer.devices > 1 and trainer.strategy not in _SPAWNED:
        raise ConfigError(
            f"trainer.strategy={trainer.strategy} with trainer.devices={trainer.devices} starts the whole command once "
            "per device; in a sweep each of them would draw a part of the images into another folder, in a single run "
            "they wait for each other's artefacts: choose trainer.strategy=ddp_spawn, or one device per job and "
            "hydra/launcher=joblib"
        )
