"""The W&B run of an experiment: a sink, whose errors become one warning and end there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ptq_exp.errors import ConfigError, Interrupted, PTQError
from ptq_exp.results import wandb as wandb_run
from ptq_exp.results.sinks import reason, within

PATIENCE = {"offline": 30.0, "online": 300.0}
"""Seconds that W&B may take to write down a run (online: to upload it), in all and again for closing it."""
_log = logging.getLogger("ptq_exp")


class Tracked:
    """What goes into the W&B run of an experiment; nothing happens without a logger.

    Attributes:
        lost: what could not be recorded.
        why: the first reason.
    """

    def __init__(self, logger: Any, mode: str) -> None:
        self.logger = logger
        self.patience = PATIENCE.get(mode, 0.0)
        self.lost: list[str] = []
        self.why: BaseException | None = None

    def record(self, items: dict[str, Callable[[Any], object]]) -> None:
        """Give the logger to each function, called by what it records; one that fails keeps no other from trying."""
        if self.logger is None:
            return
        left = dict(items)

        def all_of_them() -> None:
            for what, function in items.items():
                try:
                    function(self.logger)
                except Exception as error:
                    self._lose(what, error)
                del left[what]

        try:
            within(self.patience, all_of_them)
        except TimeoutError as error:
            for what in list(left):
                self._lose(what, error)

    def close(self, exit_code: int) -> None:
        """End the run, and W&B's own process with it where that does not answer."""
        if self.logger is None:
            return
        hangs = isinstance(self.why, TimeoutError)
        try:
            within(1.0 if hangs else self.patience, lambda: wandb_run.finish(self.logger, exit_code))
        except Exception as error:
            self._lose("the end of the run", error)
            wandb_run.abandon(self.logger)
        if self.lost:
            _log.warning("W&B lacks %s (%s); results.json and the other files of the run hold all of it",
                         ", ".join(self.lost), reason(self.why))

    def _lose(self, what: str, error: BaseException) -> None:
        self.lost.append(what)
        self.why = self.why or error


@contextmanager
def tracked(mode: str, save_dir: Any, **settings: Any) -> Iterator[Tracked]:
    """Yield the W&B run that `make_logger` starts with these arguments, closed whatever happens.

    Offline, a W&B that cannot start is a warning: nobody asked for it.

    Raises:
        ConfigError: a setting that W&B refuses, or online without a valid key.
        PTQError: online, the service does not answer.
    """
    try:
        logger = wandb_run.make_logger(mode, save_dir, **settings)
    except PTQError as error:
        if mode == "online" or isinstance(error, ConfigError):
            raise
        _log.warning("no W&B run: %s", error)
        logger = None
    run, exit_code = Tracked(logger, mode), 1
    try:
        yield run
        exit_code = 0
    except Interrupted as error:
        exit_code = error.status
        raise
    finally:
        run.close(exit_code)
