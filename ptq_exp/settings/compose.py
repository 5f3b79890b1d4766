"""Turn the composed configuration into plain objects; refuse unknown keys, wrong types and impossible values."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import ptq_exp
from ptq_exp.errors import ConfigError, nearest, one_line
from ptq_exp.results.environment import usable_cores
from ptq_exp.settings.field import check_section
from ptq_exp.settings.names import path_settings
from ptq_exp.settings.schema import FULL_PRECISION, ExperimentConfig
from ptq_exp.settings.strict import check_types
from ptq_exp.storage.paths import with_homes

_ALWAYS_CHECKED = ("", "logger", "sampler", "evaluation", "trainer", "runtime", "analysis")
"""Sections that count whatever is quantized and how; the others are looked at where they are used."""


def run_name(
    calibration: str, bits: str, correction: str = "none", reconstruction: str = "none", labels: str = "paired",
    groups: Mapping[str, Any] | None = None,
) -> str:
    """Return `<calibration>[_<labels>][_<reconstruction>]_<bits>[_groups]`, `fp32` for the full-precision model.

    Where noise is corrected, the correction stands in place of the calibration. Paired labels are not mentioned, bits
    per group of layers are.
    """
    if bits == FULL_PRECISION:
        return FULL_PRECISION
    labels = "none" if labels == "paired" else labels
    mixed = "groups" if isinstance(groups, Mapping) and any(groups.values()) else "none"
    parts = [calibration if correction == "none" else correction, labels, reconstruction, bits, mixed]
    return "_".join(str(part) for part in parts if part != "none")  # validated() reports names that are no text


def evaluation_name(path: str) -> str:
    """Return `evaluate_<bits>` for the quantized model saved in `path`."""
    return f"evaluate_{_saved(with_homes(path, 'quantized')).settings['bits']['name']}"


def job_threads() -> int | None:
    """Return the CPU threads for a job of a sweep whose launcher runs several at once; None = as many as torch takes.

    Jobs that take more threads than there are cores slow each other down many times over.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    launcher = HydraConfig.get().launcher
    jobs = launcher.get("n_jobs")
    if jobs is None:
        of_ray = OmegaConf.select(launcher, "ray.remote.num_cpus")
        return launcher.get("cpus_per_task", of_ray and max(1, int(of_ray)))
    cores = usable_cores()
    jobs = jobs if jobs > 0 else max(1, cores + 1 + jobs)  # as joblib counts: -1 = all cores, -2 = all but one
    return None if jobs == 1 else max(1, cores // jobs)


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("job_threads", job_threads, replace=True)
OmegaConf.register_new_resolver("evaluation_name", evaluation_name, replace=True)


def config_folder() -> Path:
    """Return the absolute path of `conf/`: beside the package in a checkout, inside it in an installed wheel.

    Raises:
        ConfigError: neither is there; the installation is incomplete.
    """
    package = Path(ptq_exp.__file__).parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    raise ConfigError(f"no conf/config.yaml beside or inside {package}: install ptq-exp again")


def composed_from(overrides: Sequence[str]) -> ExperimentConfig:
    """Return the configuration that the command would have with these overrides, checked; for Python.

    Raises:
        ConfigError: as `validated`, or Hydra does not know an override.
    """
    with initialize_config_dir(str(config_folder()), version_base=None):
        try:
            found = compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(one_line(error)) from error
        return validated(found)


def validated(composed: DictConfig, given: Sequence[str] = ()) -> ExperimentConfig:
    """Check the composed configuration against the schema and its values, and return it as plain objects.

    Args:
        given: the overrides of the command line; where `quantized` names a saved model, whose settings are taken over,
            they must agree with these.

    Raises:
        ConfigError: one line that names the setting, what was found and what is valid.
        DataError: the saved model is missing or damaged.
    """
    if deleted := next((override for override in given if override.startswith("~")), None):
        raise ConfigError(f"{deleted}: a setting cannot be deleted; give it another value, such as null or GROUP=none")
    try:
        composed = _with_homes(composed)
        if OmegaConf.select(composed, "quantized") is not None:
            composed = with_saved_settings(composed, given)
        settings = _in_order(cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True)))
        settings.pop("sweep", None)  # of the command, see `SweepConfig`
        check_types(settings, ExperimentConfig)
        # only this order of merging refuses `+group.extra=1`
        merged = OmegaConf.merge(_schema(), settings)
        config = cast(ExperimentConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_schema_message(error)) from error
    for section in _ALWAYS_CHECKED:  # what is wrong there is said before anything is imported that takes seconds
        check_section(section, getattr(config, section) if section else config, quick=True)
    import_all(config.imports)
    from ptq_exp.settings.checks import check  # loads torch: help and tab completion do without

    check(config)
    return config


def _schema() -> DictConfig:
    """Make the schema that OmegaConf merges into: parts that are frozen dataclasses cannot be set otherwise."""
    schema = OmegaConf.structured(ExperimentConfig())
    OmegaConf.set_readonly(schema.quantization, None)
    return schema


def _with_homes(composed: DictConfig) -> DictConfig:
    """Write out `~` in all paths of `composed`; interpolations of them follow."""
    result = composed
    for name in path_settings():
        node = OmegaConf.select(result, name)
        value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        if (expanded := with_homes(value, name)) != value:
            result = copy.deepcopy(result)
            OmegaConf.update(result, name, expanded, merge=False)
    return result


def import_all(modules: Sequence[str]) -> None:
    """Import `modules` for what they register.

    Raises:
        ConfigError: one is not there, or what it imports is not.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"imports={module}: {error}; start where {module.replace('.', '/')}.py lies, or add its folder to "
                "PYTHONPATH"
            ) from error


def _in_order(settings: dict[str, Any]) -> dict[str, Any]:
    """Order the sections as the schema does: an error names the setting that was written, not one that copies it."""
    known = [key for key in ExperimentConfig.__dataclass_fields__ if key in settings]
    known.sort(key=lambda key: key == "name")  # made of the others: last
    return {key: settings[key] for key in known} | settings


_MAY_DIFFER = ("seed", "sampler", "model.checkpoint", "model.prompts", "model.channels_last", "model.compile")


def with_saved_settings(composed: DictConfig, given: Sequence[str]) -> DictConfig:
    """Overwrite the settings in `composed` with those of the saved model `composed.quantized`.

    What is `given` on the command line wins for the sampler, the seed and how the model is run; all else must agree.

    Raises:
        ConfigError: a setting on the command line contradicts the saved model.
        DataError: the saved model is missing or damaged.
    """
    keys = [override.lstrip("+~").partition("=")[0].partition("@")[0] for override in given]
    here = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    result = copy.deepcopy(composed)
    OmegaConf.set_struct(result, False)
    for section, values in _saved(composed.quantized).settings.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            path = f"{section}.{key}" if key else section
            asked = next((k for k in keys if path == k or path.startswith(f"{k}.") or k.startswith(f"{path}.")), None)
            there = here.get(section, {}).get(key, value) if key else here.get(section, value)
            if asked == "model" and there is None and here["model"].get("name") == "pipeline":
                asked = None  # the group alone says nothing of which pipeline
            if asked is not None and (path in _MAY_DIFFER or section in _MAY_DIFFER):
                continue
            if asked is not None and there != value:
                raise ConfigError(
                    f"{path}={there} contradicts quantized={composed.quantized}, which was made with {value}: leave "
                    f"{asked} out"
                )
            OmegaConf.update(result, path, value, merge=False)
    return result


def _saved(path: str):
    if not isinstance(path, str):
        raise ConfigError(f"quantized={path}: give the folder of one saved model")
    from ptq_exp.deploy.artifact import Artifact  # takes seconds to import, and is seldom needed

    return Artifact.open(path)


def _schema_message(error: OmegaConfBaseException) -> str:
    key = error.full_key or ""
    first_line = str(error).splitlines()[0]
    parent = error.parent_node
    if "not in" in first_line and isinstance(parent, DictConfig):
        return f"{key}: no such setting; {nearest(key.rsplit('.', 1)[-1], [str(k) for k in parent])}"
    return f"{key}: {first_line}"
