"""`sweep.resume=FOLDER`: the command line of a sweep again, from what its folder says."""

from __future__ import annotations

from pathlib import Path

from ptq_exp.errors import ConfigError
from ptq_exp.sweep.record import FILE, SweepRecord, plain_key

RESUME = "sweep.resume"


def with_resumed_sweep(arguments: list[str]) -> list[str]:
    """The arguments; where `sweep.resume` is among them, with those of the sweep that it names.

    Only settings that change no number may be given anew: launcher, trainer, logger, cache and the like.

    Raises:
        ConfigError: the folder holds no sweep, or a setting is given that would change what its jobs compute.
        DataError: its sweep.json is damaged.
    """
    named = [argument.partition("=")[2] for argument in arguments if plain_key(argument) == RESUME]
    if not named or named[0] in ("", "null"):
        return arguments
    folder = Path(named[0].strip("'\""))
    if not (folder / FILE).is_file():
        raise ConfigError(f"{RESUME}={folder} holds no sweep, {FILE} is missing: give the folder that a sweep wrote to")
    record = SweepRecord.load(folder)
    flags = [argument for argument in arguments if argument.startswith("-")]
    given = [argument for argument in arguments if "=" in argument and argument not in flags]
    given = [argument for argument in given if plain_key(argument) not in (RESUME, "hydra.sweep.dir")]
    before = [override for override in [*record.task, *record.hydra] if plain_key(override) != RESUME]
    for argument in given:
        if argument not in before and _changes_jobs(plain_key(argument)):
            raise ConfigError(
                f"{argument} would change the sweep in {folder}, which was started with: {' '.join(record.task)}; "
                f"leave it out, or start another sweep without {RESUME}"
            )
    keys = [plain_key(argument) for argument in given]
    kept = [override for override in before if plain_key(override) not in keys]
    multirun = [] if {"-m", "--multirun"} & set(flags) else ["-m"]
    return [*multirun, *flags, *kept, *given, f"hydra.sweep.dir={folder}", f"{RESUME}={folder}"]


def _changes_jobs(key: str) -> bool:
    """Whether the jobs of a sweep would be others with another value of this setting; folders have the job's name."""
    from ptq_exp.tracking.identity import has_effect  # loads pandas: help does without

    return key == "name" or (key.partition(".")[0].partition("/")[0] != "hydra" and has_effect(key))
