"""One W&B run beside results.json, through Lightning's `WandbLogger`; offline unless asked for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ptq_exp.errors import ConfigError, PTQError, one_line
from ptq_exp.results.missing import is_missing
from ptq_exp.results.sinks import reason, within
from ptq_exp.storage.plain_json import to_plain

if TYPE_CHECKING:
    from pytorch_lightning.loggers import WandbLogger

MODES = ("offline", "online", "none")
_log = logging.getLogger(__name__)
_LAUNCH = "wandb.sdk.launch.inputs.internal"


def make_logger(
    mode: str,
    save_dir: str | os.PathLike,
    *,
    project: str = "ptq-exp",
    name: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> WandbLogger | None:
    """Start one W&B run with its files under `save_dir`/wandb; close it with `finish`.

    Sets WANDB_DIR, WANDB_CACHE_DIR and WANDB_DATA_DIR (and, offline, WANDB_CONFIG_DIR) for this process, so
    that nothing is written outside `save_dir`.

    Args:
        mode: "offline" (no account, no prompt, no network), "online" (needs a key), "none" (no run).
        save_dir: the run folder.
        project, name, entity, group, tags: as W&B shows them.
        config: nested settings of the run.

    Returns:
        The logger for a Lightning Trainer, or None if mode is "none".

    Raises:
        ConfigError: an unknown mode, or online without a valid key.
        PTQError: another W&B run of this process is still open, or W&B cannot start, or does not answer.
    """
    if mode not in MODES:
        raise ConfigError(f"logger.mode={mode!r} is unknown, expected one of {', '.join(MODES)}")
    if mode == "none":
        return None
    if os.path.expanduser("~") == "~":
        raise ConfigError(f"logger.mode={mode}: W&B needs a home folder, this user has none: set HOME or logger=none")
    try:
        _keep_files_in(Path(save_dir).resolve(), offline=mode == "offline")
    except OSError as error:
        raise PTQError(f"cannot write {error.filename}: {error.strerror}; logger.mode=none leaves W&B out") from error

    import wandb
    from pytorch_lightning.loggers import WandbLogger

    if wandb.run is not None:
        raise PTQError(f"the W&B run {wandb.run.name!r} of this process is still open: finish it first")
    quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    try:
        wandb.setup(settings=quiet)  # before the run starts: silent also means that no prompt waits for a key
    except ValueError as error:
        names = ", ".join(sorted(name for name in os.environ if name.startswith("WANDB_")))
        raise ConfigError(f"W&B refuses a variable of the environment, one of {names}: {one_line(error)}") from error
    logger = WandbLogger(
        name=name,
        save_dir=Path(save_dir).resolve(),
        offline=mode == "offline",
        mode=mode,  # explicit: an earlier offline run of this process leaves WANDB_MODE behind
        project=project,
        entity=entity,
        group=group,
        tags=list(tags),
        config=to_plain(dict(config or {}), "config"),
        log_model=False,
        settings=quiet,
    )
    _start(logger, mode)
    _log.info("W&B run: %s", logger.experiment.url if mode == "online" else logger.experiment.dir)
    return logger


def _keep_files_in(folder: Path, *, offline: bool) -> None:
    """Point every folder that W&B writes to below the run folder."""
    places = {"WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data"}
    if offline:  # online, the user's own configuration names the server
        places["WANDB_CONFIG_DIR"] = "config"
    for variable, place in places.items():
        target = folder / "wandb" / place
        target.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(target)
    os.environ["WANDB_DIR"] = str(folder)


def _start(logger: WandbLogger, mode: str) -> None:
    """Open the run now, so that a missing key ends the experiment before it has computed anything."""
    from wandb.errors import AuthenticationError, UsageError

    try:
        with _without_launch(mode):
            _ = logger.experiment
    except (AuthenticationError, UsageError) as error:
        if mode == "offline":
            raise ConfigError(f"W&B refuses a setting of logger ({error}); logger.mode=none leaves W&B out") from error
        raise ConfigError(
            f"logger.mode={mode} needs a valid W&B key ({error}): run `wandb login` or set WANDB_API_KEY, "
            "or choose logger.mode=offline"
        ) from error
    except Exception as error:
        abandon(logger)
        if mode == "offline":
            raise PTQError(f"W&B cannot start ({reason(error)}); logger.mode=none leaves it out") from error
        raise PTQError(f"W&B does not answer ({reason(error)}): check the network, or logger.mode=offline") from error


@contextmanager
def _without_launch(mode: str) -> Iterator[None]:
    """Keep W&B from importing its launch service, which takes seconds and gives an offline run nothing.

    A run asks it for inputs of a job as it starts; where that cannot be imported W&B notes it in its log, and goes on.
    """
    hidden = mode == "offline" and _LAUNCH not in sys.modules
    if hidden:
        sys.modules[_LAUNCH] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules[_LAUNCH]


def log_summary(logger: WandbLogger, sections: Mapping[str, Any]) -> None:
    """Set what a run is summed up by, nested settings and numbers alike."""
    logger.experiment.summary.update(to_plain(dict(sections), "summary"))


def log_image(logger: WandbLogger, key: str, path: str | os.PathLike, caption: str | None = None) -> None:
    """Log an image file."""
    logger.log_image(key, [os.fspath(path)], caption=[caption])


def log_table(logger: WandbLogger, key: str, frame: pd.DataFrame) -> None:
    """Log a table."""
    logger.log_table(key, dataframe=of_one_type(frame))


def of_one_type(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` as a `wandb.Table` takes it: a column holds numbers, booleans or text, None where a value is missing.

    A column of anything else, or of several kinds, becomes text; of several widths (8, 4) that is 8/4.
    """
    return frame.apply(lambda column: _of_one_type(column).astype(object))


def _of_one_type(column: pd.Series) -> pd.Series:
    values = [None if is_missing(value) else value.item() if hasattr(value, "item") else value for value in column]
    there = [value for value in values if value is not None]
    for kind in (bool, str, int | float):
        if all(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for value in there):
            return pd.Series(values, index=column.index, dtype=object)
    return pd.Series([None if value is None else _text(value) for value in values], index=column.index, dtype=object)


def _text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def finish(logger: WandbLogger, exit_code: int = 0) -> None:
    """Close the run (the jobs of a sweep would merge into one otherwise); 0 marks success."""
    logger.experiment.finish(exit_code=exit_code)


def abandon(logger: WandbLogger) -> None:
    """Give up a run that W&B cannot close: end its process, and forget it, so that the next run starts anew."""
    import wandb

    with suppress(Exception):  # where this version keeps its process
        wandb.setup()._connection._proc._process.kill()
    with suppress(Exception, SystemExit):  # its answer to the lost process; at the exit it waits for it no more
        within(5.0, wandb.teardown)
    with suppress(Exception):
        wandb.sdk.lib.module.unset_globals()
    logger._experiment = None
