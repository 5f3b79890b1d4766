"""The command: `python -m ptq_exp +experiment=ndtc_w8a8`; `--help` lists groups and settings."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ptq_exp.config import ExperimentConfig, config_folder, nearest, validated
from ptq_exp.errors import PTQError

TRACEBACK = "HYDRA_FULL_ERROR"
_failures: list[str] = []


def _job(composed: DictConfig) -> float | None:
    """One composed experiment; in a sweep, a failure is said and the next job goes on. Returns its FID."""
    try:
        config = validated(composed)
        from ptq_exp.experiment import run_experiment  # a misspelt setting is told before torch is loaded

        return run_experiment(config, Path(HydraConfig.get().runtime.output_dir))["metrics"]["fid"]
    except PTQError as error:
        if _traceback_wanted:
            raise
        _failures.append(str(error))
        print(f"error: {error}", file=sys.stderr)
        return None


def _composition_message(error: Exception) -> str:
    """Hydra's complaint about the command line in one line, with the nearest valid name."""
    text = str(error)
    if missing := re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':\s*(.*)", text, re.S):
        group, _, choice = missing[1].rpartition("/")
        options = missing[3].split()
        return f"{group}={choice}: choose one of {', '.join(options)}"
    if unknown := re.search(r"Could not override '([^']+)'", text):
        key = unknown[1]
        return f"{key}: no such setting; {nearest(key, _known_settings())}"
    return " ".join(text.split())


def _known_settings() -> list[str]:
    """Every setting and group of the schema, dotted."""

    def walk(node, prefix: str):
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    container = OmegaConf.to_container(OmegaConf.structured(ExperimentConfig()))
    return list(walk(container, ""))


_traceback_wanted = os.environ.get(TRACEBACK) == "1"


def main() -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend."""
    _failures.clear()
    os.environ[TRACEBACK] = "1"  # let Hydra raise, so that what it says can be told in one line
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(_job)()
    except (HydraException, OmegaConfBaseException) as error:
        if _traceback_wanted:
            raise
        sys.exit(f"error: {_composition_message(error)}")
    if _failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
