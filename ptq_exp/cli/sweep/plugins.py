"""Check launchers and sweepers that come as plugins of Hydra: a missing one is reported before anything starts."""

from __future__ import annotations

from importlib.util import find_spec

from omegaconf import DictConfig

from ptq_exp.errors import not_installed

# module -> (extra of this package, plugin)
PLUGINS = {
    "hydra_plugins.hydra_joblib_launcher": ("joblib", "hydra-joblib-launcher"),
    "hydra_plugins.hydra_submitit_launcher": ("slurm", "hydra-submitit-launcher"),
    "hydra_plugins.hydra_ray_launcher": ("ray", "hydra-ray-launcher"),
    "hydra_plugins.hydra_optuna_sweeper": ("optuna", "hydra-optuna-sweeper"),
}


def check_plugins(config: DictConfig) -> None:
    """Raise ConfigError, with the command that installs it, if launcher or sweeper is a plugin that is not there."""
    for group in ("launcher", "sweeper"):
        module = config.hydra[group]["_target_"].rsplit(".", 2)[0]
        if module in PLUGINS and not _installed(module):
            extra, plugin = PLUGINS[module]
            choice = config.hydra.runtime.choices[f"hydra/{group}"]
            raise not_installed(f"hydra/{group}={choice}", plugin, extra)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even hydra_plugins is there
        return False
