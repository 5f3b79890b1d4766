"""`sweep.resume=FOLDER`: the command line of a sweep again, from what its folder says."""

from __future__ import annotations

from pathlib import Path

from ptq_exp.cli.sweep.record import FILE, SweepRecord, plain_key
from ptq_exp.errors import ConfigError
from ptq_exp.settings.overrides import flags, given, quoted, typed
from ptq_exp.storage.paths import with_home

RESUME = "sweep.resume"


def with_resumed_sweep(arguments: list[str]) -> list[str]:
    """Return the arguments; where `sweep.resume` is among them, with those of the sweep that it names.

    Only settings that change no number may be given anew: launcher, trainer, logger, cache and the like.

    Raises:
        ConfigError: the folder holds no sweep, or a setting is given that would change what its jobs compute.
        DataError: its sweep.json is damaged.
    """
    command = typed(arguments)
    named = given(command.overrides, multirun=command.multirun).get(RESUME, [None])[0]
    if named in (None, "", "null"):
        return arguments
    place = with_home(str(named), RESUME)
    folder = Path(place)
    if not (folder / FILE).is_file():
        raise ConfigError(f"{RESUME}={folder} holds no sweep, {FILE} is missing: give the folder that a sweep wrote to")
    record = SweepRecord.load(folder)
    asked = [override for override in command.overrides if plain_key(override) not in (RESUME, "hydra.sweep.dir")]
    before = [override for override in [*record.task, *record.hydra] if plain_key(override) != RESUME]
    for override in asked:
        if override not in before and _changes_jobs(plain_key(override)):
            raise ConfigError(
                f"{override} would change the sweep in {folder}, which was started with: {' '.join(record.task)}; "
                f"leave it out, or start another sweep without {RESUME}"
            )
    keys = [plain_key(override) for override in asked]
    kept = [override for override in before if plain_key(override) not in keys]
    flags_given = flags(arguments)
    if not command.multirun:
        flags_given.append("-m")
    if command.config_dir is None and record.config_dir is not None:
        flags_given.append(f"--config-dir={record.config_dir}")
    return [*flags_given, *kept, *asked, f"hydra.sweep.dir={quoted(place)}", f"{RESUME}={quoted(place)}"]


def _changes_jobs(key: str) -> bool:
    """Whether the jobs of a sweep would be others with another value of this setting; folders have the job's name."""
    from ptq_exp.reports.tables.identity import decides_numbers  # loads pandas: help does without

    return key == "name" or (key.partition(".")[0].partition("/")[0] != "hydra" and decides_numbers(key))
