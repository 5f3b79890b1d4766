"""`SweepRecord`: what was asked for, as sweep.json in the folder of a sweep; its jobs and its resume read it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ptq_exp.errors import DataError

FILE = "sweep.json"


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as it was started.

    Attributes:
        task: overrides of the command line that concern the jobs, swept ones with all their values.
        hydra: those that concern Hydra: launcher, sweeper and their settings.
        swept: settings that differ between the jobs.
        started: seconds since 1970.
        config_dir: folder with configuration files of one's own, as --config-dir names it.
    """

    task: list[str]
    hydra: list[str]
    swept: list[str]
    started: float = field(default_factory=time.time)
    config_dir: str | None = None

    @classmethod
    def of(cls, config: DictConfig) -> SweepRecord:
        """Return the sweep that a composed configuration (with its node `hydra`) starts."""
        overrides = config.hydra.overrides
        parsed = OverridesParser.create().parse_overrides(list(overrides.task))
        swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
        given = [override.key_or_group for override in parsed]
        params = OmegaConf.select(config, "hydra.sweeper.params") or {}
        swept += [plain_key(key) for key in params if plain_key(key) not in given]
        ours = ("hydra.mode", "hydra.sweep.dir")  # the folder says them
        hydra = [override for override in overrides.hydra if plain_key(override) not in ours]
        sources = config.hydra.runtime.config_sources
        own = next((source.path for source in sources if source.provider == "command-line"), None)
        return cls(list(overrides.task), hydra, swept, config_dir=own)

    @classmethod
    def load(cls, folder: Path) -> SweepRecord:
        """Read `folder`/sweep.json.

        Raises:
            DataError: it is missing or damaged.
        """
        from ptq_exp.storage.plain_json import read_json

        try:
            return cls(**read_json(folder / FILE))
        except TypeError as error:
            raise DataError(f"{folder / FILE} is damaged: {error}") from error

    def save(self, folder: Path) -> None:
        """Write `folder`/sweep.json."""
        from ptq_exp.storage.plain_json import write_json

        write_json(folder / FILE, asdict(self))


def plain_key(override: str) -> str:
    """`bits` for "bits=w4a8", "+bits=..." and "bits@package=..."."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0].strip()
